"""Closeness in units of rounding, so that a bound holds for any magnitude and any processor."""

from typing import Any

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
