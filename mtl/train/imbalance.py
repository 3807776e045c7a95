"""What the order of training rows leaves behind: how a row's last loss depends on its place in the
first epoch.

The question is that of Ju et al. (2024, arXiv 2410.03743).

    z_m(i) = l_m(i) - mean over runs of l(i)

Rows differ in difficulty much more than by their place. So we subtract the mean over runs that had
the row in other places. Runs are replicas of an order (`train.order`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtl.data.batches import Layout
from mtl.data.encoded import Encoded
from mtl.data.mix import Mix
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.losses.objective import Objective

AT_ONCE = 512  # rows: each counts as a task of its own in their micro-batches


@dataclass(frozen=True)
class Imbalance:
    """How a loss depends on the place in the first epoch.

    Attributes:
        curve: (B,) mean of z in each of B equal parts of the epoch, nats per target token.
        spearman: rank correlation of z and place.
        spread: (highest - lowest of the curve) / mean loss.
        interval: 95 % of `spread` over bootstrap samples of rows. Chance alone lifts it above 0:
            compare with shuffled places.
    """

    curve: np.ndarray
    spearman: float
    spread: float
    interval: tuple[float, float]


def places(mix: Mix, steps: int) -> list[np.ndarray]:
    """Per task (n_k,) float64: the place of a row's first draw in the task's epoch, 0 .. 1. It is
    nan for a row that the run never draws.
    """
    found = [np.full(n, np.nan) for n in mix.sizes]
    drawn = np.zeros(len(mix.sizes), dtype=np.int64)
    for step in range(steps):
        # A row's first draw counts; later epochs draw it again.
        for k, row in zip(*map(np.ndarray.tolist, mix.batch(step)), strict=True):
            if np.isnan(found[k][row]):
                found[k][row] = drawn[k] / mix.sizes[k]
                drawn[k] += 1
        if (drawn == mix.sizes).all():
            break
    return found


def row_losses(engine: Engine, objective: Objective, split: Encoded, layout: Layout) -> np.ndarray:
    """(n,) nats per target token of each row by itself; nan without a target. A collective."""
    losses = np.full(len(split), np.nan)
    engine.eval()
    for start in range(0, len(split), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(split)))
        own, k = np.arange(len(rows)), len(rows)  # a row's number is its task
        splits = [split] * k
        totals = torch.zeros(2, k, dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for micro in layout.deal(splits, own, rows):
                made = layout.collate(*micro, splits, own, rows).to(engine.device)
                terms = objective(engine.evaluate, made, k)
                totals[0] += terms.sums
                totals[1] += terms.counts
        sums, counts = comm.sum_(totals).cpu().numpy()
        with np.errstate(invalid="ignore"):
            losses[rows] = sums / counts
    return losses


def measure(
    losses: Sequence[np.ndarray],
    place: Sequence[np.ndarray],
    centre: np.ndarray | None = None,
    *,
    parts: int = 8,
    samples: int = 1000,
    seed: int = 0,
) -> Imbalance:
    """The imbalance of M runs, or of a model merged from them.

    Args:
        losses: M arrays (n,), nats per target token of the same rows.
        place: M arrays (n,), from `places`; rows with a nan are left out.
        centre: (n,) what is subtracted from each row; None: the mean over the M runs. For a merged
            model (M = 1), give the mean over the runs it is made of, and the places of one of them.
        parts: B, of the epoch.
        samples: of the bootstrap, which draws rows and keeps each row's runs together.

    Raises:
        ValueError: there is one run and no `centre`.
    """
    given, where = np.array(losses), np.array(place)
    if centre is None and len(given) < 2:
        raise ValueError("found one run, wanted several replicas, or the mean loss of each row.")
    good = ~(np.isnan(given) | np.isnan(where)).any(0)
    given, where = given[:, good], where[:, good]
    z = given - (given.mean(0) if centre is None else np.asarray(centre)[good])
    # A place of 1.0 belongs to the last part.
    part = np.minimum((where * parts).astype(int), parts - 1)

    def curve(rows: np.ndarray) -> np.ndarray:
        chosen, values = part[:, rows].ravel(), z[:, rows].ravel()
        count = np.bincount(chosen, minlength=parts)
        with np.errstate(invalid="ignore"):
            return np.bincount(chosen, values, minlength=parts) / count

    def spread(rows: np.ndarray) -> float:
        # A bootstrap sample may leave a part empty: nan, which nanmax passes over.
        found = curve(rows)
        return float((np.nanmax(found) - np.nanmin(found)) / given[:, rows].mean())

    rng, n = np.random.default_rng(seed), given.shape[1]
    drawn = [spread(rng.integers(0, n, n)) for _ in range(samples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    everything = np.arange(n)
    spearman = float(np.corrcoef(_ranks(where.ravel()), _ranks(z.ravel()))[0, 1])
    return Imbalance(curve(everything), spearman, spread(everything), (float(low), float(high)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    # Equal values have the ranks last - count to last - 1; this is their mean.
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[which]
