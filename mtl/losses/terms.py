"""Per-task sums and counts, and the one formula that turns them into a loss.

For task k over one optimizer step (all ranks, all micro-batches), in nats per target token:

    loss_k = sum of the token losses of k / number of target tokens of k
    loss   = sum_k w_k loss_k + sum of the penalties

Where a task has no target in the whole batch, the others keep their weights: the loss is then
smaller by that task's part. Bringing the rest to the sum would give a task another weight by the
company that it happens to be drawn with, which over many batches is another weighting than the
balancer's; it has no meaning where a sum is 0 or carries meaning (uncertainty weighting). What is
left of the sum is logged (`train/present_weight`). So it is in the trainer, in `Balance` and in
`Balanced`, which all end here.

A penalty belongs to no task and no balancer weighs it: a mixture of experts' router loss, say. It
is a number of each micro-batch, not a sum over tokens, so it is averaged over micro-batches by
their target tokens, and, unlike the tasks' losses, it depends on how the global batch was cut.
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
        measures: by name, (K, m), what validation adds up for `objective.Measure`; an objective
            gives the same names in every micro-batch. Training ignores them.
    """

    sums: Tensor
    counts: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Tensor] = field(default_factory=dict)

    def silenced(self) -> "Terms":
        """The same forward, counting nothing: of a batch that stands in for examples not there."""
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
            penalties: as the attribute; none where absent.
        """
        mine = task == torch.arange(k, device=task.device)[:, None]
        # A masked sum, not index_add: its order of addition is fixed on a GPU too, and one task's
        # NaN stays its own.
        return cls(torch.where(mine, losses, 0.0).sum(1), mine.sum(1), penalties or {})


def combine(terms: Terms, weights: Tensor, counts: Tensor, world: int) -> Tensor:
    """This micro-batch's part of the global loss, a scalar: world * (sum_k w_k * sums_k / counts_k
    + share * penalties), where share is its part of all target tokens.

    Summed over micro-batches and *averaged* over ranks (data parallelism averages gradients, hence
    `world`) the parts give `sum_k w_k loss_k` exactly, however the global batch was cut. Tasks
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
    share = world * mine / counts.sum()
    return loss + sum(
        share.to(penalty) * torch.where(mine > 0, penalty, 0.0)
        for penalty in terms.penalties.values()
    )
