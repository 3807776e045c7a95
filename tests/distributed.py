"""Run a function on several gloo processes, each a fresh interpreter, and hand back what each returned."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds


def run_distributed(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world` processes in one gloo group (joined before the call); the list of their results.

    Fresh interpreters rather than forks: DeepSpeed and torch keep global state. `function` must be importable by name.

    Raises:
        AssertionError: a process failed; the text holds every process's stderr.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.pickle"
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        processes, logs = [], []
        for rank in range(world):
            env = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            }  # fmt: skip
            command = [sys.executable, __file__, str(call), str(Path(folder) / f"{rank}.pickle")]
            # A file, not a pipe: a rank that fills its pipe while another's is read would stop, and all with it.
            logs.append(Path(folder) / f"{rank}.log")
            with logs[-1].open("w") as log:
                processes.append(subprocess.Popen(command, env=env, stderr=log))
        deadline = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # killed below; the report says -9
        finally:
            for process in processes:
                process.kill()
                process.wait()
        report = "\n".join(
            f"--- rank {rank}, exit {process.returncode}\n{log.read_text()}"
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
        )
        assert all(process.returncode == 0 for process in processes), report
        return [
            pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world)
        ]


def _child(call: str, answer: str) -> None:
    from importlib import import_module

    from mtl.distributed.engine import init_process_group

    module, name, args = pickle.loads(Path(call).read_bytes())
    init_process_group(timeout_minutes=2)
    Path(answer).write_bytes(pickle.dumps(getattr(import_module(module), name)(*args)))
    sys.stderr.flush()
    os._exit(
        0
    )  # the answer is given: how threads of what a job left open are taken down is not under test


if __name__ == "__main__":
    _child(*sys.argv[1:])
