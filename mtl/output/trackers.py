"""Where numbers go. A tracker is a class with `log`, `say` and `close`. Only rank 0 has trackers.

Tags: `train/<task>/loss`, `train/<task>/weight`, `eval/<task>/loss`, `eval/macro`,
`eval/average/<task>/loss`, `<balancer>/<task>/slope` ... Losses are nats per target token.
Everything logged under step t was measured at the parameters after t optimizer updates.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from balancers.maths import whole
from mtl import process
from mtl.output.board import NARROW, Board
from mtl.output.files import run_record

TRACKERS = {
    "console": "mtl.output.trackers:Console",
    "jsonl": "mtl.output.trackers:Jsonl",
    "report": "mtl.report.tracker:PageTracker",
    "tensorboard": "mtl.output.trackers:TensorBoard",
    **{
        name: f"mtl.output.trackers:{name}"
        for name in ("wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")
    },
}


LOG = "log.txt"  # what a run told, a line each


class Tracker(Protocol):
    """Built as `Tracker(output=Path, steps=int, start=int, **keywords of the YAML)`."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Console:
    """On a terminal a progress bar over a table of the tasks, which is kept up to date. Elsewhere a
    line every now and then, and the table after every full pass.

    Args:
        every: steps between lines where there is no terminal; None: about 20 lines a run.

    Raises:
        ValueError: `every` is no whole number >= 1.
    """

    def __init__(self, output: Path, steps: int, start: int = 0, every: int | None = None):
        few = max(1, steps // 20)
        self.every = few if every is None else whole("console: every", every)
        self.steps = steps
        self.terminal = process.is_screen()
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.terminal
        )
        self.board = Board()
        if start:  # what was before: each task's best
            for record in _before(output, start):
                self.board.take(record)
        self.rows: list[tqdm] = []  # the table's lines under the bar

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.board.take(values)
        if "eval/macro" in values:
            self._passed(step, values)
        if "train/loss" in values:
            self._trained(step, values)
        if self.terminal:
            self._show()

    def _passed(self, step: int, values: Mapping[str, float]) -> None:
        averaged = "eval/average/macro"
        text = f"step {step}/{self.steps}  validation: macro {values['eval/macro']:.4f}"
        if averaged in values:
            text += f" | averaged weights: {values[averaged]:.4f}"
        if self.terminal:
            tasks = [f"{t} {values[f'eval/{t}/loss']:.3f}" for t in _tasks(values, "eval", "loss")]
            self.say(f"{text} | {', '.join(tasks)}")
        else:
            self.say("\n  ".join([text, *self.board.lines(NARROW - 2)]))

    def _trained(self, step: int, values: Mapping[str, float]) -> None:
        text = f"loss {values['train/loss']:.3f}, {values['train/tokens_per_second']:.0f} tokens/s"
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
            # `update` takes a difference; `n` is where the bar stands, after a resume too.
            self.bar.update(step + 1 - self.bar.n)
        elif (step + 1) % self.every == 0 or step + 1 == self.steps:
            left = values["time/left_seconds"]
            weights = ", ".join(
                f"{t} {values[f'train/{t}/weight']:.2f}" for t in _tasks(values, "train", "weight")
            )
            self.say(
                f"step {step + 1}/{self.steps}  {text} | weights: {weights} "
                f"| {left / 60:.1f} min left"
            )

    def _show(self) -> None:
        """The table under the bar, as far as the terminal has lines for it."""
        # The window may have changed its size since the last step.
        width, height = os.get_terminal_size(sys.stderr.fileno())
        lines = self.board.lines(width - 1)[: max(0, height - 3)]
        while len(self.rows) < len(lines):
            place = len(self.rows) + 1
            self.rows.append(
                tqdm(total=0, position=place, bar_format="{desc}", leave=False, dynamic_ncols=True)
            )
        for row, line in zip(self.rows, lines, strict=False):
            if row.desc != line:
                row.set_description_str(line)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        for row in reversed(self.rows):
            row.close()
        self.bar.close()
        if self.rows:
            self.say("\n".join(self.board.lines()))


class Jsonl:
    """`metrics.jsonl`: one JSON object per step, {"step": t, tag: number ...}. What is absent is
    left out; there is no NaN.
    """

    def __init__(self, output: Path, steps: int, start: int = 0):
        self.file = (output / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN or infinity.
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        try:
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from error

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `<output>/tensorboard`."""

    def __init__(self, output: Path, steps: int, start: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ValueError(
                "trackers: tensorboard is not installed: pip install tensorboard."
            ) from e
        # Events after `start` belong to the run that was stopped, so they go. Events at `start`
        # stay: a resumed run does not repeat the validation of that step. Its training events then
        # appear twice, with the same numbers.
        self.writer = SummaryWriter(
            str(output / "tensorboard"), purge_step=start + 1 if start else 0
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


class Library:
    """Another library's tracker, through `accelerate.tracking`. The run's configuration goes along.

    Args:
        library: its name in accelerate, which is that of its package.
        naming: the keyword by which it takes the run's name; None where it has none.
        project: the project, or experiment, that the run belongs to.
        keywords: go to the library's own start (`wandb.init` and the like).

    Raises:
        ValueError: the library is not installed.
    """

    def __init__(
        self,
        library: str,
        naming: str | None,
        output: Path,
        steps: int,
        start: int = 0,
        project: str = "coba-mtl",
        **keywords: Any,
    ):
        if importlib.util.find_spec(library) is None:
            package = library.replace("_", "-")
            raise ValueError(f"trackers: {library} is not installed: pip install {package}.")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logger wants it; it takes the process group that there is
        named = {naming: Path(output).resolve().name} if naming else {}
        self.tracker = LOGGER_TYPE_TO_CLASS[library](project, **{**named, **keywords})
        self.tracker.start()
        record = run_record(Path(output))
        if record.is_file():
            config = json.loads(record.read_text(encoding="utf-8"))["config"]
            self.tracker.store_init_configuration(dict(_flat(config)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        self.tracker.log(finite, step=step)

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.tracker.finish()


wandb = partial(Library, "wandb", "name")
mlflow = partial(Library, "mlflow", "run_name")
trackio = partial(Library, "trackio", "name")
comet_ml = partial(Library, "comet_ml", None)
clearml = partial(Library, "clearml", "task_name")
swanlab = partial(Library, "swanlab", "experiment_name")


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """{"model": {"name": "x"}} -> ("model.name", "x"); what is no plain value as its text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            yield f"{above}{key}", value if plain else json.dumps(value)


def metrics_bytes(output: Path) -> int:
    """Length of metrics.jsonl now."""
    path = output / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl.

    Raises:
        ValueError: a line is torn or no JSON object; the text names it.
    """
    records = []
    # A torn line may end within a character.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            assert isinstance(record, dict)
        except (ValueError, AssertionError) as e:
            raise ValueError(
                f"{path}:{number}: found a torn line ({e}), wanted a JSON object. The run was cut "
                "off there: its next --resume repairs the file; or remove the line."
            ) from e
        records.append(record)
    return records


def _before(output: Path, step: int) -> list[dict[str, Any]]:
    """What metrics.jsonl has up to a step; nothing where it cannot be read."""
    try:
        records = read_metrics(output / "metrics.jsonl")
        return [record for record in records if record["step"] <= step]
    except (OSError, ValueError, KeyError):
        return []


def cut_metrics(output: Path, length: int, say: Callable[[str], None]) -> None:
    """Cut metrics.jsonl back to what a checkpoint knew of it, so that no step stands in it twice.

    A missing or torn line gives a message and no error: only reports and cards read the file.
    """
    path, found = output / "metrics.jsonl", metrics_bytes(output)
    if found < length:
        say(
            f"{path}: found {found} bytes, the checkpoint knew of {length}: steps are missing in it"
        )
    if not found:
        return
    with path.open("rb+") as file:
        text = file.read(length)
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            say(f"{path}: its last line is torn, and was removed")
        file.truncate(whole)


def _tasks(values: Mapping[str, float], group: str, what: str) -> list[str]:
    return [
        tag[len(group) + 1 : -len(what) - 1]
        for tag in values
        # Two slashes: eval/average/<task>/loss is no task's own.
        if tag.startswith(f"{group}/") and tag.endswith(f"/{what}") and tag.count("/") == 2
    ]
