"""The average at full length: its delta is as long as the sub-models' are on average."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.merging.piece import TensorPiece, shares


def average_norm(piece: TensorPiece, *, weights: Sequence[float] | None = None) -> Tensor:
    """(...) the base and the mean delta, rescaled to the weighted mean of the deltas' norms.

    With `m = sum_i w_i delta_i`: `theta = theta_0 + m * sum_i w_i |delta_i| / |m|`, tensor by
    tensor. The control for `select`, which keeps the length: a gain over `average` alone may be
    the length's.

    Args:
        weights: K, brought to sum 1; None: equal.
    """
    w = piece.deltas.new_tensor(shares(weights, piece.k))
    mean = torch.tensordot(w, piece.deltas, dims=1)
    wanted, has = w @ piece.flat.norm(dim=1), mean.norm()
    # Deltas that cancel out have no direction to lengthen.
    return piece.base.to(piece.wide) + (mean * (wanted / has) if has > 0 else mean)
