"""What an objective asks of the starting model, once for every row. No second model is held."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mtl.data.batches import Layout, Layouts
from mtl.data.collate import Micro
from mtl.data.encoded import Encoded, TaskData
from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.losses.objective import Objective, reference_of

COLUMN = "reference"


def fill(
    engine: Engine,
    objectives: Sequence[Objective],
    tasks: Sequence[TaskData],
    layouts: Layouts,
    say: Callable[[str], None],
) -> None:
    """Give the rows of each objective that has a `reference` that column, float32. A collective.

    Call it while the engine holds the starting weights, before a checkpoint is loaded. Then a
    resumed run with as many processes finds the same numbers, bit for bit. The forward is
    validation's, without dropout, at every ZeRO stage. New adapters are part of the starting model.

    Args:
        objectives: the run's; layout n of `layouts` has the rows of objective n.
        tasks: the streams; their splits get the column, in memory.
    """
    for objective, layout in zip(objectives, layouts.each, strict=True):
        ask = reference_of(objective)
        if ask is None:
            continue
        for s in range(len(tasks)) if layout.streams is None else layout.streams:
            for split in ("train", "validation"):
                splits = [getattr(task, split) for task in tasks]
                say(f"{tasks[s].name} ({split}): the starting model reads {len(splits[s]):,} rows")
                splits[s].attach(COLUMN, _answers(engine, ask, layout, splits, s))


def _answers(
    engine: Engine, ask: Callable, layout: Layout, splits: Sequence[Encoded], s: int
) -> np.ndarray:
    """(n, m) float32: the answers for all n rows of stream s, the same on every rank."""
    row = np.arange(len(splits[s]))
    found = None
    with torch.no_grad():
        for micro, batch in micro_batches(engine, layout, splits, s, row):
            answers = ask(engine.evaluate, batch).double()
            if found is None:
                shape = len(row), answers.shape[1]
                found = torch.zeros(shape, dtype=torch.float64, device=engine.device)
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
