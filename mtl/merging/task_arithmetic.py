"""Task arithmetic: add the task vectors up."""

from collections.abc import Sequence

from torch import Tensor

from mtl.merging.piece import TensorPiece, factors


def task_arithmetic(
    piece: TensorPiece, *, scale: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """(...) `theta = theta_0 + scale * sum_i w_i delta_i`.

    Args:
        scale: lambda of the paper.
        weights: K, used as they are; None: 1 each. Negative ones subtract.

    Source: Ilharco et al., ICLR 2023 (arXiv 2212.04089), section 2.
    """
    return piece.mix([scale * w for w in factors(weights, piece.k, 1.0)])
