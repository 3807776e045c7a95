"""Random Loss Weighting (Lin, Ye, Zhang and Tsang, TMLR 2022, https://arxiv.org/abs/2111.10603)."""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from balancers.maths import softmax
from balancers.protocol import Array, Balancer, Signal, Signals, State


class RLW(Balancer):
    """``w = softmax(n)``, every ``n_i`` drawn from the standard normal distribution at every
    update.

    Args:
        seed: any int.

    A task's draws follow from (seed, its name, number of the update), by a hash and the Box-Muller
    transform, so they know neither the order of the tasks nor numpy's version. Without names (no
    Holder) its position stands for its name.
    """

    needs: ClassVar[Signal] = Signal.NONE

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"RLW seed: found {seed!r}, wanted a whole number")
        self.seed = seed
        self._tasks: Sequence[str] | None = None

    def bind(self, tasks: Sequence[str]) -> Self:
        bound = type(self)(self.seed)
        bound._tasks = tuple(tasks)
        return bound

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def init(self, k: int) -> State:
        names = self._tasks or [str(i) for i in range(k)]
        digests = [hashlib.sha256(f"{self.seed} {name}".encode()).digest() for name in names]
        return {
            "key": np.array([int.from_bytes(each[:8]) for each in digests], np.uint64),
            "draw": np.array(0),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        count = 2 * int(state["draw"])
        radius, angle = (_uniform(state["key"], count + i) for i in (0, 1))
        # log1p(-u): u may be 0 and never 1, so 1 - u is never 0.
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        state["draw"] += 1
        return state, softmax(normal), {}


def _uniform(key: np.ndarray, count: int) -> Array:
    """(K,) numbers in [0, 1), the ``count``-th of each key's SplitMix64 sequence (Steele, Lea and
    Flood 2014).
    """
    x = key + np.uint64((count + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    # The upper 53 bits: as many as a float holds.
    return ((x ^ x >> np.uint64(31)) >> np.uint64(11)) / 2.0**53
