"""Run a function on several gloo processes and hand back what each returned."""

import os
import pickle
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import forks


def run_distributed(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world` processes in one gloo group (joined before the call); the list of their results.

    Forks of a process that has made no group and no engine: DeepSpeed and torch keep global state. `function` must be
    importable by name.

    Raises:
        AssertionError: a process failed; the text holds every process's stderr.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = folder / "call.pickle"
        call.write_bytes(
            pickle.dumps((os.getcwd(), function.__module__, function.__qualname__, args))
        )
        answers = [folder / f"{rank}.pickle" for rank in range(world)]
        codes = forks.fork(
            "distributed:_child", [[str(call), str(answer)] for answer in answers], folder, {}
        )
        report = "\n".join(
            f"--- rank {rank}, exit {code}\n{(folder / f'{rank}.err').read_text()}"
            for rank, code in enumerate(codes)
        )
        assert not any(codes), report
        return [pickle.loads(answer.read_bytes()) for answer in answers]


def _child(call_and_answer: list[str]) -> None:
    from mtl.distributed.engine import init_process_group

    call, answer = map(Path, call_and_answer)
    folder, module, name, args = pickle.loads(call.read_bytes())
    os.chdir(folder)
    init_process_group(timeout_minutes=2)
    answer.write_bytes(pickle.dumps(getattr(import_module(module), name)(*args)))
