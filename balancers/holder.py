"""A balancer with its state, its tasks' names and checks around both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from balancers.protocol import Array, Balancer, Signals, describe


class Holder:
    """Runs a balancer: checks what goes in and out, applies ``loss_weight``, saves and restores.

    Args:
        balancer: the rule.
        tasks: K different names, in the order of every (K,) array.
        loss_weight: (K,) numbers > 0 that multiply the balancer's weights; the product is brought
            back to the balancer's sum. None stands for ones.

    Attributes:
        weights: (K,) float64, those of the newest update; before the first one equal, times
            ``loss_weight``.
        explain: name to array, the newest update's reasons; empty where it had no new measurement.

    Raises:
        ValueError: bad names, loss weights, signals or weights, and a state that belongs to
            something else.

    Example:
        >>> holder = Holder(CoBa(window=40, warmup=15), ["code", "math"])
        >>> weights = holder.update(Signals(step=0, valid_loss=[2.1, 1.4]))
    """

    def __init__(
        self, balancer: Balancer, tasks: Sequence[str], loss_weight: Sequence[float] | None = None
    ) -> None:
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"tasks: found {list(tasks)}, wanted at least one name, each only once"
            )
        k = len(self.tasks)
        self.loss_weight = np.ones(k) if loss_weight is None else np.array(loss_weight, np.float64)
        if (
            self.loss_weight.shape != (k,)
            or not (np.isfinite(self.loss_weight) & (self.loss_weight > 0)).all()
        ):
            raise ValueError(
                f"loss_weight: found {loss_weight}, wanted {k} finite numbers > 0 for {list(tasks)}"
            )
        self._meta = {
            **describe(balancer),
            "tasks": list(self.tasks),
            "loss_weight": self.loss_weight.tolist(),
        }
        self.balancer = balancer.bind(self.tasks)
        self._state = self.balancer.init(k)
        self.weights: Array = self._apply_loss_weight(np.full(k, 1 / k))
        self.explain: dict[str, Array] = {}

    def update(self, signals: Signals) -> Array:
        """The weights (K,) float64 for the global batch about to be trained on."""
        signals.check(self.tasks)
        state, weights, explain = self.balancer.update(self._state, signals)
        # numpy makes a scalar of `array + 1` where the array is 0-d; a checkpoint holds arrays.
        self._state = {name: np.asarray(each) for name, each in state.items()}
        self._check(weights, signals.step)
        odd = [name for name, each in self._state.items() if each.dtype == object]
        if odd:
            raise ValueError(
                f"{self._meta['method']} at step {signals.step}: found objects in the state at "
                f"{odd}, wanted numpy "
                f"arrays of numbers, so that a checkpoint can hold them"
            )
        self.weights, self.explain = self._apply_loss_weight(weights), explain
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """``{"meta": method, settings, tasks, loss weights (JSON-able), "arrays": name to numpy
        array}``, copied.
        """
        arrays = {f"state.{name}": np.array(array) for name, array in self._state.items()}
        return {"meta": self._meta, "arrays": {"weights": self.weights.copy(), **arrays}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave. Raises ValueError if method, settings or tasks are
        not those of here.
        """
        meta = saved["meta"]
        differ = [
            key
            for key in sorted(self._meta.keys() | meta.keys())
            if self._meta.get(key) != meta.get(key)
        ]
        if differ:
            sides = "; ".join(
                f"{key}: saved {meta.get(key)!r}, here {self._meta.get(key)!r}" for key in differ
            )
            raise ValueError(
                f"the saved balancer state belongs to another run. {sides}. Resume with what was "
                "saved, or start a new run"
            )
        current, arrays = self.state_dict()["arrays"], saved["arrays"]
        found, wanted = (
            {name: array.dtype.name for name, array in each.items()} for each in (arrays, current)
        )
        if found != wanted:
            raise ValueError(
                f"the saved state of {meta['method']} cannot be read: found arrays {found}, wanted "
                f"{wanted}; it was "
                f"written by another version"
            )
        self.weights = np.array(arrays["weights"])
        self._state = {name: np.array(arrays[f"state.{name}"]) for name in self._state}
        self.explain = {}

    def _apply_loss_weight(self, weights: Array) -> Array:
        # Brought back to the balancer's sum: else loss weights would change the learning rate.
        product = weights * self.loss_weight
        total, wanted = product.sum(), weights.sum()
        return product * (wanted / total) if min(total, wanted) > 0 else product

    def _check(self, weights: Array, step: int) -> None:
        name, k = self._meta["method"], len(self.tasks)
        if (
            not isinstance(weights, np.ndarray)
            or weights.dtype != np.float64
            or weights.shape != (k,)
        ):
            found = (
                f"{weights.dtype} {weights.shape}"
                if isinstance(weights, np.ndarray)
                else type(weights).__name__
            )
            raise ValueError(
                f"{name} at step {step}: found weights of {found}, wanted a float64 array of ({k},)"
            )
        each = dict(zip(self.tasks, weights.tolist(), strict=True))
        low = 0 if self.balancer.non_negative else -np.inf
        if not (np.isfinite(weights) & (weights >= low)).all():
            wanted = "finite numbers" + " >= 0" * self.balancer.non_negative
            raise ValueError(f"{name} at step {step}: found weights {each}, wanted {wanted}")
        if self.balancer.sums_to_one and abs(weights.sum() - 1) > 1e-9:
            raise ValueError(
                f"{name} at step {step}: found weights {each} with sum {weights.sum()}, wanted sum "
                "1 (or declare "
                f"sums_to_one = False in the class if their scale carries meaning)"
            )
