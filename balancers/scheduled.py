"""A balancer that starts late, counts for a part, or stops."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from balancers.maths import whole
from balancers.protocol import Array, Balancer, Signals, State
from balancers.wrapper import Wrapper, nested, unnested


class Scheduled(Wrapper):
    """``w = blend * inner + (1 - blend) / K``, after a warm-up, until a freeze.

    Args:
        balancer: the inner one, or its name, or a mapping of its name and keywords.
        warmup: optimizer steps with equal weights, >= 0. The inner balancer sees the signals from
            the start.
        blend: the inner weights' part, in [0, 1].
        freeze: from this optimizer step on the weights stay as they are, >= 1; None: never. The
            inner balancer's signals are still measured.

    Equal means the inner balancer's sum over K, so a scale that carries meaning stays.
    """

    def __init__(
        self,
        balancer: Balancer | str | Mapping[str, Any],
        warmup: int = 0,
        blend: float = 1.0,
        freeze: int | None = None,
    ) -> None:
        super().__init__(balancer)
        self.warmup = warmup if warmup == 0 else whole("Scheduled warmup", warmup)
        if isinstance(blend, bool) or not isinstance(blend, int | float) or not 0 <= blend <= 1:
            raise ValueError(f"Scheduled blend: found {blend!r}, wanted a number in [0, 1]")
        self.blend = blend
        self.freeze = freeze if freeze is None else whole("Scheduled freeze", freeze)
        if freeze is not None and freeze <= warmup:
            raise ValueError(
                f"Scheduled freeze: found {freeze}, wanted a step after the warm-up of {warmup}"
            )

    def bind(self, tasks: Sequence[str]) -> Self:
        return type(self)(self.balancer.bind(tasks), self.warmup, self.blend, self.freeze)

    def init(self, k: int) -> State:
        return {"weights": np.full(k, 1 / k), **nested(self.balancer.init(k))}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        # The inner balancer is fed no more: nothing would ever read its weights.
        if self.freeze is not None and signals.step >= self.freeze:
            return state, state["weights"].copy(), {}
        inner, weights, explain = self.balancer.update(unnested(state), signals)
        part = 0.0 if signals.step < self.warmup else self.blend
        weights = part * weights + (1 - part) * weights.mean()
        return {"weights": weights.copy(), **nested(inner)}, weights, explain
