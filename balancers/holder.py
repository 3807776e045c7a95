"""A balancer with its state, its tasks' names and checks around both."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balancers.protocol import Array, Balancer, Signals, State, describe


class Holder:
    """Runs a balancer: checks what goes in and out, applies ``loss_weight``, saves and restores.

    Args:
        balancer: the rule.
        tasks: K different names, in the order of every (K,) array.
        loss_weight: (K,) numbers > 0 that multiply the balancer's weights; the product is brought
            back to the balancer's sum (of sizes, where weights may be negative). None stands for
            ones.

    Attributes:
        weights: (K,) float64, those of the newest update; before the first one equal, times
            ``loss_weight``.
        explain: name to array, the newest update's reasons; empty where it had no new measurement.
        signals: what the newest update was given; None before the first.

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
        # Before `bind`: a checkpoint names tasks, not their positions.
        self._meta = {
            **describe(balancer),
            "tasks": list(self.tasks),
            "loss_weight": self.loss_weight.tolist(),
        }
        self.balancer = balancer.bind(self.tasks)
        self._state = self.balancer.init(k)
        self.weights: Array = self._apply_loss_weight(np.full(k, 1 / k))
        self.explain: dict[str, Array] = {}
        self.signals: Signals | None = None

    def update(self, signals: Signals) -> Array:
        """The weights (K,) float64 for the global batch about to be trained on."""
        signals.check(self.tasks)
        returned = self.balancer.update(self._state, signals)
        state, weights, explain = self._parts(returned, signals.step)
        self._check(weights, signals.step)
        self._state, self.signals = state, signals
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
        found, wanted = _layout(arrays), _layout(current)
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
        # Of sizes: weights of both signs may have a sum near 0, which would blow the product up.
        product = weights * self.loss_weight
        total, wanted = np.abs(product).sum(), np.abs(weights).sum()
        return product * (wanted / total) if min(total, wanted) > 0 else product

    def _parts(self, returned: Any, step: int) -> tuple[State, Any, dict[str, Array]]:
        """What an update returned, with the state and the reasons checked: a checkpoint must hold
        the one, a log the other.
        """
        at, k = f"{self._meta['method']} at step {step}", len(self.tasks)
        parts = returned if isinstance(returned, tuple) else (returned,)
        if (
            len(parts) != 3
            or not isinstance(parts[0], Mapping)
            or not isinstance(parts[2], Mapping)
        ):
            found = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(
                f"{at}: update returned ({found}), wanted a tuple (state, weights, explain): a "
                "dict of arrays, an array, a dict of arrays"
            )
        # array + 1 is no array if it is 0-d
        # The state, and the reasons; the weights stand between them.
        state, explain = (
            {name: np.asarray(each) for name, each in part.items()} for part in parts[::2]
        )
        found, wanted = _layout(state), _layout(self._state)
        if found != wanted:
            both = [
                f"{n!r}: {found.get(n, 'absent')}, before {wanted.get(n, 'absent')}"
                for n in sorted({*found, *wanted}, key=str)
                if found.get(n) != wanted.get(n)
            ]
            raise ValueError(
                f"{at}: found another state than before ({'; '.join(both)}), wanted arrays of "
                "numbers with the names, dtypes and shapes (but for the first axis) of init, so "
                "that a run can go on from a checkpoint"
            )
        for name, each in explain.items():
            if (
                not isinstance(name, str)
                or each.dtype.kind not in "biuf"
                or each.shape not in ((), (k,))
            ):
                raise ValueError(
                    f"{at}: found explain[{name!r}] of {each.dtype} {each.shape}, wanted text to "
                    f"numbers of () or ({k},)"
                )
        return state, parts[1], explain

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


def _layout(state: State) -> dict[str, str]:
    """Each array's dtype and shape. The first axis of two or one may grow: buffers do."""
    return {
        name: f"{each.dtype.name} ({', '.join(['n', *map(str, each.shape[1:])][: each.ndim])})"
        for name, each in state.items()
    }
