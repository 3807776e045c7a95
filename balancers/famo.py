"""FAMO: Fast Adaptive Multitask Optimization (Liu, Feng, Stone and Liu, NeurIPS 2023,
https://arxiv.org/abs/2306.03792)."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import adam_init, adam_step, latest, positive, share, softmax
from balancers.protocol import Array, Balancer, Signal, Signals, State

EPSILON = 1e-8  # nats per target token, added to every loss as in the authors' code


@dataclass(frozen=True)
class _Falls(Balancer):
    """What both forms share: xi, moved by how far each task's log loss fell, and the weights it
    gives.
    """

    lr: float = 0.025
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        positive(f"{type(self).__name__} lr", self.lr)
        if self.weight_decay != 0:
            positive(f"{type(self).__name__} weight_decay", self.weight_decay)

    def init(self, k: int) -> State:
        return {
            "xi": np.zeros(k),
            "log": np.full(k, np.nan),
            "loss": np.full(k, np.nan),
            **adam_init(k),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        fall = self._fall(state, signals)
        known, z = ~np.isnan(fall), softmax(state["xi"])
        if known.any():
            fall = np.where(known, fall, 0.0)
            # J_softmax' fall, over the tasks that are known.
            gradient = (
                z * (fall - (z * fall).sum() / z[known].sum()) + self.weight_decay * state["xi"]
            )
            state["xi"] = state["xi"] - self.lr * adam_step(state, gradient, known)
            z = softmax(state["xi"])
        return state, share(z / (state["loss"] + EPSILON), ~np.isnan(state["loss"])), {"z": z}

    @abc.abstractmethod
    def _fall(self, state: State, signals: Signals) -> Array:
        """(K,) log loss before minus log loss after, nan = not known; the newest losses go into
        ``state["loss"]``.
        """

    def _since_last(self, state: State, loss: Array, base: Array | float = 1.0) -> Array:
        """(K,) fall of log(loss / base) since the last call."""
        now = np.log(loss + EPSILON) - np.log(base)
        before = state["log"]
        state["log"], state["loss"] = latest(before, now), latest(state["loss"], loss)
        return before - now


@dataclass(frozen=True)
class FAMO(_Falls):
    """Weights that make all tasks' log losses fall at the same rate::

        z   = softmax(xi),   c = 1 / sum_j (z_j / L_j)
        w_i = c * z_i / L_i         the weights of the model's loss  c * sum_i z_i * log L_i;  sum 1
        xi <- Adam step along  J_softmax(xi)' (log L_before - log L_after) + weight_decay * xi

    L_before and L_after are the losses (nats per target token) of the SAME batch before and after
    the update.

    Args:
        lr: of Adam on xi, > 0.
        weight_decay: >= 0, of xi, as an L2 term.
        replay: True reads L_after from ``Signals.replay_loss``: one more forward of every batch.
            False takes the next batch's loss for it, which costs nothing but adds noise: the
            difference between two batches.

    Differs from the paper: in w, L is the newest loss known before batch t, so that of batch t-1
    (after its update, with replay), where the paper has batch t's own; the lower bound of the
    losses is 0. An absent task's xi stays.

    Explains: ``z`` (K,).
    """

    replay: bool = True

    @property
    def needs(self) -> Signal:
        return Signal.TRAIN_LOSS | Signal.REPLAY_LOSS if self.replay else Signal.TRAIN_LOSS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.replay, bool):
            raise ValueError(f"FAMO replay: found {self.replay!r}, wanted true or false")

    def _fall(self, state: State, signals: Signals) -> Array:
        before, after = signals.train_loss, signals.replay_loss
        if before is None:
            return np.full_like(state["xi"], np.nan)
        # With replay this one is dropped: it compares two different batches.
        fall = self._since_last(state, before)
        if not self.replay:
            return fall
        return np.full_like(fall, np.nan) if after is None else self._since_last(state, after)


@dataclass(frozen=True)
class FAMOValid(_Falls):
    """FAMO on validation losses: L_before and L_after are those of two probes in turn, and w has
    the newest.

    One of the methods that the CoBa paper (https://arxiv.org/abs/2410.06741) compares with, marked
    by a star there. It gives no formula; this is our reading. Two probes may read different
    examples, so where the signals carry ``valid_base`` the fall is that of the log ratio to it.
    """

    needs: ClassVar[Signal] = Signal.VALID_LOSS

    def _fall(self, state: State, signals: Signals) -> Array:
        if signals.valid_loss is None:
            return np.full_like(state["xi"], np.nan)
        # log 1 = 0: without a base the fall is that of the loss itself.
        given = (
            1.0
            if signals.valid_base is None
            else np.where(signals.valid_base > 0, signals.valid_base, 1.0)
        )
        return self._since_last(state, signals.valid_loss, given)
