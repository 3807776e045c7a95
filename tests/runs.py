"""Runs of `launch/train.py` on a toy model, started as a user starts them or, in a tenth of the time, by forking."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks

ROOT = forks.ROOT
PROGRAM = ROOT / "launch" / "train.py"
TIMEOUT = 240  # seconds
ALLOWED = ("outside", "three")  # packages whose code the YAML may name
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
    import toys  # not above: a process that was forked for a run needs none

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
    began = time.monotonic()
    ranks = [arguments(yaml, overrides, resume, allow) for _ in range(world)]
    ranks[-1] += last
    codes = forks.fork("runs:program", ranks, yaml.parent, environment)
    out, err = (forks.said(yaml.parent, world, end) for end in ("out", "err"))
    return Ended(codes, out, err, time.monotonic() - began)


def program(arguments: list[str]) -> None:
    """The program itself, in a process that was forked for it."""
    sys.argv = [str(PROGRAM), *arguments]
    runpy.run_path(str(PROGRAM), run_name="__main__")


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
        **forks.ENVIRONMENT,
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
