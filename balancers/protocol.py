"""What a balancer is: a pure function from state and signals to the next state and the weights of
the tasks' losses.

Timing: at the start of update t the balancer sees the losses of update t-1, the probe taken at the
parameters before update t, and the Gramian of batch t if it asked for it. Its weights hold for the
whole of batch t.
"""

import abc
import enum
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# It is the state_dict: whatever is not in here does not survive a checkpoint.
State = dict[str, np.ndarray]


class Signal(enum.Flag):
    """What a balancer reads. Only what it declares in ``needs`` is measured."""

    NONE = 0
    TOKENS = enum.auto()
    TRAIN_LOSS = enum.auto()
    VALID_LOSS = enum.auto()
    GRAM = enum.auto()
    REPLAY_LOSS = enum.auto()
    VALID_GRAM = enum.auto()


@dataclass(frozen=True)
class Signals:
    """What was measured around one optimizer update; K tasks, always in the same order.

    Anything ``numpy.asarray`` takes is accepted and turned into float64. In a (K,) loss nan says
    that the task was absent: 0 would say that it is solved.
    """

    step: int  # optimizer updates completed
    # (K,) target tokens per task in global batch t
    tokens: Array | None = None
    # (K,) nats per target token of the last global batch; nan = absent
    train_loss: Array | None = None
    # (K,) nats per target token of the newest probe; nan = absent; None = none was due
    valid_loss: Array | None = None
    # (K,) initial loss of the probe's examples; nan or None = the task's first probe
    valid_base: Array | None = None
    # which group of the validation rows, divided once, the probe read; they take turns
    valid_group: int | None = None
    # (K, K) inner products of the tasks' global gradients; 0 in the rows of an absent task
    gram: Array | None = None
    # (K,) the last global batch once more, at the parameters after its update
    replay_loss: Array | None = None
    # (K, K) inner products of validation gradient (row) and gradient of batch t
    valid_gram: Array | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            whole = field.name in ("step", "valid_group")
            object.__setattr__(
                self, field.name, operator.index(value) if whole else np.asarray(value, np.float64)
            )

    def check(self, tasks: Sequence[str]) -> None:
        """Raise ValueError for an array of the wrong shape, a loss that is infinite or below 0, an
        odd token count.
        """
        if self.step < 0:
            raise ValueError(
                f"Signals.step: found {self.step}, wanted the optimizer updates completed, >= 0"
            )
        k = len(tasks)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, np.ndarray):
                continue
            shape = (k, k) if field.name.endswith("gram") else (k,)
            if value.shape != shape:
                raise ValueError(
                    f"Signals.{field.name} at step {self.step}: found shape {value.shape}, wanted "
                    f"{shape} for the "
                    f"{k} tasks {list(tasks)}"
                )
            signed = field.name.endswith("gram")
            wanted = "a finite number" if signed else "a finite number >= 0"
            bad = ~np.isfinite(value) if signed else ~(np.isfinite(value) & (value >= 0))
            if field.name != "tokens" and not signed:
                bad &= ~np.isnan(value)
                wanted += ", or nan where the task is absent"
            if bad.any():
                name = tasks[int(np.argwhere(bad)[0][0])]
                raise ValueError(
                    f"Signals.{field.name} at step {self.step}, task {name!r}: found "
                    f"{value[bad][0]}, wanted {wanted}; "
                    f"look at this task's last batch, or lower the learning rate"
                )


class Balancer(abc.ABC):
    """A rule that turns signals into weights. Subclass it, declare ``needs``, write ``init`` and
    ``update``.

    An instance holds settings only, set in its constructor; everything that changes is in the
    state, so that replay, resume and tests need nothing else. Randomness comes from a seed in the
    state.
    """

    needs: ClassVar[Signal]  # a wrapper makes it a property
    non_negative: ClassVar[bool] = True  # False where a task's gradient may be subtracted
    sums_to_one: ClassVar[bool] = True  # False where the scale of the weights carries meaning

    def bind(self, tasks: Sequence[str]) -> Self:
        """The balancer for these tasks: the place to turn task names in the settings into
        positions.
        """
        return self

    @abc.abstractmethod
    def init(self, k: int) -> State:
        """The state before the first update, for k tasks."""

    @abc.abstractmethod
    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        """The next state, the weights (K,) of this update, and what explains them: name to (K,) or
        scalar array.

        ``state`` is consumed: its arrays may be changed in place.
        """

    @classmethod
    def public(cls) -> "type[Balancer]":
        """The class that users write and a checkpoint names. Another one than this only where a
        setting of that class picked this one.
        """
        return cls

    def settings(self) -> dict[str, Any]:
        """What was given to the constructor. The base returns the instance's attributes."""
        return dict(vars(self))


def describe(balancer: Balancer) -> dict[str, Any]:
    """Method and settings as plain values that survive JSON; a balancer inside another's settings
    is described too.
    """
    kind = balancer.public()
    return {
        "method": f"{kind.__module__}:{kind.__qualname__}",
        "settings": _plain(balancer.settings()),
    }


def _plain(value: Any) -> Any:
    match value:
        case Balancer():
            return describe(value)
        case np.ndarray() | np.generic():
            return value.tolist()
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(
        f"setting {value!r}: found a {type(value).__name__}, wanted numbers, strings, lists or "
        "mappings, so that a "
        f"checkpoint can hold it; override settings() to say what stands for it"
    )
