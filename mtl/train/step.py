"""One optimizer update. Everything else exists for this function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.losses.objective import Objective
from mtl.losses.terms import combine


class NonFinite(ValueError):
    """A loss or the gradient is not finite, on every rank; nothing was updated.

    Attributes:
        what: "the loss of copy (nan) is not finite", say.
        tasks: the tasks it concerns; empty: not known.
    """

    def __init__(self, what: str, tasks: Sequence[str] = ()):
        super().__init__(f"{what}. The parameters were not updated. {_ADVICE}")
        self.what, self.tasks = what, tuple(tasks)


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's part of a global batch, and what every rank knows of the whole.

    Attributes:
        micros: this rank's micro-batches, at least one and the same number on every rank.
        tokens: (K,) int64, target tokens per task over all ranks and micro-batches.
        positions: token positions computed over all ranks, padding included.
    """

    micros: list[Batch]
    tokens: Tensor
    positions: int


@dataclass(frozen=True)
class StepReport:
    """What one update measured, the same on every rank.

    Attributes:
        losses: (K,) float64, nats per target token over the global batch; nan where the task is
            absent.
        grad_norm: global gradient norm before clipping.
        penalties: what the loss holds beside the tasks' losses, by name.
    """

    losses: np.ndarray
    grad_norm: float
    penalties: dict[str, float]


def fetch(micros: Callable[[], list[Batch]], k: int) -> GlobalBatch:
    """Make this rank's micro-batches, check that every rank could, and count target tokens. A
    collective.
    """
    mine = comm.together(micros)
    count = torch.stack([micro.counts(k) for micro in mine]).sum(0)
    positions = torch.tensor([sum(micro.positions for micro in mine)])
    tokens, positions = comm.sum_(torch.cat([count, positions])).split([k, 1])
    return GlobalBatch(mine, tokens, int(positions))


def train_step(
    engine: Engine,
    objective: Objective,
    batch: GlobalBatch,
    weights: np.ndarray,
    lr: float,
    names: list[str],
) -> StepReport:
    """Update the parameters once. A collective.

    The loss is sum_k w_k * (summed losses of k) / (count of k), sums and counts over all ranks and
    micro-batches. So the update does not depend on how the global batch is divided.

    Args:
        engine: the model and its optimizer.
        objective: from a micro-batch to per-task terms.
        batch: this rank's part of the global batch.
        weights: (K,) float64, the tasks' weights for the whole global batch, alike on every rank.
        lr: this update's learning rate.
        names: the K tasks' names, for errors.

    Raises:
        NonFinite: on every rank: a loss or the gradient is not finite. The parameters stay as they
            were.
        ValueError: on every rank: an objective's counts differ from those that its batch announced.
    """
    k, last = len(names), len(batch.micros) - 1
    tokens, weights = batch.tokens.to(engine.device), torch.as_tensor(weights).to(engine.device)
    totals = torch.zeros(2, k, dtype=torch.float64, device=engine.device)  # sums, counts
    penalties: dict[str, Tensor] = {}
    engine.train()
    for i, micro in enumerate(batch.micros):
        terms = objective(engine.forward, micro.to(engine.device), k)
        engine.backward(combine(terms, weights, tokens, engine.world), last=i == last)
        totals += torch.stack([terms.sums.detach().double(), terms.counts.double()])
        count = terms.counts.sum()
        for name, penalty in terms.penalties.items():
            mine = torch.where(count > 0, penalty.detach() * count, 0.0).double()
            penalties[name] = penalties.get(name, 0.0) + mine
    penalties = dict(sorted(penalties.items()))  # every rank must sum the same name at one place
    flat = torch.cat([totals.flatten(), *(value[None] for value in penalties.values())])
    found = comm.sum_(flat).cpu()
    _agree(found[k : 2 * k], batch.tokens, names)
    losses = (found[:k] / batch.tokens).numpy()  # 0/0 = nan: absent
    means = (found[2 * k :] / batch.tokens.sum()).tolist()
    penalized = dict(zip(penalties, means, strict=True))

    # Lists, not mappings by name: a task may be called as a penalty is.
    seen = [(n, x) for n, x, c in zip(names, losses, batch.tokens, strict=True) if c]
    bad = [f"{n} ({x})" for n, x in (*seen, *penalized.items()) if not np.isfinite(x)]
    grad_norm = engine.step(lr, drop=bool(bad))
    if bad:
        tasks = [n for n, x in seen if not np.isfinite(x)]
        raise NonFinite(f"the loss of {', '.join(bad)} is not finite", tasks)
    if not np.isfinite(grad_norm):
        raise NonFinite(f"the gradient norm is {grad_norm}")
    return StepReport(losses, grad_norm, penalized)


def _agree(counted: Tensor, announced: Tensor, names: list[str]) -> None:
    """Check that the objective counted what the batches announced, which divided the sums."""
    for name, found, wanted in zip(names, counted.tolist(), announced.tolist(), strict=True):
        if found != wanted:
            raise ValueError(
                f"{name}: the objective counted {found:,.0f}, its batches announced {wanted:,}. "
                "Let Terms.counts and the batch's counts(k) agree. The parameters were not updated."
            )


_ADVICE = (
    "Lower optimizer.lr, or look at the rows of this step; --resume continues from the last "
    "checkpoint. train.not_finite may pass over such batches."
)
