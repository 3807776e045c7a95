"""What several methods need."""

import numpy as np
from numpy.typing import NDArray

from balancers.protocol import Array


def softmax(logit: Array, where: NDArray[np.bool_] | bool = True) -> Array:
    """softmax of (K,) over the entries ``where``; the others are nan. Rising logits never overflow."""
    where = np.broadcast_to(where, logit.shape)
    exp = np.exp(logit - np.max(logit, initial=-np.inf, where=where), out=np.full_like(logit, np.nan), where=where)
    return exp / np.nansum(exp)


def positive(what: str, value: float) -> float:
    """``value`` if it is a finite number > 0; a ValueError that begins with ``what`` if it is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{what}: found {value!r}, wanted a finite number > 0")
    return value
