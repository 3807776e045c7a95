"""Closeness in units of rounding, so that a bound holds for any magnitude and any processor."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def near(found: Any, wanted: Any, units: float) -> None:
    """Assert that no element is further off than `units` roundings of the largest one.

    Args:
        found: a tensor; its dtype says what a rounding is.
        wanted: of the same shape, of any dtype; numbers of a closed form are taken in float64.
    """
    found = torch.as_tensor(found).detach()
    wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
    bound = units * torch.finfo(found.dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


def strayed(
    found: Mapping[str, Any], wanted: Mapping[str, Any], before: Mapping[str, Any]
) -> float:
    """How far trained weights are off: the largest difference of any element, as a part of the
    largest change that training made. An optimizer such as Adam turns rounding into parts of a step.
    """
    assert set(found) == set(wanted)

    def furthest(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        return max(float(np.abs(np.asarray(one[n]) - np.asarray(other[n])).max()) for n in wanted)

    return furthest(found, wanted) / furthest(wanted, before)
