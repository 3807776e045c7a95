"""Averages that are tried on validation rows, for the methods that choose weights by a loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mtl.merging.piece import MergeError


class Losses(Protocol):
    """Validation losses of one model, K tasks, rows in two halves: the first chooses, the second
    reports.
    """

    @property
    def losses(self) -> np.ndarray:
        """(K,) nats per target token over all rows."""

    def group(self, g: int) -> np.ndarray:
        """(K,) nats per target token of half g."""


@dataclass
class Candidates:
    """The averages of K sub-models, each evaluated once.

    Attributes:
        k: sub-models.
        evaluate: from K weights to the losses of that average.
    """

    k: int
    evaluate: Callable[[Sequence[float]], Losses]
    _known: dict[tuple[float, ...], float] = field(default_factory=dict)

    def loss(self, weights: Sequence[float]) -> float:
        """The mean of the tasks' losses on the half that chooses, nats per target token.

        Raises:
            MergeError: it is not finite.
        """
        # Weights that differ by rounding alone are the same average.
        key = tuple(round(w, 9) for w in weights)
        if key not in self._known:
            found = float(self.evaluate(weights).group(0).mean())
            if not np.isfinite(found):
                raise MergeError(
                    f"found a validation loss of {found} with the weights {list(key)}, wanted a "
                    "finite one: is a sub-model broken?"
                )
            self._known[key] = found
        return self._known[key]


def chooses(method: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a method that answers `method(candidates)` with weights, not `method(piece)` with a
    tensor.
    """
    method.chooses = True
    return method
