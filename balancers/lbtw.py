"""Loss-Balanced Task Weighting (Liu, Liang and Gitter, AAAI student abstracts 2019,
https://doi.org/10.1609/aaai.v33i01.33019977)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import latest, positive, share, whole
from balancers.protocol import Array, Balancer, Signal, Signals, State


@dataclass(frozen=True)
class LBTW(Balancer):
    """Tasks that have come less far get more weight::

        w_i ~ (L_i / L_i(0))^alpha

    Args:
        alpha: > 0; 0.5 in the paper.
        epoch: optimizer steps after which L(0) is taken again from the next batch. The paper does
            so at every epoch; None: never. >= 1.

    L are training losses in nats per target token, those of the update before. L(0) is the task's
    first batch above 0.

    Differs from the paper: the weights are brought to sum 1; an epoch is a number of steps.

    Explains: ``ratio`` (K,), L / L(0); nan where the task was not seen yet, which then weighs 1/K.
    """

    alpha: float = 0.5
    epoch: int | None = None

    needs: ClassVar[Signal] = Signal.TRAIN_LOSS

    def __post_init__(self) -> None:
        positive(f"{type(self).__name__} alpha", self.alpha)
        if self.epoch is not None:
            whole(f"{type(self).__name__} epoch", self.epoch)

    def init(self, k: int) -> State:
        return {
            "updates": np.array(0),
            "base": np.full(k, np.nan),
            "due": np.ones(k, bool),  # L(0) is to be taken at the task's next loss
            "ratio": np.full(k, np.nan),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        loss, given = self._read(signals)
        if loss is not None:
            if self.epoch and state["updates"] % self.epoch == 0:
                state["due"] = np.ones_like(state["due"])
            taken = state["due"] & (loss > 0)
            state["base"] = np.where(taken, loss, state["base"])
            state["due"] = state["due"] & ~taken
            state["updates"] += 1
            base = state["base"] if given is None else np.where(given > 0, given, state["base"])
            state["ratio"] = latest(state["ratio"], loss / base)
        seen = ~np.isnan(state["ratio"])
        return state, share(state["ratio"] ** self.alpha, seen), {"ratio": state["ratio"].copy()}

    def _read(self, signals: Signals) -> tuple[Array | None, Array | None]:
        """Losses, and the L(0) that the signals carry for them."""
        return signals.train_loss, None


class LBTWValid(LBTW):
    """LBTW on validation losses: ``w_i ~ (V_i / V_i(0))^alpha``, V(0) from ``valid_base`` where the
    signals carry it and ``epoch`` does not take it again.

    One of the methods that the CoBa paper (https://arxiv.org/abs/2410.06741) compares with, marked
    by a star there. It gives no formula; this is our reading. ``epoch`` counts probes.
    """

    needs: ClassVar[Signal] = Signal.VALID_LOSS

    def _read(self, signals: Signals) -> tuple[Array | None, Array | None]:
        return signals.valid_loss, None if self.epoch else signals.valid_base
