"""Facts about a model's structure: its blocks, its dtype."""

from collections.abc import Sequence

import torch
from torch import nn


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that weights have in a precision of the YAML."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def blocks(module: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The name of a model's longest list of blocks, and the blocks; empty without a list."""
    lists = [
        (name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)
    ]
    return max(lists, key=lambda each: len(each[1]), default=("", ()))
