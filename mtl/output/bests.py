"""Every task's best model of a run, and the best single one, weights only: `bests/step-00000040`
in its folder.

Which task names which step stands in the state (`RunState.bests`, `RunState.single`), and so in
every checkpoint's `state.json`. Those that share a step share a folder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.models.save import save
from mtl.output import manifest
from mtl.output.files import flush
from mtl.output.state import RunState

BEST = "best"  # the kind of folder that the mark names


def observe(state: RunState, names: Sequence[str], losses: np.ndarray) -> list[str]:
    """Take the (K,) losses of a full pass into `state`. Returns the tasks that are at their best.

    A task's best may be the model at step 0. That is the base model, and no folder is kept of it.
    """
    before = state.bests or {}
    better = {
        name: {"step": state.step, "value": float(loss)}
        for name, loss in zip(names, losses, strict=True)
        # Not <=: the first of equals stays, and no folder is written again.
        if name not in before or loss < before[name]["value"]
    }
    state.bests = before | better
    return list(better)


def named(state: RunState) -> set[str]:
    """The folders that a state names."""
    return folders_of(state.bests, state.single)


def folders_of(bests: dict[str, Any] | None, single: dict[str, Any] | None) -> set[str]:
    """The folders of a state's `bests` and `single`; of step 0 there is none."""
    found = [*(bests or {}).values(), *([single] if single else [])]
    # Step 0 is the model that the run began with.
    return {folder_name(step) for step in {int(best["step"]) for best in found} - {0}}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def half(target: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return target.with_name(f".{target.name}.tmp")


def folders(folder: Path) -> list[Path]:
    """What stands in `bests`, half-written folders among them."""
    return sorted([*folder.glob("step-*"), *folder.glob(".step-*.tmp")])


def write(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    step: int,
    loader: tuple[str, dict[str, Any]] | None = None,
) -> None:
    """Write the model, or its adapter, as the best of step `step`: whole or not at all. A
    collective.

    Args:
        folder: `bests` of the run.
        loader: as `save` takes it.
    """
    target = folder / folder_name(step)
    temporary = half(target)

    def begin() -> None:
        if comm.rank() == 0:
            manifest.discard(temporary, BEST)
            manifest.mark(temporary, BEST)

    def end() -> None:
        if comm.rank() == 0:
            # Of a run that was killed after it: the checkpoint it goes on from does not name it.
            manifest.discard(target, BEST)
            temporary.rename(target)
            flush(folder)

    comm.together(begin)
    save(engine, tokenizer, temporary, loader)
    manifest.seal_together(temporary)
    comm.together(end)


def prune(folder: Path, kept: Iterable[str]) -> None:
    """Remove every folder of ours that is not named, and what a killed run left half. One that
    holds a file of somebody else's stays. On rank 0.
    """
    wanted = set(kept)
    for path in folders(folder):
        is_ours = manifest.is_ours(path, BEST) and not manifest.strangers(path)
        if is_ours and path.name not in wanted:
            manifest.discard(path, BEST)
