"""What a merging method reads: one tensor, of the base and of every sub-model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class MergeError(ValueError):
    """Models that cannot be merged as asked; the text says what to do."""


@dataclass(frozen=True)
class TensorPiece:
    """A floating-point tensor, of the base and of K sub-models.

    Attributes:
        name: the tensor's, as in the files.
        base: (...) as the sub-models are stored.
        models: K tensors like `base`.
        seed: of the methods that draw.
    """

    name: str
    base: Tensor
    models: Sequence[Tensor]
    seed: int = 0

    @property
    def k(self) -> int:
        return len(self.models)

    @property
    def wide(self) -> torch.dtype:
        """The type to compute in: wide enough that sums round to what is stored once only."""
        return torch.float64 if self.base.element_size() >= 4 else torch.float32

    @cached_property
    def deltas(self) -> Tensor:
        """(K, ...) in `wide`: the task vectors, each sub-model minus the base."""
        # In place, without a temporary of each delta.
        found = self.base.new_empty((self.k, *self.base.shape), dtype=self.wide)
        for delta, model in zip(found, self.models, strict=True):
            delta.copy_(model).sub_(self.base)
        return found

    @property
    def flat(self) -> Tensor:
        """(K, n) in `wide`: the deltas of n elements."""
        return self.deltas.reshape(self.k, self.base.numel())

    def mix(self, weights: Sequence[float]) -> Tensor:
        """(...) in `wide`: the base and the weighted sum of the deltas."""
        base = self.base.to(self.wide)
        total = base.clone()
        for weight, model in zip(weights, self.models, strict=True):  # one delta in memory
            total.add_(model.to(self.wide, copy=True).sub_(base), alpha=weight)
        return total

    def generator(self, unit: str | None = None) -> torch.Generator:
        """Random numbers of this tensor, or of a unit that several tensors share.

        They follow from the seed and the name, so neither shards nor threads decide anything.
        """
        key = hashlib.blake2b(f"{self.seed}/{unit or self.name}".encode(), digest_size=8)
        return torch.Generator().manual_seed(int.from_bytes(key.digest(), "little") >> 1)


def shares(weights: Sequence[float] | None, k: int) -> list[float]:
    """K weights that sum to 1; None: equal ones.

    Raises:
        MergeError: not K of them, one negative, or all 0.
    """
    given = factors(weights, k, 1.0)
    if min(given) < 0 or sum(given) == 0:
        raise MergeError(f"weights: found {given}, wanted numbers >= 0, not all 0.")
    return [each / sum(given) for each in given]


def factors(weights: Sequence[float] | None, k: int, default: float) -> list[float]:
    """K weights as given; None: `default` for each.

    Raises:
        MergeError: not K of them.
    """
    given = [default] * k if weights is None else weights
    if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != k:
        raise MergeError(f"weights: found {weights!r}, wanted {k}, one for each sub-model.")
    return [float(each) for each in given]
