"""Runs of `launch/train.py` on a toy model, started as a user starts them or, in a tenth of the time, by forking.

A run needs seconds to import torch, transformers and DeepSpeed. So one process (this file as a program) imports them
once and forks for every rank of every run: from there on the program itself runs, in processes that may fail or die.
"""

import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "launch" / "train.py"
TIMEOUT = 240  # seconds
ALLOWED = ("outside", "three")  # packages whose code the YAML may name
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

YAML = """\
model: {{name: {folder}/model, precision: fp32}}
tasks:
  copy:
    train: {folder}/copy.train.jsonl
    validation: {folder}/copy.validation.jsonl
    format: prompt_completion
  chat:
    train: {folder}/chat.train.jsonl
    validation: {folder}/chat.validation.jsonl
    format: messages
  prose:
    train: {folder}/prose.train.jsonl
    validation: {folder}/prose.validation.jsonl
    format: text
mix: {{shares: equal}}
batch: {{examples: 6, tokens: 128, max_length: 128}}
train: {{steps: 12}}
optimizer: {{lr: 1.0e-3}}
balancer: {{name: CoBa, window: 5, warmup: 3}}
evaluate: {{every: 6, probe: {{every: 4, groups: 2}}}}
checkpoint: {{every: 6}}
engine: {{zero: 2, deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}}}
output: {folder}/run
cache: {folder}/cache
"""


def write(folder: Path) -> Path:
    """A model, three tasks and the YAML above, in `folder`; the YAML's path. 12 steps of about 3 micro-batches each."""
    import toys  # not above: this file is also a program that only forks

    toys.save(toys.tiny_llama(), folder / "model")
    toys.write_tasks(folder)
    path = folder / "x.yaml"
    path.write_text(YAML.format(folder=folder))
    return path


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        codes: exit code of each rank, or of the launcher; minus the signal's number where one ended it.
        out, err: what the ranks wrote, in the order of the ranks.
        seconds: from start to end.
    """

    codes: list[int]
    out: str
    err: str
    seconds: float

    def well(self) -> "Ended":
        assert not any(self.codes), f"exit codes {self.codes}\n{self.out}\n{self.err}"
        return self


def train(
    yaml: Path,
    *overrides: str,
    world: int = 1,
    resume: bool | int = False,
    allow: Sequence[str] = ALLOWED,
    last: Sequence[str] = (),
    **environment: str,
) -> Ended:
    """Run the program in the YAML's folder, on `world` forked processes that form a group. A rank that is killed takes
    the others with it.

    last: further arguments of the last rank alone.
    """
    job = {
        "arguments": arguments(yaml, overrides, resume, allow),
        "last": list(last),
        "world": world,
        "port": free_port(),
        "environment": environment,
        "folder": str(yaml.parent),
    }
    began, server = time.monotonic(), _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks has died"
    out, err = (
        "".join((yaml.parent / f"{r}.{end}").read_text() for r in range(world))
        for end in ("out", "err")
    )
    return Ended(json.loads(answer), out, err, time.monotonic() - began)


def without_a_launcher() -> dict[str, str]:
    """The environment without what a process group made in this process has put there."""
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in theirs}


def launch(
    launcher: Sequence[str],
    yaml: Path,
    *overrides: str,
    resume: bool = False,
    more: Sequence[str] = (),
    **environment,
) -> Ended:
    """Run the program as a user does. launcher: `deepspeed --num_gpus 2`, `torchrun --nproc_per_node 2`, `python`."""
    began, going_on = time.monotonic(), arguments(yaml, overrides, resume)
    out, err = (yaml.parent / f"launch.{end}" for end in ("out", "err"))
    with launched(launcher, yaml, *going_on, *more, out=out, err=err, **environment) as process:
        process.wait(TIMEOUT)
    return Ended([process.returncode], out.read_text(), err.read_text(), time.monotonic() - began)


@contextmanager
def launched(
    launcher: Sequence[str], yaml: Path, *args: str, out: Path, err: Path, **environment: str
) -> Iterator[subprocess.Popen]:
    """The launcher's process with the program under it, and its output in files. All are killed in the end."""
    name, *options = launcher
    command = [str(Path(sys.executable).parent / name), *options, str(PROGRAM), *args]
    env = {
        **without_a_launcher(),
        **ENVIRONMENT,
        **environment,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    env.pop("OMP_NUM_THREADS")  # the program's own business, as for a user
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, env=env, stdout=stdout, stderr=stderr, cwd=yaml.parent, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that outlive their launcher
            process.wait()


def arguments(
    yaml: Path, overrides: Sequence[str], resume: bool | int, allow: Sequence[str] = ALLOWED
) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    allowed = [part for package in allow for part in ("--allow-code", package)]
    going_on = [] if resume is False else ["--resume"] if resume is True else [f"--resume={resume}"]
    return ["--config", str(yaml), *allowed, *sets, *going_on]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def untimed(output: Path) -> list[dict[str, Any]]:
    """The same without what a clock decides."""
    timed = ("time/", "memory/", "train/tokens_per_second")
    return [
        {tag: value for tag, value in line.items() if not tag.startswith(timed)}
        for line in metrics(output)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the process that forks


@functools.cache
def _server() -> subprocess.Popen:
    env = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    return subprocess.Popen(
        [sys.executable, __file__],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve() -> None:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401, imports torch's compiler
    import pandas  # noqa: F401, imported by pyarrow when it hands out numpy arrays
    import peft  # noqa: F401
    import transformers.integrations.deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        running = {_fork(rank, job): rank for rank in range(job["world"])}
        codes = [0] * job["world"]
        while running:
            pid, status = os.wait()
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            for other in running if code < 0 else ():  # as a cluster's power cut would
                os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def _fork(rank: int, job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, end in ((1, "out"), (2, "err")):
            file = os.open(f"{job['folder']}/{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.environ |= {
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
            **{name: str(job["world"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), **job["environment"],
        }  # fmt: skip
        os.chdir(job["folder"])
        more = job["last"] if rank == job["world"] - 1 else []
        sys.argv = [str(PROGRAM), *job["arguments"], *more]
        runpy.run_path(str(PROGRAM), run_name="__main__")
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
