"""Functions on several processes that are forked from one which has imported what they need.

Importing torch, transformers, peft and DeepSpeed takes a process about ten seconds. So one process (this file as a
program) imports them once and forks for every rank: what torch and DeepSpeed keep globally is as fresh in each as in a
new interpreter, and a rank may fail or die.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from mtl import process

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


def fork(
    function: str, ranks: Sequence[Any], folder: Path, environment: Mapping[str, str]
) -> list[int]:
    """Call `module:function` with each rank's argument, in one process each; how each ended, as an exit code.

    A code is minus the signal's number where one ended the process. Such a process takes the others with it, as a
    cluster's power cut would. So does the end of TIMEOUT.

    Args:
        ranks: each rank's argument, of what JSON has.
        folder: where the processes run, and where what they say lies in RANK.out and RANK.err.
        environment: beside what a launcher sets.
    """
    job = {
        "function": function,
        "ranks": list(ranks),
        "folder": str(folder),
        "path": sys.path,
        "environment": {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(process.free_port())},
    }
    server = _server()
    assert server.stdin and server.stdout
    try:
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has died"
    except BaseException:  # a test that took too long: the answer would be the next one's
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise
    return json.loads(answer)


def said(folder: Path, world: int, end: str) -> str:
    """What the ranks wrote to "out" or "err", in their order."""
    return "".join((folder / f"{rank}.{end}").read_text() for rank in range(world))


@functools.cache
def _server() -> subprocess.Popen:
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([tests, str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with its forks it is a group, to be killed as one
    )
    atexit.register(server.__exit__, None, None, None)  # closes its pipes, so it ends, and waits
    return server


# --- the process that forks


def _serve() -> None:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401, imports torch's compiler
    import pandas  # noqa: F401, imported by pyarrow when it hands out numpy arrays
    import peft  # noqa: F401
    import transformers.integrations.deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from mtl import build  # noqa: F401, and with it nearly all of this project
    from mtl.train import loop  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        running = {_fork(rank, job): rank for rank in range(len(job["ranks"]))}
        codes = [0] * len(running)

        def end(*_: int | FrameType | None, running: dict[int, int] = running) -> None:
            for pid in running:
                os.kill(pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, end)
        signal.alarm(TIMEOUT)
        while running:
            pid, status = os.wait()
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            if code < 0:
                end()
        signal.alarm(0)
        print(json.dumps(codes), flush=True)


def _fork(rank: int, job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code, world = 1, str(len(job["ranks"]))
    try:
        for number, end in ((1, "out"), (2, "err")):
            file = os.open(f"{job['folder']}/{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.environ |= {
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
            **{name: world for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
            **job["environment"],
        }
        os.chdir(job["folder"])
        sys.path[:] = job["path"]
        module, name = job["function"].split(":")
        getattr(import_module(module), name)(job["ranks"][rank])
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # how threads of what a job left open are taken down is not under test


if __name__ == "__main__":
    _serve()
