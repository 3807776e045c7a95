"""The average: `theta = sum_i w_i theta_i`."""

from collections.abc import Sequence

from torch import Tensor

from mtl.merging.piece import TensorPiece, shares


def average(piece: TensorPiece, *, weights: Sequence[float] | None = None) -> Tensor:
    """(...) the weighted mean of the sub-models.

    Args:
        weights: K, brought to sum 1; None: equal.

    Source: model soups, Wortsman et al., ICML 2022 (arXiv 2203.05482), the uniform soup.
    """
    return piece.mix(shares(weights, piece.k))
