"""CoBa as its authors' code computes it (codefuse-ai/MFTCoder, commit 8ba13f4): to compare with,
and to reproduce old runs.
"""

import math

import numpy as np

from balancers.coba import CoBa, least_squares
from balancers.maths import softmax
from balancers.protocol import Array, Signals, State


class Released(CoBa):
    """What ``CoBa(divergence="released")`` makes: the paper's method with the released differences.

    - a_max is the slope of ``max_i r_i``, and DF is not clamped at 1;
    - a task's first probe is no observation;
    - no slope is kept before W, and ACS sees the last N - W + 1;
    - warm-up ends a step earlier: the authors' trainer measures after a step, so its row t + 1 is
      what we give at t;
    - the weights go through ``softmax(K * w)`` and, where one is below 1/(10K),
      ``0.9 * w + 1/(10K)``;
    - the window without a setting is 200 probes, groups or not.

    Settings, signals, state and errors are CoBa's. A checkpoint names it CoBa.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "released":
            raise ValueError(
                f"Released divergence: found {self.divergence!r}, wanted 'released'; "
                f"CoBa(divergence={self.divergence!r}) makes the other one"
            )

    def _become_released(self) -> None:
        pass  # it is

    @classmethod
    def public(cls) -> type[CoBa]:
        return CoBa

    def _warming(self, step: int) -> bool:
        return super()._warming(step + 1)

    def _observe(self, state: State, signals: Signals) -> np.ndarray:
        fresh = super()._observe(state, signals)
        state["ratio"][self._row(state), fresh] = np.nan
        return fresh

    def _reach(self, state: State, signals: Signals) -> int:
        return min(int(state["probes"]), self._most)

    def _keep(self, state: State, slope: Array, n: int, step: int) -> Array:
        kept = np.full_like(slope, np.nan) if self._warming(step) else slope
        # N - W + 1 is an offset in the released slicing.
        return super()._keep(state, kept, min(n, max(1, self._most - self.warmup + 1)), step)

    def _a_max(self, state: State, slope: Array, rows: Array, step: int) -> float:
        if self._warming(step):
            return math.nan
        ratio = state["ratio"][rows]
        envelope = np.max(ratio, axis=1, initial=-np.inf, where=~np.isnan(ratio))
        envelope[np.isinf(envelope)] = np.nan
        slopes, _ = least_squares(state["step"][rows], envelope[:, None], np.zeros(len(rows)))
        return float(slopes[0])

    def _weigh(self, df: float, rcs: Array, acs: Array, seen: Array) -> tuple[float, Array]:
        k = max(1, seen.sum())
        weights = softmax(k * (df * rcs + (1 - df) * acs), seen)
        return df, 0.9 * weights + 0.1 / k if (weights < 0.1 / k).any() else weights
