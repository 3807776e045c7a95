"""Model Stock: how far to go from the base to the average, from the angle between the deltas."""

import torch
from torch import Tensor

from mtl.merging.piece import TensorPiece, shares


def model_stock(piece: TensorPiece) -> Tensor:
    """(...) `theta = theta_0 + t * mean delta` with `t = K cos / (1 + (K - 1) cos)`, tensor by
    tensor.

    `cos` is the mean cosine of the K (K - 1) / 2 pairs of deltas, at least 0; with K = 1 t is 1.

    Source: Jang et al., ECCV 2024 (arXiv 2403.19522), equation 4 and its form for K models.
    """
    flat, k = piece.flat, piece.k
    # A sub-model that is the base here has length 0: its cosines are 0, not nan.
    norms = flat.norm(dim=1).clamp_min(torch.finfo(flat.dtype).tiny)
    cosines = (flat @ flat.T) / norms[:, None] / norms
    # Off the diagonal each pair stands twice, so there are K (K - 1) entries.
    cosine = 1.0 if k == 1 else max(0.0, float((cosines.sum() - cosines.trace()) / (k * (k - 1))))
    t = k * cosine / (1 + (k - 1) * cosine)
    return piece.mix([t * w for w in shares(None, k)])
