"""TIES: trim small entries, elect a sign for each coordinate, average what agrees with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.merging.piece import MergeError, TensorPiece, factors, shares


def ties(
    piece: TensorPiece,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """(...) `theta = theta_0 + scale * weighted mean of the kept deltas whose sign was elected`.

    Trim: of each delta the `density` largest entries stay. Elect: the sign of their weighted sum.
    Merge: the weighted mean over the sub-models that kept an entry of this sign.

    Args:
        density: fraction of entries kept, in (0, 1]; the paper keeps a fifth.
        scale: lambda of the paper.
        weights: K, >= 0, not all 0; None: 1 each.

    Source: Yadav et al., NeurIPS 2023 (arXiv 2306.01708), algorithm 1. It trims over the whole
    task vector; we trim tensor by tensor, as we stream (mergekit does too).
    """
    if not 0 < density <= 1:
        raise MergeError(f"density: found {density}, wanted a fraction above 0, at most 1.")
    if weights is not None:
        shares(weights, piece.k)  # refuses those that are negative, or all 0
    w = piece.deltas.new_tensor(factors(weights, piece.k, 1.0))
    flat = piece.flat
    # At least one entry, or small tensors would stay the base's.
    keep = max(1, int(density * flat.shape[1])) if flat.shape[1] else 0
    kept = torch.zeros_like(flat)
    largest = flat.abs().topk(keep, dim=1, sorted=False).indices
    kept.scatter_(1, largest, flat.gather(1, largest)).mul_(w[:, None])
    agrees = (kept != 0) & (kept.sign() == kept.sum(0).sign())
    total = torch.where(agrees, kept, 0).sum(0)
    share = (agrees * w[:, None]).sum(0)
    # Inner where: no division by 0 where nobody agrees.
    merged = torch.where(share > 0, total / share.where(share > 0, 1), 0)
    return piece.base.to(piece.wide) + scale * merged.view(piece.base.shape)
