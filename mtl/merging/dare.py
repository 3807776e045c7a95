"""DARE: drop a random part of each delta and rescale the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.merging.piece import MergeError, TensorPiece, shares


def dare(
    piece: TensorPiece,
    *,
    drop: float = 0.5,
    rescale: bool = True,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """(...) `theta = theta_0 + scale * sum_i w_i m_i delta_i / (1 - drop)`.

    m_i keeps each entry with probability 1 - drop, for each sub-model by itself. The expectation is
    that of `average`.

    Args:
        drop: probability that an entry is dropped, in [0, 1).
        rescale: whether what stays is divided by 1 - drop.
        scale: factor on the merged delta.
        weights: K, brought to sum 1; None: equal.

    Source: Yu et al., ICML 2024 (arXiv 2311.03099), equations 1 to 3.
    """
    if not 0 <= drop < 1:
        raise MergeError(f"drop: found {drop}, wanted a probability below 1.")
    # copy: `total` is added to, and `to` may give the base itself.
    random, total = piece.generator(), piece.base.to(piece.wide, copy=True)
    for w, model in zip(shares(weights, piece.k), piece.models, strict=True):
        kept = torch.rand(piece.base.shape, generator=random) >= drop
        delta = model.to(piece.wide) - piece.base.to(piece.wide)
        total += kept * delta * (scale * w / (1 - drop if rescale else 1))
    return total
