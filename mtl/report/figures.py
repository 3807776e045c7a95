"""Figures as plain values, which the page's script draws (`assets/report.js`).

A figure has an x of steps and series over it; None is a gap. A run of many steps is thinned: each
point is then the mean over a stretch of equal length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mtl.report.compare import show
from mtl.report.record import Line, Record

MOST = 1500  # points of a curve: more than a screen has columns
DIGITS = 6


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        y: a number or None at each x of its figure.
        color: which of the palette's; a task has the same everywhere.
        dash: 0: a full line; 1, 2: dashed, dotted.
        low, high: edges of a band around it.
    """

    name: str
    y: list[float | None]
    color: int = 0
    dash: int = 0
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@dataclass(frozen=True)
class Figure:
    """One chart.

    Attributes:
        about: what it shows, for all readers; the chart's label for those who do not see it.
        unit: of y.
        kind: "line", or "area": the series are stacked.
        marks: (series, place in x) of what is marked with a dot.
        lines: (x, text) of vertical lines.
        span: the least and the highest x to show.
        group: figures of a group share zoom and cursor.
    """

    id: str
    title: str
    about: str
    unit: str
    x: list[float]
    series: list[Series]
    kind: str = "line"
    marks: list[tuple[int, int]] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    span: tuple[float, float] = (0, 1)
    group: str = ""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def of_run(record: Record, prefix: str = "", replayed: Mapping[str, Any] | None = None) -> list:
    """Everything of one run, all on the same axis of steps. Figures without data are left out.

    Args:
        prefix: of the figures' names; theirs alone share zoom and cursor.
        replayed: what launch/replay.py wrote.
    """
    lines = record.steps
    made = [_ratios(record), _weights(record)]
    if replayed:
        made += _replayed(record, replayed)
    made += [*_explained(record), _draws(record), _tokens(record)]
    passes = record.passes
    made += [
        _numbers("speed", "Throughput", "Target tokens trained on per second.", "tokens / s",
                 lines, {"tokens per second": "train/tokens_per_second"}),
        _numbers("memory", "Memory", "The most that the first process had held, in GiB.", "GiB",
                 passes, {"host": "memory/host_gib", "device": "memory/device_gib"}),
    ]  # fmt: skip
    chosen = [] if record.chosen is None else [(record.chosen.step, _choice(record))]
    found = []
    for one in made:
        if one is not None and one.x and any(v is not None for s in one.series for v in s.y):
            plain = {**vars(one), "id": f"{prefix}{one.id}", "lines": chosen, "group": prefix}
            plain["span"] = (0, max(record.last, 1))
            found.append(Figure(**plain))
    return found


def _choice(record: Record) -> str:
    averaged = ", average" if record.chosen.weights == "average" else ""
    return f"chosen: {record.chosen.step}{averaged}"


def _ratios(record: Record) -> Figure:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = record.losses / record.losses[0]
    # Six colours; from the seventh task on they come again, dashed.
    series = [
        Series(task, _list(ratios[:, k]), k % 6, k // 6) for k, task in enumerate(record.tasks)
    ]
    best = [(k, int(at)) for k, at in enumerate(record.losses.argmin(0))]
    about = (
        "Validation loss of every task, divided by its loss at the start. A dot marks each task's "
        "own best; the vertical line is the chosen checkpoint."
    )
    x = record.at.tolist()
    return Figure("loss", "Loss ratio", about, "loss / loss at start", x, series, marks=best)


def _by_task(record: Record, group: str, what: str) -> tuple[list[float], np.ndarray]:
    """Steps and (T, K) of the lines that have it, thinned."""
    values = record.column(record.steps, group, what)
    seen = np.isfinite(values).any(1)
    x = np.array([line["step"] for line in record.steps])[seen]
    return thin(x, values[seen])


def _of_tasks(record: Record, x: list[float], values: np.ndarray) -> list[Series]:
    """A curve of each task that has one: a task made `of` others' rows has no draws."""
    made = [Series(t, _list(values[:, k]), k % 6, k // 6) for k, t in enumerate(record.tasks)]
    return [one for one in made if any(v is not None for v in one.y)]


def _weights(record: Record) -> Figure:
    x, values = _by_task(record, "train", "weight")
    about = "What each task's loss was multiplied by, stacked: a task's part of the band is its own"
    series = _of_tasks(record, x, values)
    # Weights below 0 (methods that subtract gradients) cannot be stacked.
    kind = "line" if (values < 0).any() else "area"
    return Figure("weights", "Weights", f"{about}.", "weight", x, series, kind)


def _replayed(record: Record, replayed: Mapping[str, Any]) -> list[Figure]:
    x, values = thin(np.array(replayed["steps"]), np.array(replayed["weights"], float))
    given = replayed["balancer"]
    name = given if isinstance(given, str) else given["name"]
    about = f"What {show(given)} gives on the losses of this run. {replayed['about']}"
    series = _of_tasks(record, x, values)
    kind = "line" if (values < 0).any() else "area"
    return [Figure("replayed", f"Weights replayed: {name}", about, "weight", x, series, kind)]


MEANINGS = {
    "slope": "Slope of each task's validation loss ratio, per step: below 0 it falls.",
    "rcs": "Relative convergence score (RCS): a task that converges more slowly has more.",
    "acs": "Absolute convergence score (ACS): a task that diverges by its own history has less.",
    "df": "Divergence factor (DF): 1: RCS decides; near 0: tasks diverge, and ACS decides.",
    "panel": "1: slopes within groups of validation rows; 0: too few probes yet.",
}


def _explained(record: Record) -> list[Figure]:
    """A figure for each thing that the balancer says of its weights."""
    tags = dict.fromkeys(tag for line in record.steps for tag in line)
    known = ("train", "draws", "probe", "replay", "time", "eval", "patience", "memory")
    parts = [tag.split("/") for tag in tags if "/" in tag and tag.split("/")[0] not in known]
    found = []
    for method, what in dict.fromkeys((one[0], one[-1]) for one in parts if len(one) == 3):
        x, values = _by_task(record, method, what)
        series = _of_tasks(record, x, values)
        about = MEANINGS.get(what, f"{what}, by which {method} explains its weights.")
        title = what.upper() if len(what) == 3 else what.capitalize()
        found.append(Figure(f"explain-{what}", title, about, what, x, series))
    for method, what in (one for one in parts if len(one) == 2):
        about = MEANINGS.get(what, f"{what}, by which {method} explains its weights.")
        title = what.upper() if len(what) == 2 else what.capitalize()
        tag = f"{method}/{what}"
        found.append(_numbers(f"explain-{what}", title, about, what, record.steps, {what: tag}))
    # What needs most explaining comes first, and what we have no words for last.
    order = {f"explain-{what}": n for n, what in enumerate(MEANINGS)}
    return sorted(found, key=lambda one: order.get(one.id, len(order)))


def _draws(record: Record) -> Figure | None:
    """Planned shares, and what was drawn: the mean over the run so far."""
    planned = record.column(record.steps, "draws", "planned")
    actual = record.column(record.steps, "draws", "actual")
    if not len(actual) or not np.isfinite(actual).any():
        return None
    # Lines without draws count neither as a step nor as 0.
    so_far = np.nancumsum(actual, 0) / np.isfinite(actual).cumsum(0).clip(1)
    # Together, so that both are thinned into the same stretches.
    x, both = thin(np.array([line["step"] for line in record.steps]), np.hstack([planned, so_far]))
    k = len(record.tasks)
    series = _of_tasks(record, x, both[:, k:])
    series += [
        Series(f"{task} (planned)", _list(both[:, n]), n % 6, 1)
        for n, task in enumerate(record.tasks)
        if np.isfinite(both[:, n]).any()
    ]
    about = "Each task's part of the examples, over the run so far; dashed: its planned share."
    return Figure("draws", "Shares of the draws", about, "share", x, series)


def _tokens(record: Record) -> Figure:
    tokens = record.column(record.steps, "train", "tokens")
    total = np.nancumsum(tokens, 0)
    x, values = thin(np.array([line["step"] for line in record.steps]), total)
    about = "Target tokens that each task was trained on so far, stacked."
    series = _of_tasks(record, x, values)
    return Figure("tokens", "Target tokens", about, "target tokens", x, series, "area")


def _numbers(
    id: str, title: str, about: str, unit: str, lines: Sequence[Line], tags: Mapping[str, str]
) -> Figure:
    """Numbers that belong to no task."""
    kept = [line for line in lines if any(tag in line for tag in tags.values())]
    values = np.array([[line.get(tag, np.nan) for tag in tags.values()] for line in kept], float)
    x, values = thin(np.array([line["step"] for line in kept]), values.reshape(-1, len(tags)))
    series = [Series(name, _list(values[:, n]), n) for n, name in enumerate(tags)]
    series = [one for one in series if any(v is not None for v in one.y)]
    return Figure(id, title, about, unit, x, series)


def overlaid(groups: Mapping[str, Sequence[Record]], task: str, id: str) -> Figure:
    """One task in several runs: loss over its start. Runs that differ in their seed alone are one
    curve, their mean, in a band from the lowest to the highest.

    Args:
        groups: a name -> the runs of it.
    """
    steps = sorted({int(t) for runs in groups.values() for one in runs for t in one.at})
    place = {t: n for n, t in enumerate(steps)}
    series = []
    for n, (name, runs) in enumerate(groups.items()):
        values = np.full((len(runs), len(steps)), np.nan)
        for r, one in enumerate(runs):
            losses = one.losses[:, one.tasks.index(task)]
            values[r, [place[int(t)] for t in one.at]] = losses / losses[0]
        seen = np.isfinite(values).all(0)  # where all have it: else the mean would jump
        mean, low, high = (np.full(len(steps), np.nan) for _ in range(3))
        mean[seen] = values[:, seen].mean(0)
        band = {}
        if len(runs) > 1:
            low[seen], high[seen] = values[:, seen].min(0), values[:, seen].max(0)
            band = {"low": _list(low), "high": _list(high)}
            name = f"{name} ({len(runs)} seeds)"
        series.append(Series(name, _list(mean), n % 6, n // 6, **band))
    about = f"Validation loss of {task}, divided by its loss at the start, in every run."
    if any(one.low for one in series):
        about += " Bands reach from the lowest to the highest of a run's seeds."
    marks = [
        (n, int(np.nanargmin(np.array(one.y, float))))
        for n, one in enumerate(series)
        if any(v is not None for v in one.y)
    ]
    span, unit = (0, max(steps[-1], 1)), "loss / loss at start"
    return Figure(id, task, about, unit, steps, series, marks=marks, span=span, group=id)


def thin(x: np.ndarray, values: np.ndarray) -> tuple[list[float], np.ndarray]:
    """At most `MOST` points: means over stretches of equal length, each at its first x.

    Args:
        x: (T,). values: (T, n); nan = none.
    """
    many = -(-len(x) // MOST)
    if many <= 1:
        return x.tolist(), values
    starts = np.arange(0, len(x), many)
    count = np.add.reduceat(np.isfinite(values), starts)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.nan_to_num(values), starts) / count
    return x[starts].tolist(), means


def _list(values: np.ndarray) -> list[float | None]:
    """Of significant digits that a chart can show; None for nan."""
    return [float(f"{v:.{DIGITS}g}") if np.isfinite(v) else None for v in values.tolist()]
