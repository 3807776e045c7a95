"""Several runs side by side: what differs in their settings, what each is called, what each
reached.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl.compare.statistics import mean_interval
from mtl.output.report import names_of
from mtl.report.record import Record, read

BALANCER, SEED = "balancer", "train.seed"  # the first and the last of a run's name
ELSEWHERE = ("output", "cache", "trackers")  # where a run writes, not what it is
LONGEST = 48  # characters of a name made of settings


@dataclass(frozen=True)
class Side:
    """Runs of the same tasks.

    Attributes:
        runs: name -> run.
        differences: dotted key -> each run's value, in the order of `runs`; only what differs.
        groups: name -> the runs' names that differ in their seed alone.
    """

    runs: dict[str, Record]
    differences: dict[str, list[Any]]
    groups: dict[str, list[str]]

    @property
    def tasks(self) -> list[str]:
        return next(iter(self.runs.values())).tasks


def sides(folders: Sequence[Path]) -> list[Side]:
    """The runs, those of the same tasks together.

    Raises:
        ValueError: a folder that is no run, or is given twice.
    """
    found: dict[frozenset[str], list[tuple[str, Record]]] = {}
    for path, folder in zip(names_of(folders), folders, strict=True):
        record = read(folder)
        found.setdefault(frozenset(record.tasks), []).append((path, record))
    return [_side(pairs) for pairs in found.values()]


def _side(pairs: Sequence[tuple[str, Record]]) -> Side:
    records = [record for _, record in pairs]
    differs = differences([one.config for one in records])
    settings = {key: values for key, values in differs.items() if key != SEED}
    bare = [_named(settings, n) for n in range(len(pairs))]
    full = [_named(differs, n) for n in range(len(pairs))]
    # By settings where these tell runs apart in few words; else by where they lie.
    short = all(full) and len(set(full)) == len(full) and max(map(len, full)) <= LONGEST
    if not short:
        full = [path for path, _ in pairs]
    alike: dict[str, list[int]] = {}
    for n in range(len(pairs)):
        key = json.dumps([values[n] for values in settings.values()], sort_keys=True)
        alike.setdefault(key, []).append(n)
    seeds = differs.get(SEED, [None] * len(pairs))
    groups = {}
    for each in alike.values():
        # Two runs of one seed are not seeds of each other: then each is by itself.
        apart = len({seeds[n] for n in each}) < len(each)
        for some in [[n] for n in each] if apart else [each]:
            name = (bare[some[0]] or "all seeds") if short and len(some) > 1 else _group(some, full)
            groups[name] = [full[n] for n in some]
    runs = {name: record for name, record in zip(full, records, strict=True)}
    return Side(runs, differs, groups)


def _group(each: Sequence[int], names: Sequence[str]) -> str:
    return names[each[0]] if len(each) == 1 else " & ".join(names[n] for n in each)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key -> each config's value (None where it has none), of keys that differ:
    the balancer first, the seed last.
    """
    flat = [dict(_flat(one)) for one in configs]
    # False sorts before True.
    keys = sorted({key for one in flat for key in one}, key=lambda k: (k == SEED, k != BALANCER, k))
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if any(value != values[0] for value in values) and key.partition(".")[0] not in ELSEWHERE
    }


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        # The balancer is one setting, with its keywords.
        if isinstance(inner, Mapping) and inner and key != BALANCER:
            yield from _flat(inner, f"{above}{key}.")
        else:
            yield f"{above}{key}", inner


def show(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{k} {show(v)}" for k, v in value.items() if k != "name")
        name = [str(value["name"])] if "name" in value else []
        return " ".join([*name, *[f"({rest})"] * bool(rest)])
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _named(differs: Mapping[str, Sequence[Any]], n: int) -> str:
    """`CoBa (tau 3), seed 1`."""
    parts = []
    for key, values in differs.items():
        last = key.rpartition(".")[2]
        parts.append(show(values[n]) if key == BALANCER else f"{last} {show(values[n])}")
    return ", ".join(parts)


def table(side: Side) -> list[dict[str, Any]]:
    """A row of each task, then macro, worst and the spread of convergence.

    A row is {"name", "cells": a cell of each run}; a cell {"loss", "step", "gap", "best": whether
    it is the lowest of its row}, numbers or None. gap: loss over the task's own best, less 1. The
    spread is the standard deviation of the tasks' own best steps, as a part of the run.
    """
    rows: list[dict[str, Any]] = []
    losses = {name: _chosen(one, side.tasks) for name, one in side.runs.items()}
    for k, task in enumerate(side.tasks):
        cells = []
        for name, one in side.runs.items():
            own = one.losses[:, one.tasks.index(task)]
            loss = float(losses[name][k])
            step = int(one.at[own.argmin()])
            cells.append({"loss": loss, "step": step, "gap": loss / float(own.min()) - 1})
        rows.append({"name": task, "cells": cells})
    for name, of in (("macro", np.mean), ("worst task", np.max)):
        rows.append({"name": name, "cells": [{"loss": float(of(v))} for v in losses.values()]})
        for cell, one in zip(rows[-1]["cells"], side.runs.values(), strict=True):
            cell["step"] = one.chosen.step if one.chosen else None
    spread = [{"loss": spread_of(one)} for one in side.runs.values()]
    rows.append({"name": "convergence spread", "cells": spread})
    for row in rows:
        values = [cell["loss"] for cell in row["cells"]]
        low = np.nanmin(values) if np.isfinite(values).any() else np.nan
        for cell in row["cells"]:
            cell["best"] = bool(len(values) > 1 and cell["loss"] == low)
    return rows


def spread_of(record: Record) -> float:
    """Standard deviation of the tasks' own best steps over the steps so far."""
    return float(np.std(record.at[record.losses.argmin(0)]) / max(record.last, 1))


def _chosen(record: Record, tasks: Sequence[str]) -> np.ndarray:
    """(K,) losses at the chosen checkpoint, in the order of `tasks`; nan where none is chosen."""
    found = record.chosen_losses()
    if found is None:
        return np.full(len(tasks), np.nan)
    return found[[record.tasks.index(task) for task in tasks]]


def over_seeds(side: Side) -> list[dict[str, Any]]:
    """A row of each task and macro; a cell of each group: {"mean", "low", "high", "seeds"}, low and
    high None for one seed. Empty where no group has two.
    """
    if all(len(names) < 2 for names in side.groups.values()):
        return []
    rows = []
    for name, of in [*((task, k) for k, task in enumerate(side.tasks)), ("macro", None)]:
        cells = []
        for members in side.groups.values():
            each = [_chosen(side.runs[one], side.tasks) for one in members]
            values = [float(v.mean() if of is None else v[of]) for v in each]
            low, high = mean_interval(values) if len(values) > 1 else (None, None)
            cells.append(
                {"mean": float(np.mean(values)), "low": low, "high": high, "seeds": len(values)}
            )
        rows.append({"name": name, "cells": cells})
    return rows
