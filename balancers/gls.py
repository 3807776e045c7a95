"""Geometric Loss Strategy (Chennupati et al., CVPR workshops 2019,
https://arxiv.org/abs/1904.08492).
"""

from typing import ClassVar

import numpy as np

from balancers.maths import latest
from balancers.protocol import Array, Balancer, Signal, Signals, State

FLOOR = 1e-8  # nats per target token; a loss below it counts as this


class GLS(Balancer):
    """The loss is the geometric mean of the tasks' losses; as weights of the sum of losses that
    is::

        GM  = (prod_i L_i)^(1/K)
        w_i = GM / (K * L_i)             since  d GM = sum_i w_i d L_i

    L are training losses in nats per target token. The weights' sum is not 1 (it is at least that:
    GM over the harmonic mean); their scale is part of the method.

    Differs from the paper: the weights of update t come from the losses of update t-1, the newest
    that are known before batch t's; an absent task keeps its last loss; one not seen yet weighs
    1/K.
    """

    needs: ClassVar[Signal] = Signal.TRAIN_LOSS
    sums_to_one: ClassVar[bool] = False

    def init(self, k: int) -> State:
        return {"loss": np.full(k, np.nan)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        if signals.train_loss is not None:
            state["loss"] = latest(state["loss"], signals.train_loss)
        logs = np.log(np.maximum(state["loss"], FLOOR))
        seen = ~np.isnan(logs)
        # Unseen: exp(0) / K below.
        relative = np.zeros_like(logs)
        relative[seen] = logs[seen].sum() / max(1, seen.sum()) - logs[seen]
        return state, np.exp(relative) / len(logs), {}
