"""MetaWeighting (Mao, Wang, Liu, Lin and Hu, Findings of ACL 2022,
https://aclanthology.org/2022.findings-acl.271)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from balancers.maths import positive
from balancers.protocol import Array, Balancer, Signal, Signals, State


@dataclass(frozen=True)
class MetaWeighting(Balancer):
    """Weights that make the next step lower all tasks' validation losses, to first order::

        V_j(theta - eps * sum_i w_i grad L_i)   has   dV_j/dw_i = -eps * M_ji
        M_ji   = <grad V_j, grad L_i>
        lambda = argmin over the simplex  || sum_j lambda_j * M_j ||
        w     <- projection on the simplex of  w + eta * (lambda' M) / max |M|

    Because lambda is the minimum, w + eta * lambda' M lowers all V_j.

    M is ``Signals.valid_gram``: rows are validation gradients, columns the training gradients of
    batch t.

    Args:
        eta: > 0; the most that a weight moves in a step, before the projection.

    Differs from the paper: the first-order form of its look-ahead, no second derivatives; the step
    is relative to the largest entry, which takes out the model's learning rate and the losses'
    scale; the projection keeps w a distribution. Tasks without validation gradient (rows of 0 in M)
    take no part in lambda; tasks without training gradient (columns of 0) keep their weights.

    Explains: ``descent`` (K,), lambda' M / max |M|.
    """

    eta: float = 0.01

    needs: ClassVar[Signal] = Signal.VALID_GRAM

    def __post_init__(self) -> None:
        positive("MetaWeighting eta", self.eta)

    def init(self, k: int) -> State:
        return {"weights": np.full(k, 1 / k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        largest = 0.0 if signals.valid_gram is None else float(np.abs(signals.valid_gram).max())
        if largest == 0:
            return state, state["weights"].copy(), {}
        rows = signals.valid_gram / largest
        # A row of zeros would be the minimum by itself, and nothing would move.
        present = np.abs(rows).max(axis=1) > 0
        descent = min_norm(rows[present] @ rows[present].T) @ rows[present]
        # A task that is not in the batch says nothing of its weight: the others share theirs.
        trained = np.abs(rows).max(axis=0) > 0
        moved, mass = state["weights"].copy(), state["weights"][trained].sum()
        if mass > 0:
            moved[trained] = mass * to_simplex((moved + self.eta * descent)[trained] / mass)
        state["weights"] = moved
        return state, moved.copy(), {"descent": descent}


def min_norm(gram: Array, rounds: int = 1000) -> Array:
    """The point of the simplex (K,) with the smallest ``x' gram x``, for a positive semidefinite
    (K, K) matrix.

    Mass moves from the held coordinate with the largest derivative to the one with the smallest, as
    far as that helps (pairwise Frank-Wolfe: Lacoste-Julien and Jaggi, NeurIPS 2015), which
    converges linearly.
    """
    k = len(gram)
    x = np.full(k, 1 / k)
    for _ in range(rounds):
        slope = gram @ x
        up, down = int(np.argmin(slope)), int(np.argmax(np.where(x > 0, slope, -np.inf)))
        gap = slope[down] - slope[up]
        if gap <= 1e-15 * gram.max():  # the point's own error is the root of this
            break
        curvature = gram[up, up] + gram[down, down] - 2 * gram[up, down]
        move = min(x[down], gap / curvature) if curvature > 0 else x[down]
        x[up] += move
        # Exactly 0, so that it is not held any more; a difference may leave a remainder.
        x[down] = 0.0 if move == x[down] else x[down] - move
    return x


def to_simplex(point: Array) -> Array:
    """The nearest distribution (K,) to a point (Held, Wolfe and Crowder 1974)."""
    falling = np.sort(point)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(point) + 1)
    nearest = np.maximum(point - excess[falling > excess][-1], 0)
    return nearest / nearest.sum()
