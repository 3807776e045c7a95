"""The token mean: what ordinary fine-tuning does."""

from typing import ClassVar

import numpy as np

from balancers.protocol import Array, Balancer, Signal, Signals, State


class Tokens(Balancer):
    """``w_k = target tokens of k / all`` in the global batch: every token weighs the same, as in a
    run without tasks.

    In a batch without targets the weights are equal. Raises ValueError if the signals carry no
    token counts.
    """

    needs: ClassVar[Signal] = Signal.TOKENS

    def init(self, k: int) -> State:
        return {"k": np.array(k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        k, tokens = int(state["k"]), signals.tokens
        if tokens is None:
            raise ValueError(
                f"Tokens at step {signals.step}: found no token counts, wanted Signals(tokens=...)"
            )
        if tokens.sum() == 0:
            return state, np.full(k, 1 / k), {}
        return state, tokens / tokens.sum(), {}
