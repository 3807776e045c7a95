"""Per-task validation losses: the full pass, and the small probe a balancer reads.

Each task's validation rows are divided once into G groups of whole examples, and what is left over.
Probe p reads group p mod G of every task. The full pass reads everything. So the full pass at step
0 gives each group's initial loss, and slopes can be fitted within groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mtl import process
from mtl.data.batches import ValidationGroups
from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.losses.objective import Measure, Objective
from mtl.train.step import GlobalBatch

# Micro-batches that are made before their forwards. The ranks then agree that none failed; all of a
# pass need not fit in memory.
AT_ONCE = 64


def bad_losses(names: Sequence[str], losses: np.ndarray, read: np.ndarray) -> str:
    """The tasks that were read and have no finite loss, such as "copy (nan)"; empty: none.

    Args:
        losses, read: (K,) float64 and bool. A task without a target has nan and was not read.
    """
    found = zip(names, losses, read & ~np.isfinite(losses), strict=True)
    return ", ".join(f"{name} ({loss})" for name, loss, is_bad in found if is_bad)


def not_finite(step: int, bad: str) -> ValueError:
    """The error of a pass or probe before update `step`, with what `bad_losses` found."""
    return ValueError(
        f"validation at step {step}: the loss of {bad} is not finite. Look at the validation rows, "
        "or lower optimizer.lr; --resume goes on from the newest checkpoint."
    )


@dataclass(frozen=True)
class ValidationResult:
    """What a pass over validation rows found, over all ranks.

    Attributes:
        sums: (K, parts of the validation rows) float64, summed losses in nats.
        tokens: of the same shape, the counts they are divided by: target tokens, or examples.
        measures: name -> (K, m) float64, what the objective added up.
    """

    sums: np.ndarray
    tokens: np.ndarray
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def losses(self) -> np.ndarray:
        """(K,) nats per target token of each task."""
        return self.sums.sum(1) / self.tokens.sum(1)

    def group(self, g: int) -> np.ndarray:
        """(K,) nats per target token of each task's group g; nan where the group has no target."""
        with np.errstate(invalid="ignore"):
            return self.sums[:, g] / self.tokens[:, g]

    def summary(self, names: Sequence[str]) -> dict[str, float]:
        """The losses that may judge a run: each task's, their mean, the token mean, the worst. Also
        the mean of their logarithms, where all are above 0.
        """
        losses = self.losses
        return {
            # First: RESERVED keeps tasks' names off the words below, or they would overwrite one.
            **dict(zip(names, losses.tolist(), strict=True)),
            "macro": float(losses.mean()),
            "token": float(self.sums.sum() / self.tokens.sum()),
            "worst": float(losses.max()),
            **({"log": float(np.log(losses).mean())} if (losses > 0).all() else {}),
        }

    def measured(self, names: Sequence[str], kinds: Mapping[str, Measure]) -> dict[str, float]:
        """`task/name` of every measure a task has, and `name`: its mean over these tasks."""
        found: dict[str, float] = {}
        for name, sums in self.measures.items():
            each = {task: kinds[name].value(row) for task, row in zip(names, sums, strict=True)}
            each = {task: value for task, value in each.items() if not np.isnan(value)}
            found |= {f"{task}/{name}": value for task, value in each.items()}
            if each:
                found[name] = float(np.mean(list(each.values())))
        return found


def full_pass(
    engine: Engine, objective: Objective, validation: ValidationGroups, k: int
) -> ValidationResult:
    """Every validation example once. A collective; every rank runs the same number of forwards."""
    return _pass(engine, objective, validation, range(validation.parts), k)


def probe(
    engine: Engine, objective: Objective, validation: ValidationGroups, group: int, k: int
) -> np.ndarray:
    """(K,) validation losses of one group, nats per target token; nan where a task has no target in
    it. A collective.
    """
    return _pass(engine, objective, validation, [group], k).group(0)


def _pass(
    engine: Engine,
    objective: Objective,
    validation: ValidationGroups,
    groups: Sequence[int],
    k: int,
) -> ValidationResult:
    # float64: thousands of fp32 sums are added up here.
    totals = torch.zeros(2, k, len(groups), dtype=torch.float64, device=engine.device)
    measures: dict[str, Tensor] = {}
    engine.eval()
    rows = [sum(map(len, validation.rows(group))) for group in groups]
    with torch.no_grad(), process.bar("validation", sum(rows), "row") as bar:
        for column, group in enumerate(groups):
            coming = validation.group(group)
            some: list[Batch] | None = None
            # All ranks have as many micro-batches, so all make as many rounds of `together`.
            while some is None or len(some) == AT_ONCE:
                # Called at once, so the loop's `coming` is right.
                some = comm.together(lambda: list(islice(coming, AT_ONCE)))  # noqa: B023
                for micro in some:
                    terms = objective(engine.evaluate, micro.to(engine.device), k)
                    totals[0, :, column] += terms.sums
                    totals[1, :, column] += terms.counts
                    for name, sums in terms.measures.items():
                        measures[name] = measures.get(name, 0.0) + sums.double()
                    bar.update(rows[column] / validation.forwards(group))
    sums, tokens = comm.sum_(totals).cpu().numpy()
    # Sorted, since every rank must sum the same name at the same time.
    added = {name: comm.sum_(measures[name]).cpu().numpy() for name in sorted(measures)}
    return ValidationResult(sums, tokens, added)


def replay(engine: Engine, objective: Objective, batch: GlobalBatch, k: int) -> np.ndarray:
    """(K,) losses of a training batch once more, nats per target token; nan = absent. A collective.

    It runs in training mode with the random state that the update began with. So dropout hides the
    same units again.
    """
    sums = torch.zeros(k, dtype=torch.float64, device=engine.device)
    engine.train()
    with torch.no_grad():
        for micro in batch.micros:
            sums += objective(engine.evaluate, micro.to(engine.device), k).sums
    # 0 / 0 is the nan of an absent task.
    return (comm.sum_(sums).cpu() / batch.tokens).numpy()
