"""Uncertainty weighting (Kendall, Gal and Cipolla, CVPR 2018, https://arxiv.org/abs/1705.07115)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import adam_init, adam_step, positive
from balancers.protocol import Array, Balancer, Signal, Signals, State


@dataclass(frozen=True)
class Uncertainty(Balancer):
    """The log variances s of the tasks are learned beside the model::

        minimise  sum_i 0.5 * exp(-s_i) * L_i + 0.5 * s_i      over the model and s
        w_i = 0.5 * exp(-s_i)

    Args:
        lr: learning rate of Adam on s, > 0.

    L are training losses in nats per target token. The weights' sum is not 1: their scale is part
    of the method, and tends to ``w_i = 0.5 / L_i``. s starts at 0 and takes the step of the joint
    minimisation: with the loss and the s of the same update.

    Differs from the paper: s has its own Adam with its own rate instead of sharing the model's
    optimizer and schedule; an absent task's s stays.

    Explains: ``log_variance`` (K,), s.
    """

    lr: float = 0.025

    needs: ClassVar[Signal] = Signal.TRAIN_LOSS
    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("Uncertainty lr", self.lr)

    def init(self, k: int) -> State:
        return {"log_variance": np.zeros(k), **adam_init(k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        s = state["log_variance"]
        if signals.train_loss is not None:
            present = ~np.isnan(signals.train_loss)
            gradient = 0.5 - 0.5 * np.exp(-s) * np.where(present, signals.train_loss, 0.0)
            s = state["log_variance"] = s - self.lr * adam_step(state, gradient, present)
        return state, 0.5 * np.exp(-s), {"log_variance": s}
