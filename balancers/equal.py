"""Equal weights."""

from typing import ClassVar

import numpy as np

from balancers.protocol import Array, Balancer, Signal, Signals, State


class Equal(Balancer):
    """Every task weighs 1/K: the mean of the tasks' losses, whatever their sizes."""

    needs: ClassVar[Signal] = Signal.NONE

    def init(self, k: int) -> State:
        return {"weights": np.full(k, 1 / k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        return state, state["weights"].copy(), {}
