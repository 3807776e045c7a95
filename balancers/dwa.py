"""Dynamic Weight Average (Liu, Johns and Davison, CVPR 2019, https://arxiv.org/abs/1803.10704)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import latest, positive, softmax, whole
from balancers.protocol import Array, Balancer, Signal, Signals, State


@dataclass(frozen=True)
class DWA(Balancer):
    """Tasks whose training loss falls slower get more weight::

        r_i = L_i(p-1) / L_i(p-2)        mean losses (nats per target token) of the last two periods
        w   = softmax over tasks of r / T

    Args:
        period: optimizer steps averaged into one L, >= 1; the weights hold for a period.
        temperature: T > 0.

    Differs from the paper: a period is a number of steps instead of an epoch (tasks of different
    sizes have no common one), and the weights sum to 1 instead of K. Equal in the first two
    periods. A task absent for a whole period keeps its mean.

    Explains: ``rate`` (K,), r.
    """

    period: int = 100
    temperature: float = 2.0

    needs: ClassVar[Signal] = Signal.TRAIN_LOSS

    def __post_init__(self) -> None:
        whole("DWA period", self.period)
        positive("DWA temperature", self.temperature)

    def init(self, k: int) -> State:
        return {
            "updates": np.array(0),
            "sum": np.zeros(k),
            "count": np.zeros(k),
            "older": np.full(k, np.nan),
            "newer": np.full(k, np.nan),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        if signals.train_loss is not None:
            state["updates"] += 1
            state["sum"] += np.nan_to_num(signals.train_loss)
            state["count"] += ~np.isnan(signals.train_loss)
            if state["updates"] % self.period == 0:
                total, count, k = state["sum"], state["count"], len(state["sum"])
                mean = np.divide(total, count, out=np.full(k, np.nan), where=count > 0)
                older = state["newer"]
                # Sum and count begin anew with the next period.
                state = self.init(k) | {
                    "updates": state["updates"],
                    "older": older,
                    "newer": latest(older, mean),
                }
        rate = np.divide(
            state["newer"],
            state["older"],
            out=np.ones_like(state["newer"]),
            where=state["older"] > 0,
        )
        # A task without two known periods counts as unchanged.
        rate = np.nan_to_num(rate, nan=1.0)
        return state, softmax(rate / self.temperature), {"rate": rate}
