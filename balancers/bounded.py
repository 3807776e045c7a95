"""Floors and ceilings on weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from balancers.protocol import Array, Balancer, Signals, State
from balancers.wrapper import Wrapper


class Bounded(Wrapper):
    """No share below a floor or above a ceiling, by mixing in equal weights: ``w = (1 - q) * inner
    + q / K``.

    q is the smallest number in [0, 1] that keeps every share within the bounds: 0 while the inner
    balancer does so itself. The tasks' order stays as it is; clipping would make different tasks
    equal.

    Args:
        balancer: the inner one, or its name, or a mapping of its name and keywords.
        floor: in [0, 1/K], of the sum of weights.
        ceiling: in [1/K, 1], of the sum of weights.

    Explains: ``mixed`` (scalar), q, beside what the inner balancer explains.

    Raises:
        ValueError: bounds that no weights of K tasks can keep; an inner balancer with negative
            weights.
    """

    def __init__(
        self, balancer: Balancer | str | Mapping[str, Any], floor: float = 0.0, ceiling: float = 1.0
    ) -> None:
        super().__init__(balancer)
        if not self.balancer.non_negative:
            raise ValueError(
                f"Bounded balancer: found {self.balancer.public().__name__}, whose weights may be "
                "negative, wanted shares"
            )
        for name, value in (("floor", floor), ("ceiling", ceiling)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"Bounded {name}: found {value!r}, wanted a number in [0, 1]")
        self.floor, self.ceiling = floor, ceiling

    def bind(self, tasks: Sequence[str]) -> Self:
        return type(self)(self.balancer.bind(tasks), self.floor, self.ceiling)

    def init(self, k: int) -> State:
        if not self.floor <= 1 / k <= self.ceiling:
            raise ValueError(
                f"Bounded floor and ceiling: found {self.floor} and {self.ceiling}, wanted floor "
                "<= 1/K <= ceiling, "
                f"which is {1 / k:.4g} for {k} tasks"
            )
        return self.balancer.init(k)

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        state, weights, explain = self.balancer.update(state, signals)
        total, equal = weights.sum(), 1 / len(weights)
        mixed = 0.0
        # Without a sum there are no shares to bound.
        if total > 0:
            low, high = weights.min() / total, weights.max() / total
            if low < self.floor:
                # The q that lifts the lowest share to the floor; below, the highest to the ceiling.
                mixed = (self.floor - low) / (equal - low)
            if high > self.ceiling:
                mixed = max(mixed, (high - self.ceiling) / (high - equal))
        weights = (1 - mixed) * weights + mixed * total * equal
        return state, weights, {**explain, "mixed": np.array(mixed)}
