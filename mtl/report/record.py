"""What a run left, read for its report: metrics.jsonl, run.json, log.txt, the newest checkpoint's
state.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtl.config.schema import BEST
from mtl.output.files import run_records
from mtl.output.report import CHOICE, lines
from mtl.output.trackers import LOG

Line = Mapping[str, float]
RISE = 1.05  # a task's last loss over its best, from which a warning says so


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that `evaluate.best` picks.

    Attributes:
        key: what it was judged by.
        weights: "model", or "average" where the averaged weights had it.
    """

    step: int
    value: float
    key: str
    weights: str = "model"


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        tasks: K names, in the order of the run.
        steps: lines of metrics.jsonl that are of an update.
        passes: those of a full validation pass.
        about: run.json; empty where there is none.
        resumed: step -> the record written when the run went on from there.
        log: what the run told, a line each.
        best: `state.json`'s, of the newest checkpoint.
        choice: of launch/choose.py.
        passed: steps whose batch was passed over.
    """

    folder: Path
    tasks: list[str]
    steps: list[Line]
    passes: list[Line]
    about: dict[str, Any]
    resumed: dict[int, dict[str, Any]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    best: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    passed: frozenset[int] = frozenset()

    @property
    def config(self) -> dict[str, Any]:
        return self.about.get("config", {})

    @property
    def length(self) -> int:
        """Steps of the whole run."""
        # A resumed run may be longer than it was first meant to be.
        newest = self.resumed[max(self.resumed)] if self.resumed else self.about
        return newest.get("steps", self.last)

    @property
    def last(self) -> int:
        """Updates so far, as far as they are recorded."""
        # An update's line has the steps before it, a pass's those completed.
        ends = [line["step"] + 1 for line in self.steps[-1:]]
        return int(max([line["step"] for line in self.passes[-1:]] + ends, default=0))

    @cached_property
    def losses(self) -> np.ndarray:
        """(E, K) nats per target token (or pair, or row) of the full passes."""
        return self.column(self.passes, "eval", "loss")

    @property
    def at(self) -> np.ndarray:
        """(E,) the steps of the full passes."""
        return np.array([line["step"] for line in self.passes], dtype=np.int64)

    def column(self, lines: Sequence[Line], group: str, what: str) -> np.ndarray:
        """(T, K) of `group/<task>/what`; nan where a line has none."""
        tags = [f"{group}/{task}/{what}" for task in self.tasks]
        found = [[line.get(tag, np.nan) for tag in tags] for line in lines]
        # reshape: no lines at all give (0, K).
        return np.array(found, dtype=np.float64).reshape(len(lines), len(tags))

    @cached_property
    def chosen(self) -> Chosen | None:
        """None where no pass can be judged: a measure, before the first checkpoint."""
        key = self.config.get("evaluate", {}).get("best", "macro")
        tag = key if key in BEST else f"{key}/loss" if key in self.tasks else None
        if tag is None:  # a measure: only the run knows whether high is good
            found = self.best
            return found and Chosen(
                int(found["step"]), found["value"], key, found.get("weights", "model")
            )
        best = None
        for line in self.passes:
            for weights, group in (("model", "eval"), ("average", "eval/average")):
                value = line.get(f"{group}/{tag}")
                if value is not None and (best is None or value < best.value):
                    best = Chosen(int(line["step"]), value, key, weights)
        return best

    def chosen_losses(self) -> np.ndarray | None:
        """(K,) losses at the chosen checkpoint, of the weights that were chosen."""
        if self.chosen is None:
            return None
        group = "eval" if self.chosen.weights == "model" else "eval/average"
        lines = [line for line in self.passes if line["step"] == self.chosen.step]
        return self.column(lines, group, "loss")[0] if lines else None

    def warnings(self) -> list[str]:
        """What a reader should know before anything else."""
        found = [line for line in self.log if line.lower().startswith(("warning", "error"))]
        if self.last < self.length:
            found.append(f"Not over: step {self.last} of {self.length}.")
        for step, later in sorted(self.resumed.items()):
            known, now = self.about.get("versions", {}), later.get("versions", {})
            changed = [
                f"{name} {known.get(name)} -> {now.get(name)}"
                for name in sorted({*known, *now})
                if known.get(name) != now.get(name)
            ]
            found.append(f"Resumed at step {step}" + f", with {', '.join(changed)}" * bool(changed))
        if not self.about:
            found.append("No run.json: configuration, versions and revision are unknown.")
        if str(self.about.get("git")).endswith("-dirty"):
            found.append("The code had changes that no git revision holds.")
        numbers = [line["step"] for line in self.steps]
        if numbers and len(numbers) != numbers[-1] - numbers[0] + 1:
            found.append("Steps are missing in metrics.jsonl, passed over, or in it twice.")
        found += self._of_tasks()
        return found

    def _of_tasks(self) -> list[str]:
        found = []
        absent = (self.column(self.steps, "train", "tokens") == 0).sum(0)
        weights = self.column(self.steps, "train", "weight")
        for k, task in enumerate(self.tasks):
            losses = self.losses[:, k]
            if len(losses) > 1 and losses.argmin() == 0:
                found.append(f"{task}: no pass was better than the start.")
            elif len(losses) > 1 and losses[-1] > RISE * losses.min():
                rise = 100 * (losses[-1] / losses.min() - 1)
                at = self.at[losses.argmin()]
                found.append(
                    f"{task}: the last loss is {rise:.0f} % above its best (step {at}): it overfits"
                )
            # A task that was dropped on purpose has no weight at the end.
            if absent[k] and weights[-1, k] > 0:
                found.append(f"{task}: {absent[k]} of {len(self.steps)} batches have none of it.")
        return found


def read(folder: Path) -> Record:
    """Raises ValueError where the folder holds no run, or a line of its metrics is damaged."""
    folder = Path(folder)
    tasks, steps, passes, every = lines(folder)
    log, later = folder / LOG, run_records(folder)
    return Record(
        folder,
        tasks,
        steps,
        passes,
        _json(folder / "run.json") or {},
        {step: _json(path) or {} for step, path in later.items() if step},
        log.read_text(encoding="utf-8").splitlines() if log.is_file() else [],
        _best(folder / "checkpoints"),
        _json(folder / CHOICE),
        frozenset(int(line["step"]) for line in every if "train/passed_over" in line),
    )


def _json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Half written or damaged: the report shows what the other files say.
    except (OSError, ValueError):
        return None


def _best(checkpoints: Path) -> dict[str, Any] | None:
    pointer = checkpoints / "latest"
    if not pointer.is_file():
        return None
    state = _json(checkpoints / pointer.read_text(encoding="utf-8").strip() / "state.json")
    return state and state["run"]["best"]
