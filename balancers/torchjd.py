"""Methods that are functions of the Gramian, as TorchJD (https://torchjd.org) implements them."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from balancers.protocol import Array, Balancer, Signal, Signals, State

INSTALL = 'pip install "torchjd[full]>=0.18"'
METHODS = ("AlignedMTL", "CAGrad", "IMTLG", "MGDA", "NashMTL", "PCGrad", "UPGrad")


class TorchJD(Balancer):
    """Weights from the Gramian ``<g_i, g_j>`` of the tasks' gradients in batch t, by one of
    TorchJD's weightings.

    Args:
        method: "MGDA" (Desideri 2012; Sener and Koltun 2018), "PCGrad" (Yu 2020), "CAGrad" (Liu
            2021; ``c``, 0.5 unless given), "IMTLG" (Liu 2021), "NashMTL" (Navon 2022), "AlignedMTL"
            (Senushkin 2023) or "UPGrad" (Quinton and Rey 2024).
        options: keywords of TorchJD's class, such as ``{"c": 0.4}``.
        seed: of PCGrad's random order of tasks.

    The weights are the method's own: their scale carries meaning, and IMTLG's and AlignedMTL's may
    be negative. The Gramian is divided by its mean diagonal before, since the methods compare it
    with absolute constants; NashMTL, which is not invariant to that, so bounds the update's norm in
    units of the root mean square gradient norm. It also takes a good fraction of a second for a
    Gramian. Absent tasks (zero rows) take no part and get the mean of the others' weights; one task
    alone has weight 1; without a Gramian, or with one of zeros, the weights stay, 1/K at first.

    Raises:
        ValueError: an unknown method or option, a missing extra (with the command that installs
            it), and weights that the method cannot find (with the Gramian).
    """

    needs: ClassVar[Signal] = Signal.GRAM
    sums_to_one: ClassVar[bool] = False
    non_negative: ClassVar[bool] = False

    def __init__(
        self, method: str, options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                f"TorchJD method: found {method!r}, wanted one of {', '.join(METHODS)}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"TorchJD seed: found {seed!r}, wanted a whole number >= 0")
        self.method, self.seed = method, seed
        self.options = {**({"c": 0.5} if method == "CAGrad" else {}), **(options or {})}
        # So that a missing extra or a wrong option is told now, not at the first Gramian.
        self._weighting(2)

    def settings(self) -> dict[str, Any]:
        return {"method": self.method, "options": self.options, "seed": self.seed}

    def init(self, k: int) -> State:
        # NashMTL starts its search from the last solution; the others keep nothing.
        return {"weights": np.full(k, 1 / k), "draws": np.array(0), "start": np.ones(k)}

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        gram = signals.gram
        present = np.diag(gram) > 0 if gram is not None else np.zeros(1, bool)
        if not present.any():
            return state, state["weights"].copy(), {}
        inner = gram[np.ix_(present, present)]
        weights = self._solve(inner / np.diag(inner).mean(), state, present)
        if not np.isfinite(weights).all():
            raise ValueError(
                f"TorchJD {self.method} at step {signals.step}: found weights {weights.tolist()} "
                "for the Gramian "
                f"{inner.tolist()}, wanted finite ones; try another method"
            )
        # The mean is for absent tasks; the others get their own below.
        state["weights"] = np.full(len(gram), weights.mean())
        state["weights"][present] = weights
        return state, state["weights"].copy(), {}

    def _solve(self, gram: Array, state: State, present: np.ndarray) -> Array:
        import torch

        if len(gram) == 1:
            return np.ones(1)
        weighting = self._weighting(len(gram))
        state["draws"] += 1
        if self.method == "NashMTL":
            # TorchJD offers it for matrices of gradients only; any matrix with this Gramian has the
            # same answer.
            values, vectors = np.linalg.eigh(gram)
            weighting.prvs_alpha = state["start"][present]
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                # cvxpy warns that a second solve would be no faster; each problem here is solved
                # once.
                warnings.filterwarnings(
                    "ignore", "You are solving a parameterized problem that is not DPP"
                )
                weights = weighting(
                    torch.from_numpy(vectors * np.sqrt(np.maximum(values, 0)))
                ).numpy()
            state["start"][present] = weighting.prvs_alpha
            return weights
        # TorchJD draws from torch's global generator: the run's own state must not move.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + int(state["draws"]) * 2**32)
            return weighting(torch.from_numpy(gram)).numpy()

    def _weighting(self, k: int) -> Any:
        try:
            from torchjd import aggregation

            if self.method == "NashMTL":
                return self._made(aggregation.NashMTL, n_tasks=k).weighting
            return self._made(getattr(aggregation, f"{self.method}Weighting"))
        except ImportError as error:
            raise ValueError(
                f"TorchJD {self.method}: a package is missing ({error}). Install it: {INSTALL}"
            ) from error

    def _made(self, kind: type, **more: Any) -> Any:
        accepted = [name for name in inspect.signature(kind).parameters if name not in more]
        if not self.options.keys() <= set(accepted):
            raise ValueError(
                f"TorchJD options: found {self.options}, wanted keywords of {kind.__name__}: "
                f"{accepted}"
            )
        return kind(**more, **self.options)
