"""GradNorm (Chen, Badrinarayanan, Lee and Rabinovich, ICML 2018,
https://arxiv.org/abs/1711.02257).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import latest, positive
from balancers.protocol import Array, Balancer, Signal, Signals, State


@dataclass(frozen=True)
class GradNorm(Balancer):
    """Tasks' weighted gradients are brought to norms that grow with how far behind a task is::

        G_i    = w_i * ||g_i||                                    sum of w = K
        r_i    = (L_i / L_i(0)) / mean_j (L_j / L_j(0))           relative inverse training rate
        target = mean_j G_j * r_i^alpha                           a constant for the derivative
        w_i   <- w_i - lr * d/dw_i sum_j |G_j - target_j| / mean_j ||g_j||
        w     <- K * w / sum w

    ||g_i|| is the norm of the gradient of task i's loss in batch t, over the parameters that the
    Gramian covers; L are training losses (nats per target token) of batch t-1, L(0) the task's
    first above 0.

    Args:
        alpha: > 0; 1.5 in the paper. A positive exponent gives the slower task the larger target.
        lr: > 0.

    Differs from the paper: the gradient is divided by the mean norm, so that lr means the same for
    every model; the paper leaves the optimizer of w open. A weight below 0 becomes 0. The weights
    are given out with sum 1 instead of K. A task without gradient in the batch takes no part;
    without a Gramian the weights stay.

    Explains: ``norm`` (K,), ||g||; ``target`` (K,), in the units of G; nan where absent.
    """

    alpha: float = 1.5
    lr: float = 0.025

    needs: ClassVar[Signal] = Signal.GRAM | Signal.TRAIN_LOSS

    def __post_init__(self) -> None:
        positive(f"{type(self).__name__} alpha", self.alpha)
        positive(f"{type(self).__name__} lr", self.lr)

    def init(self, k: int) -> State:
        return {"weights": np.ones(k), "base": np.full(k, np.nan), "ratio": np.ones(k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        loss, given = self._read(signals)
        if loss is not None:
            state["base"] = np.where(np.isnan(state["base"]) & (loss > 0), loss, state["base"])
            base = state["base"] if given is None else np.where(given > 0, given, state["base"])
            state["ratio"] = latest(state["ratio"], loss / base)
        explain = {} if signals.gram is None else self._step(state, signals.gram)
        return state, state["weights"] / len(state["weights"]), explain

    def _step(self, state: State, gram: Array) -> dict[str, Array]:
        weights, k = state["weights"], len(gram)
        # Rounding can take a diagonal below 0.
        norm = np.sqrt(np.maximum(np.diag(gram), 0))
        present = norm > 0
        if not present.any():
            return {}
        rate = state["ratio"] / (state["ratio"][present].mean() or 1.0)
        target = (weights * norm)[present].mean() * rate**self.alpha
        gradient = np.sign(weights * norm - target) * norm / norm[present].mean()
        weights = np.maximum(weights - self.lr * gradient * present, 0)
        # A sum of 0 cannot be brought to K: equal weights again.
        state["weights"] = weights * (k / weights.sum()) if weights.sum() > 0 else np.ones(k)
        return {
            "norm": np.where(present, norm, np.nan),
            "target": np.where(present, target, np.nan),
        }

    def _read(self, signals: Signals) -> tuple[Array | None, Array | None]:
        """Losses, and the L(0) that the signals carry for them."""
        return signals.train_loss, None


class GradNormValid(GradNorm):
    """GradNorm with rates from validation losses, ``r_i = (V_i / V_i(0)) / mean``, V(0) from
    ``valid_base`` if given.

    One of the methods that the CoBa paper (https://arxiv.org/abs/2410.06741) compares with, marked
    by a star there. It gives no formula; this is our reading: norms are still those of the training
    gradients.
    """

    needs: ClassVar[Signal] = Signal.GRAM | Signal.VALID_LOSS

    def _read(self, signals: Signals) -> tuple[Array | None, Array | None]:
        return signals.valid_loss, signals.valid_base
