"""Weights given once."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from balancers.protocol import Array, Balancer, Signal, Signals, State


class Static(Balancer):
    """Given weights, divided by their sum.

    Args:
        weights: numbers >= 0, not all 0: K of them in the order of the tasks, or a mapping that
            names every task (the mapping needs names, so a Holder).
    """

    needs: ClassVar[Signal] = Signal.NONE

    def __init__(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        values = np.array(
            list(weights.values() if isinstance(weights, Mapping) else weights), np.float64
        )
        if (
            values.ndim != 1
            or not (np.isfinite(values) & (values >= 0)).all()
            or not values.sum() > 0
        ):
            raise ValueError(
                f"Static weights: found {weights}, wanted finite numbers >= 0 that are not all 0"
            )
        self.weights = dict(weights) if isinstance(weights, Mapping) else values.tolist()

    def bind(self, tasks: Sequence[str]) -> Self:
        if not isinstance(self.weights, dict):
            return self
        if self.weights.keys() != set(tasks):
            raise ValueError(
                f"Static weights: found tasks {list(self.weights)}, wanted exactly {list(tasks)}"
            )
        return type(self)([self.weights[task] for task in tasks])

    def init(self, k: int) -> State:
        if isinstance(self.weights, dict):
            raise ValueError(
                "Static weights: found a mapping but no task names, wanted a list, or a Holder "
                "around it"
            )
        if len(self.weights) != k:
            raise ValueError(
                f"Static weights: found {len(self.weights)} of them, wanted one for each of {k} "
                "tasks"
            )
        return {"weights": np.array(self.weights) / np.sum(self.weights)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        return state, state["weights"].copy(), {}
