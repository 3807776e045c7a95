"""Where each task stands, as a table of text: from what is logged, for terminals and logs."""

from collections.abc import Mapping
from dataclasses import dataclass

COLUMNS = {"loss": 6, "best": 6, "trend": 6, "weight": 6, "share": 5, "epoch": 5, "state": 8}
NAME = 11  # of a task, where the table has NARROW columns
NARROW = 60


@dataclass
class Standing:
    """A task.

    Attributes:
        loss, best: of validation, nats per target token; trend: the last pass over the one before,
            less 1.
        weight, share, epoch: of the newest step; share: of the draws, planned.
        since: passes since its best.
        is_done: by `evaluate.patience`; is_anchored: its loss is the divergence from its best.
    """

    loss: float | None = None
    best: float | None = None
    trend: float | None = None
    weight: float | None = None
    share: float | None = None
    epoch: float | None = None
    since: int = 0
    is_done: bool = False
    is_anchored: bool = False

    @property
    def state(self) -> str:
        if self.is_done:
            held = "anchored" if self.is_anchored else "done"
            return "dropped" if self.weight == 0 else held
        if self.loss is None:
            return "-"
        return f"{self.since} past" if self.since else "at best"

    def passed(self, loss: float) -> None:
        """Take the loss of a full pass."""
        self.trend = loss / self.loss - 1 if self.loss else None
        is_best = self.best is None or loss < self.best
        self.loss, self.since = loss, 0 if is_best else self.since + 1
        self.best = loss if is_best else self.best

    def cells(self) -> list[str]:
        return [
            _text(self.loss, "6.3f"),
            _text(self.best, "6.3f"),
            # None stays None, and 0 stays 0.
            _text(self.trend and 100 * self.trend, "+5.1f", "%"),
            _text(self.weight, "6.3f"),
            _text(self.share and 100 * self.share, "4.0f", "%"),
            _text(self.epoch, "5.1f"),
            f"{self.state:8}",
        ]


class Board:
    """All tasks of a run, in the order in which they are logged."""

    def __init__(self) -> None:
        self.tasks: dict[str, Standing] = {}

    def take(self, values: Mapping[str, float]) -> None:
        """What was logged, of a step or of a full pass."""
        for tag, value in values.items():
            match tag.split("/"):
                case ["eval", task, "loss"]:
                    self._of(task).passed(value)
                case ["train", task, "weight"]:
                    # train/<task>/kl is logged only while the loss is a divergence.
                    one = self._of(task)
                    one.weight, one.is_anchored = value, f"train/{task}/kl" in values
                case ["draws", task, "planned"]:
                    self._of(task).share = value
                case ["draws", task, "epoch"]:
                    self._of(task).epoch = value
                case ["patience", task, "done"]:
                    self._of(task).is_done = bool(value)

    def lines(self, width: int = NARROW) -> list[str]:
        """The table; no line is wider than `width` where that is at least `NARROW`."""
        longest = max(map(len, self.tasks), default=0)
        wide = max(4, min(longest, NAME + max(0, width - NARROW)))
        header = [f"{name:>{size}}" for name, size in COLUMNS.items()]
        rows = [["task", *header[:-1], "state"]]
        rows += [[_cut(name, wide), *one.cells()] for name, one in self.tasks.items()]
        return [" ".join([f"{row[0]:{wide}}", *row[1:]]).rstrip() for row in rows]

    def _of(self, task: str) -> Standing:
        return self.tasks.setdefault(task, Standing())


def _text(value: float | None, form: str, unit: str = "") -> str:
    """A number of a fixed width; decimals go where it is too large for it."""
    size = int(form.lstrip("+").partition(".")[0]) + len(unit)
    text = "-" if value is None else format(value, form) + unit
    if len(text) > size:
        text = f"{value:{'+' * form.startswith('+')}.0f}{unit}"
    return f"{text:>{size}}"


def _cut(name: str, wide: int) -> str:
    return name if len(name) <= wide else f"{name[: wide - 2]}.."
