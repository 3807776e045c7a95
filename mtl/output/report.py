"""What a run did, read from its metrics.jsonl: a table for the terminal, a figure for the
README.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl.output.trackers import read_metrics

TASK_LOSS = re.compile(r"eval/[^/]+/loss")
CHOICE = "choice.json"  # of launch/choose.py
PARTS = 5  # of a run, over which a task's weight is averaged in the table


@dataclass(frozen=True)
class History:
    """One run's curves.

    Attributes:
        tasks: names, in the order of the run.
        eval_steps: (E,) optimizer updates before each full validation pass.
        eval_losses: (E, K) nats per target token.
        steps: (T,) updates.
        weights: (T, K) of each update.
        averages: (E,) macro losses of the averaged weights; nan where there is no average.
        choice: what launch/choose.py found; None: it has not run.
        teacher_rows: training rows that best weights of tasks have read, for `action: anchor`.
    """

    tasks: list[str]
    eval_steps: np.ndarray
    eval_losses: np.ndarray
    steps: np.ndarray
    weights: np.ndarray
    averages: np.ndarray
    choice: dict[str, Any] | None = None
    teacher_rows: int = 0

    @property
    def best_steps(self) -> dict[str, int]:
        """Task -> the step of its least validation loss, the first of equals."""
        at = self.eval_steps[self.eval_losses.argmin(0)]
        return dict(zip(self.tasks, at.tolist(), strict=True))


def best_steps(path: Path) -> dict[str, int]:
    """The same, of a run's folder or of its JSON among a study's results.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read, or is something else.
    """
    if path.suffix == ".json":
        return {
            task: int(step)
            for task, step in json.loads(path.read_text(encoding="utf-8"))["steps"]["own"].items()
        }
    return read(path).best_steps


def histories(outputs: Sequence[Path]) -> dict[str, History]:
    """The curves of runs, by what their paths do not share.

    Raises:
        ValueError: a folder that is no run or is given twice.
    """
    names = names_of(outputs)
    return {name: read(output) for name, output in zip(names, outputs, strict=True)}


def names_of(outputs: Sequence[Path]) -> list[str]:
    """Each path without the folders that all of them begin and end with: s0/run s1/run -> s0 s1."""
    paths = [Path(os.path.abspath(output)).parts for output in outputs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"{outputs[i]}: found this run twice, wanted it once.")
    if len(paths) == 1:
        return [paths[0][-1]]
    start = _shared(paths)
    end = _shared([path[start:][::-1] for path in paths])
    if any(len(path) == start + end for path in paths):  # one path begins, or ends, with another
        start, end = start - 1, 0
    return ["/".join(path[start : len(path) - end]) for path in paths]


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with."""
    count = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


class Lines(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
        tasks: K names, in the order of the run.
        steps: lines of an update. passes: lines of a full validation pass. every: all lines.
    """

    tasks: list[str]
    steps: list[Mapping[str, float]]
    passes: list[Mapping[str, float]]
    every: list[Mapping[str, float]]


def lines(output: Path) -> Lines:
    """Raises ValueError where the run has no metrics yet, or a line of them is damaged."""
    path = Path(output) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted the folder of a run (its `output:`).")
    every = read_metrics(path)
    passes = [line for line in every if "eval/macro" in line]
    if not passes:
        raise ValueError(f"{path}: no validation pass in it yet.")
    # Between "eval/" and "/loss".
    tasks = [tag[5:-5] for tag in passes[0] if TASK_LOSS.fullmatch(tag)]
    return Lines(tasks, [line for line in every if "train/loss" in line], passes, every)


def read(output: Path) -> History:
    """Raises ValueError where the run has no metrics yet, or a line of them is damaged."""
    tasks, trains, evals, records = lines(output)
    chosen = Path(output) / CHOICE
    return History(
        tasks,
        np.array([r["step"] for r in evals]),
        np.array([[r[f"eval/{t}/loss"] for t in tasks] for r in evals]),
        np.array([r["step"] for r in trains]),
        np.array([[r[f"train/{t}/weight"] for t in tasks] for r in trains]).reshape(-1, len(tasks)),
        np.array([r.get("eval/average/macro", np.nan) for r in evals]),
        json.loads(chosen.read_text(encoding="utf-8")) if chosen.is_file() else None,
        int(sum(r.get("anchor/rows", 0) for r in records)),
    )


def table(history: History) -> str:
    """Every task's validation loss at the start, at its best step and at the end, and its mean
    weight in fifths of the run.
    """
    # A run shorter than PARTS has empty ones.
    parts = [part for part in np.array_split(history.weights, PARTS) if len(part)]
    header = [
        "task",
        "start",
        "best",
        "at step",
        "end",
        "above best",
        f"mean weight in {len(parts)} parts of the run",
    ]
    rows = []
    for k, task in enumerate(history.tasks):
        losses = history.eval_losses[:, k]
        best = int(losses.argmin())
        numbers = [
            f"{losses[0]:.3f}",
            f"{losses[best]:.3f}",
            f"{history.eval_steps[best]}",
            f"{losses[-1]:.3f}",
        ]
        rise = f"{100 * (losses[-1] / losses[best] - 1):.1f} %"
        rows.append([task, *numbers, rise, "  ".join(f"{part[:, k].mean():.2f}" for part in parts)])
    macro = history.eval_losses.mean(1)
    best = int(macro.argmin())
    numbers = [
        f"{macro[0]:.3f}",
        f"{macro[best]:.3f}",
        f"{history.eval_steps[best]}",
        f"{macro[-1]:.3f}",
    ]
    rows.append(["macro mean", *numbers, f"{100 * (macro[-1] / macro[best] - 1):.1f} %", ""])
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    align = [str.ljust, *[str.rjust] * 5, str.ljust]
    lines = [
        "  ".join(a(x, w) for a, x, w in zip(align, row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def choice(record: dict[str, Any]) -> str:
    """The models of a run that were compared at its end: losses by task on the rows that report."""
    models = record["models"]
    first = next(iter(models.values()))
    names = [name for name in first["reported"] if name not in ("token", "worst", "log")]
    rows = [[f"{record['unit']} on {record['rows']}", *names, "chosen by " + record["by"]]]
    for name, one in models.items():
        mark = "*" if name == record["chosen"] else " "
        figures = [f"{one['reported'][n]:.3f}" for n in names]
        rows.append([f"{mark} {name}", *figures, f"{one['chosen by']:.3f}"])
    wide, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(wide), *map(str.rjust, row[1:], widths)]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def figure(runs: dict[str, History], path: Path) -> None:
    """Per task: validation loss over its start, one line a run; below, the weights; last, the macro
    loss of the trained weights, of their average, and of what was chosen from at the end. Needs
    matplotlib (the extra `plot`).

    Raises:
        ValueError: runs of unlike tasks; no matplotlib.
    """
    (first, known), *others = runs.items()
    for name, history in others:
        if set(history.tasks) != set(known.tasks):
            raise ValueError(
                f"{name}: found a run of {', '.join(history.tasks)}, wanted one of the tasks of "
                f"{first}, {', '.join(known.tasks)}. Draw runs of unlike tasks apart."
            )
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as e:
        raise ValueError("matplotlib is not installed: pip install matplotlib.") from e
    fig, axes = plt.subplots(
        3, len(runs), figsize=(4.6 * len(runs), 8.5), sharex=True, sharey="row", squeeze=False
    )
    limits = []  # of the macro losses; the runs share the axis
    for column, (name, history) in enumerate(runs.items()):
        ratios = history.eval_losses / history.eval_losses[0]
        for task in next(iter(runs.values())).tasks:  # in one order, so in the same colours
            k = history.tasks.index(task)
            (line,) = axes[0, column].plot(history.eval_steps, ratios[:, k], label=task)
            best = int(ratios[:, k].argmin())
            axes[0, column].plot(
                history.eval_steps[best], ratios[best, k], "o", color=line.get_color(), markersize=4
            )
            axes[1, column].plot(
                history.steps, history.weights[:, k], color=line.get_color(), linewidth=1
            )
        axes[0, column].set_title(name)
        limits.append(_macro(axes[2, column], history))
        axes[2, column].set_xlabel("optimizer steps")
    lows, highs = zip(*limits, strict=True)
    axes[2, 0].set_ylim(min(lows), max(highs))
    axes[0, 0].set_ylabel("validation loss / its start  (dot: best)")
    axes[1, 0].set_ylabel("weight")
    axes[2, 0].set_ylabel("macro validation loss")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _macro(axes: Any, history: History) -> tuple[float, float]:
    """Macro losses: along the run, and as lines those of merges. Returns what to show of the axis,
    from and to.
    """
    macro = history.eval_losses.mean(1)
    axes.plot(history.eval_steps, macro, color="black", label="trained weights")
    if np.isfinite(history.averages).any():
        axes.plot(history.eval_steps, history.averages, "--", color="black", label="their average")
    models = (history.choice or {"models": {}})["models"]
    merges = {n: one["validation"]["macro"] for n, one in models.items() if " of task bests" in n}
    for i, (name, loss) in enumerate(merges.items()):
        axes.axhline(loss, color=f"C{i}", linestyle=":", label=name)
    low = min([macro.min(), *merges.values()])  # the start is far above what is to be compared
    # Between where the curves fall and where they rise again.
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.56, 1))
    return low - 0.1 * (np.median(macro) - low) - 1e-6, 2 * np.median(macro) - low + 1e-6
