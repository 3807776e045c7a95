"""Per-task sums and counts, and the one formula that turns them into a loss.

For task k over one optimizer step (all ranks, all micro-batches), in nats per target token:

    loss_k = sum of the token losses of k / number of target tokens of k
    loss   = sum_k w_k loss_k
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """What one micro-batch on one rank contributes to the tasks' losses.

    Attributes:
        sums: (K,) float32, differentiable; summed token losses per task, in nats.
        counts: (K,) int64; target tokens per task.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def by_task(cls, losses: Tensor, task: Tensor, k: int) -> "Terms":
        """Group token losses by task.

        Args:
            losses: (T,) float32, nats per token.
            task: (T,) int64, each token's task.
            k: number of tasks.
        """
        mine = task == torch.arange(k, device=task.device)[:, None]
        # A masked sum, not index_add: its order of addition is fixed on a GPU too, and one task's NaN stays its own.
        return cls(torch.where(mine, losses, 0.0).sum(1), mine.sum(1))


def combine(terms: Terms, weights: Tensor, counts: Tensor, world: int) -> Tensor:
    """This micro-batch's part of the global loss, a scalar: world * sum_k w_k * sums_k / counts_k.

    Summed over micro-batches and *averaged* over ranks (data parallelism averages gradients, hence `world`) the parts give
    `sum_k w_k loss_k` exactly, however the global batch was cut. Tasks absent from the whole batch contribute nothing.

    Args:
        terms: the micro-batch's terms.
        weights: (K,) float64.
        counts: (K,) int64, target tokens per task of the WHOLE global batch.
        world: number of data-parallel ranks.
    """
    scale = torch.where(counts > 0, world * weights / counts.clamp(min=1), 0.0)
    # where, not a product: an absent task's weight may not turn 0 into NaN.
    return (terms.sums * scale.to(terms.sums)).sum()
