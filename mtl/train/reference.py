"""What an objective asks of the starting model, once for every row. No second model is held.

The answers are kept beside the encoded rows, so that the next run, and a resumed one, read them:

    CACHE/KEY OF THE SPLIT/reference-KEY OF THE MODEL.npy   (n, m) float32, row by row
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl import process
from mtl.config.schema import Spec
from mtl.data.batches import Layout, Layouts
from mtl.data.cache import module_hash
from mtl.data.collate import Micro
from mtl.data.encode import hash_of
from mtl.data.encoded import ANSWERS, Encoded, TaskData
from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.distributed.engine import Engine, fingerprint
from mtl.losses.objective import Objective, reference_of
from mtl.output.files import flush

COLUMN = "reference"
PLACE = "name", "revision"  # where the model lies; its weights say what it is


def fill(
    engine: Engine,
    objectives: Sequence[Objective],
    specs: Sequence[Spec],
    tasks: Sequence[TaskData],
    layouts: Layouts,
    model: Mapping[str, Any],
    say: Callable[[str], None],
) -> str | None:
    """Give the rows of each objective that has a `reference` that column, float32. A collective.

    Call it while the engine holds the starting weights, before a checkpoint is loaded. The forward
    is validation's, without dropout, at every ZeRO stage. New adapters are part of the starting
    model; they change nothing yet.

    Answers in the cache of rank 0's host are read instead, and new ones are written there. They are
    keyed by the starting weights, `model`, the objective's code, and the split with its rows; by
    the objective's keywords too where its `reference` is a method, which may read them.

    Args:
        objectives: the run's; layout n of `layouts` has the rows of objective n.
        specs: what the YAML says of each.
        tasks: the streams; their splits get the column, in memory.
        model: the configuration's `model`, resolved.

    Returns:
        the fingerprint of the starting weights; None where no objective has a `reference`.

    Raises:
        Preempted: a signal has asked any rank to stop. Splits that were read stay in the cache.
    """
    asks = list(map(reference_of, objectives))
    if not any(asks):
        return None
    weights = fingerprint(engine.module)
    settings = {key: value for key, value in model.items() if key not in PLACE}
    for ask, spec, layout in zip(asks, specs, layouts.each, strict=True):
        if ask is None:
            continue
        # The objective's code too: another version may ask for something else. A method may read
        # the objective's keywords, a function cannot.
        own = [spec.model_dump()] if hasattr(ask, "__self__") else []
        key = hash_of(json.dumps([weights, settings, module_hash(ask), *own], default=repr))
        for s in range(len(tasks)) if layout.streams is None else layout.streams:
            for name in ("train", "validation"):
                splits = [getattr(task, name) for task in tasks]
                split, label = splits[s], f"{tasks[s].name} ({name})"
                path = split.folder and split.folder / ANSWERS.format(key)
                rows = len(split)
                answers = comm.on_first(lambda path=path, rows=rows: _read(path, rows, say))
                if answers is None:
                    say(f"{label}: the starting model reads {rows:,} rows")
                    with process.bar(f"{label}, starting model", rows, "row") as bar:
                        answers = _answers(engine, ask, layout, splits, s, bar.update)
                    # Rank 0 writes; the others have their own copy and read nothing back.
                    comm.on_first(lambda path=path, found=answers: _write(path, found, say))
                split.attach(COLUMN, answers)
    return weights


def _read(path: Path | None, rows: int, say: Callable[[str], None]) -> np.ndarray | None:
    """(rows, m) float32; None where there is no such file, or a damaged one."""
    if path is None or not path.exists():
        return None
    try:
        found = np.load(path, allow_pickle=False)
        if found.shape[:1] == (rows,) and found.ndim == 2 and found.dtype == np.float32:
            return found
        problem = f"found {found.dtype} {found.shape}, wanted float32 ({rows}, ...)"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error)
    say(f"{path} is damaged ({problem}): it is made again")
    return None


def _write(path: Path | None, found: np.ndarray, say: Callable[[str], None]) -> None:
    """Write the file whole or not at all. Another run may be writing the same."""
    if path is None:
        return
    # With the process's number, because another run may write the same file now.
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as file:
            np.save(file, found, allow_pickle=False)
        flush(half)
        half.replace(path)
        flush(path.parent)
    # A cache that cannot be written costs time, not the run.
    except OSError as error:
        half.unlink(missing_ok=True)
        say(f"{path} cannot be written ({error}): the next run asks the starting model again")


def _answers(
    engine: Engine,
    ask: Callable,
    layout: Layout,
    splits: Sequence[Encoded],
    s: int,
    show: Callable[[int], Any],
) -> np.ndarray:
    """(n, m) float32: the answers for all n rows of stream s, the same on every rank."""
    row = np.arange(len(splits[s]))
    found = None
    with torch.no_grad():
        for micro, batch in micro_batches(engine, layout, splits, s, row):
            # On all ranks at once: they have as many micro-batches.
            if comm.sum_(torch.tensor([float(process.stop_asked())])):
                raise process.Preempted("asked to stop while the starting model read rows")
            answers = ask(engine.evaluate, batch).double()
            show(comm.world() * sum(map(len, micro)))
            if found is None:
                shape = len(row), answers.shape[1]
                found = torch.zeros(shape, dtype=torch.float64, device=engine.device)
            # Each row is read on one rank; zeros elsewhere make the sum over ranks its answer.
            if not batch.is_dummy:
                found[[i for indices in micro for i in indices]] = answers
    return comm.sum_(found).float().cpu().numpy()


def micro_batches(
    engine: Engine, layout: Layout, splits: Sequence[Encoded], s: int, row: np.ndarray
) -> Iterator[tuple[Micro, Batch]]:
    """This rank's micro-batches of some rows of stream s, as many on every rank, for the module in
    eval mode. Beside each stands which of `row` it has.
    """
    stream = np.full(len(row), s)
    engine.eval()
    for micro, most in layout.deal(splits, stream, row):
        yield micro, layout.collate(micro, most, splits, stream, row).to(engine.device)
