"""Per-task sums and counts, and the one formula that turns them into a loss.

For task k over one optimizer step (all ranks, all micro-batches), in nats per target token:

    loss_k = sum of the token losses of k / number of target tokens of k
    loss   = sum_k w_k loss_k + sum of the penalties

Where a task has no target in the whole batch, the others keep their weights. The loss is then
smaller by that task's part. We do not rescale the rest to the same sum: a task's weight would
depend on the tasks it happens to be drawn with. Over many batches that is not the balancer's
weighting. Nor can a sum be restored that is 0 or carries meaning (uncertainty weighting).
`train/present_weight` logs what is left of the sum. The trainer, `Balance` and `Balanced` all end
here.

A penalty belongs to no task, and no balancer weighs it: a mixture of experts' router loss, say. It
is a number of each micro-batch, not a sum over tokens. So we average it over micro-batches,
weighted by their target tokens. Unlike the tasks' losses, it depends on how the global batch is
divided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """What one micro-batch on one rank contributes to the tasks' losses.

    Attributes:
        sums: (K,) float32, differentiable; summed losses per task, in nats.
        counts: (K,) int64; what each is divided by: target tokens, examples or pairs.
        penalties: by name, scalars, differentiable, each times its coefficient.
        measures: by name, (K, m), what validation adds up for `objective.Measure`. An objective
            gives the same names in every micro-batch. Training ignores them.
    """

    sums: Tensor
    counts: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Tensor] = field(default_factory=dict)

    def silenced(self) -> "Terms":
        """The terms of a stand-in batch: the same forward, which counts nothing."""
        # Times 0, not zeros: the graph stays, so backward reaches every parameter on every rank.
        penalties = {name: penalty * 0 for name, penalty in self.penalties.items()}
        measures = {name: sums * 0 for name, sums in self.measures.items()}
        return Terms(self.sums * 0, self.counts * 0, penalties, measures)

    @classmethod
    def by_task(
        cls, losses: Tensor, task: Tensor, k: int, penalties: Mapping[str, Tensor] | None = None
    ) -> "Terms":
        """Group token losses by task.

        Args:
            losses: (T,) float32, nats per token.
            task: (T,) int64, each token's task.
            k: number of tasks.
            penalties: the attribute; None: no penalties.
        """
        mine = task == torch.arange(k, device=task.device)[:, None]
        # We use masked sums, not index_add: their order is fixed on a GPU too, and one task's NaN
        # stays its own.
        return cls(torch.where(mine, losses, 0.0).sum(1), mine.sum(1), penalties or {})


def combine(terms: Terms, weights: Tensor, counts: Tensor, world: int) -> Tensor:
    """This micro-batch's part of the global loss, a scalar.

        world * (sum_k w_k * sums_k / counts_k + share * penalties)   share: its part of all targets

    Summed over micro-batches and *averaged* over ranks, the parts give `sum_k w_k loss_k` exactly,
    however the global batch is divided. Data parallelism averages gradients, hence `world`. Tasks
    absent from the whole batch contribute nothing.

    Args:
        terms: the micro-batch's terms.
        weights: (K,) float64.
        counts: (K,) int64, target tokens per task of the WHOLE global batch.
        world: number of data-parallel ranks.
    """
    scale = torch.where(counts > 0, world * weights / counts.clamp(min=1), 0.0)
    # where, not a product: an absent task's weight may not turn 0 into NaN.
    loss = (terms.sums * scale.to(terms.sums)).sum()
    mine = terms.counts.sum()
    # `world`, as for the losses: data parallelism averages over ranks.
    share = world * mine / counts.sum()
    return loss + sum(
        share.to(penalty) * torch.where(mine > 0, penalty, 0.0)
        for penalty in terms.penalties.values()
    )
