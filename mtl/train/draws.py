"""Which tasks the batches are drawn from: rounds that follow the balancer, and go around tasks that
are done.

In rounds of `mix.every` steps each task's share of the draws is its weight at the round's start.
The loss is then a plain mean over the batch's examples, each the mean over its task's tokens:
sampling has less variance than weighting (Li et al. 2024, arXiv 2410.04579), and no row is computed
that hardly counts.
"""

import numpy as np

from mtl.data.mix import GRID, Round, on_grid
from mtl.output.state import RunState
from mtl.train.patience import hold
from mtl.train.run import Run

FLOOR = 0.25  # of an equal share: less, and a task's own loss hears too little of it to come back


def plan(run: Run, state: RunState) -> None:
    """Begin the next round of draws where one is due at `state.step`, and let the batches know.

    Every rank finds the same, as it reads the config and the state alone.
    """
    mix, now = run.batches.mix, present(run, state)
    # A round that begins at this step is planned already: at the start, or before a resume.
    parts = None if state.step == now.start else _parts(run, state, now)
    if parts is not None:
        now = mix.next(now, state.step, parts)
        state.round_start = now.start
        state.shares, state.drawn, state.owed = map(np.array, (now.shares, now.drawn, now.owed))
    seams = _seams(run)
    run.batches.begin(now, min((state.step // n + 1) * n for n in seams) if seams else None)


def present(run: Run, state: RunState) -> Round:
    """The round that the state is in."""
    if state.shares is None:
        return run.batches.mix.first
    arrays = state.shares, state.drawn, state.owed
    shares, drawn, owed = (tuple(one.tolist()) for one in arrays)
    return Round(shares, state.round_start, drawn, owed)


def loss_weights(run: Run, state: RunState) -> np.ndarray:
    """(K,) float64, what each task's loss counts in batch `state.step`: its weight; where draws
    follow weights, its part of the examples.
    """
    follows = run.config.mix.follow is not None
    return run.batches.parts(state.step) if follows else state.weights


def values(run: Run, state: RunState) -> dict[str, float]:
    """What is logged of batch `state.step`. Nothing where whole batches change places: which rows
    a batch has is then known at the ends of windows only.
    """
    mix, now, t = run.batches.mix, present(run, state), state.step
    if mix.order is not None and mix.order.scheme == "batch":
        return {}
    drawn = mix.drawn(t + 1, now)
    actual = (drawn - mix.drawn(t, now)) / mix.examples
    found = {"planned": now.parts, "actual": actual, "epoch": drawn / mix.sizes}
    found |= {"weight": state.weights} if run.config.mix.follow is not None else {}
    return {
        f"draws/{name}/{what}": float(value)
        for what, array in found.items()
        for name, value in zip(run.batches.mix.names, array, strict=True)
    }


def _seams(run: Run) -> list[int]:
    """Of which numbers of steps the multiples begin a round, where draws follow the balancer."""
    config = run.config
    if config.mix.follow is None:
        return []
    # At a pass a task may be held or come back, and its draws change with that.
    acts = run.patience is not None and run.patience.action != "log"
    return [config.mix.every, *[config.evaluate.every] * acts]


def _parts(run: Run, state: RunState, now: Round) -> np.ndarray | None:
    """(S,) parts of the draws in the round that begins here; None: none does."""
    given, mix, k = run.config.mix, run.batches.mix, len(run.names)
    if given.follow is not None:
        if all(state.step % n for n in _seams(run)):
            return None
        held = np.full(k, np.nan) if state.held is None else state.held
        floor = FLOOR / k if given.floor is None else given.floor
        # Never 0: a task that is left out now and again could be owed any number of draws.
        return hold(held, np.maximum(state.weights, max(floor, 1 / GRID)))
    if run.patience is None or state.held is None:
        return None
    kept = run.patience.kept(state)
    each = [[i for i in range(k) if s in run.book.reads(i)] for s in range(len(mix.names))]
    # A row is drawn as often as the neediest of its losses wants it.
    kept = np.array([max(kept[i] for i in readers) for readers in each])
    parts = hold(np.where(kept < 1, kept * mix.shares, np.nan), mix.shares)
    # The shares are what they were: no new round.
    return None if on_grid(parts) == on_grid(now.parts) else parts
