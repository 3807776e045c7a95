"""A run's recorded losses through any balancer: the weights that it would have given. Needs no
model.

The losses stay those of the recorded run. Other weights would have led to other losses, so what is
shown is how a balancer reads a run, not what it makes of one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from balancers import METHODS, Balancer, Grouped, Holder, Signal, Signals, make
from mtl.config.document import Document
from mtl.report.record import Record

FILE = "replay.json"
CAVEAT = (
    "The losses are those of the recorded run. Under other weights the run would have had other "
    "losses: this shows how a balancer reads the run, not what it makes of it."
)


@dataclass(frozen=True)
class Replay:
    """What a balancer makes of a run's record.

    Attributes:
        balancer: name and settings, as the YAML would have them.
        tasks: K names.
        steps: (T,) optimizer updates before each weight.
        weights: (T, K) what the balancer gives, with the tasks' `loss_weight`.
        recorded: (T, K) what the run had.
        notes: what is not as it was in the run.
    """

    balancer: Any
    tasks: list[str]
    steps: np.ndarray
    weights: np.ndarray
    recorded: np.ndarray
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """It as JSON has it, with the caveat."""
        lists = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}
        return {"about": CAVEAT, **lists}


def replay(record: Record, balancer: Any) -> Replay:
    """Feed what `metrics.jsonl` has to a balancer, step by step.

    Args:
        balancer: a name, or a mapping of a name and its keywords.

    Raises:
        ValueError: it does not exist, its keywords or the tasks do not fit it, or it reads what no
            run records: gradients.
    """
    settings = {task: record.config.get("tasks", {}).get(task, {}) for task in record.tasks}
    weights = [task.get("loss_weight", 1.0) for task in settings.values()]
    groups = {name: task.get("group") for name, task in settings.items()}
    holder = Holder(Grouped.of(make(balancer), groups), record.tasks, weights)
    lines = record.steps
    notes = _check(record, holder.balancer)
    found = np.array([holder.update(signals).copy() for signals in _signals(record)])
    had = record.column(lines, "draws", "weight")
    trained = record.column(lines, "train", "weight")
    # Where draws follow weights, `train/weight` is the batch's part and not the weight.
    had = np.where(np.isnan(had), trained, had)
    steps = np.array([line["step"] for line in lines])
    return Replay(balancer, record.tasks, steps, found.reshape(had.shape), had, notes)


def _check(record: Record, balancer: Balancer) -> list[str]:
    """What differs from the run. Raises ValueError where nothing can be replayed."""
    needs, lines = balancer.needs, record.steps
    if not lines:
        raise ValueError(f"{record.folder}: found no step in metrics.jsonl, wanted one to replay.")
    if needs & (Signal.GRAM | Signal.VALID_GRAM):
        raise ValueError(
            f"{type(balancer).__name__} reads products of gradients, which metrics.jsonl does not "
            "hold. Replay a method that reads losses: CoBa, DWA, FAMO, LBTW, Uncertainty ..."
        )
    if Signal.REPLAY_LOSS in needs and not any(_tagged(lines, "replay")):
        raise ValueError(
            f"{type(balancer).__name__} reads each batch's loss after its update. {record.folder} "
            "did not measure it, as its balancer did not ask."
        )
    notes = []
    if Signal.VALID_LOSS in needs and not any(_tagged(lines, "probe")):
        notes.append(
            "The run recorded no probes, as its balancer read none. Full validation passes stand "
            "in for them: fewer, less noisy, and without groups of rows."
        )
    if lines[0]["step"] > 0:
        notes.append(f"The record begins at step {lines[0]['step']}.")
    patience = record.config.get("evaluate", {}).get("patience")
    if patience and patience["action"] != "log":
        notes.append(
            f"The recorded weights include evaluate.patience ({patience['action']}); the replayed "
            "ones are the balancer's alone."
        )
    return notes


def _tagged(lines: Sequence[Mapping[str, float]], group: str) -> list[bool]:
    return [any(tag.startswith(f"{group}/") for tag in line) for line in lines]


def _signals(record: Record) -> list[Signals]:
    """What stood in the signals of each recorded step."""
    lines = record.steps
    losses = record.column(lines, "train", "loss")
    after = record.column(lines, "replay", "loss")
    tokens = record.column(lines, "train", "tokens")
    probes = record.column(lines, "probe", "loss")
    bases = record.column(lines, "probe", "base")
    passes = record.at.tolist()
    at = dict(zip(passes, record.losses, strict=True))
    has_probes = np.isfinite(probes).any()
    found = []
    for n, line in enumerate(lines):
        t = line["step"]
        valid: dict[str, Any] = {}
        if "probe/group" in line or np.isfinite(probes[n]).any():
            group = line.get("probe/group")
            valid = {"valid_loss": probes[n], "valid_base": bases[n]}
            valid["valid_group"] = None if group is None else int(group)
        elif not has_probes and t in at:
            valid = {"valid_loss": at[t], "valid_base": record.losses[0]}
        # Signals hold the update before, over batches that were passed over. Where lines are
        # missing there is none.
        between = range(int(lines[n - 1]["step"]) + 1, int(t)) if n else ()
        before = n and lines[n - 1]["step"] < t and record.passed.issuperset(between)
        found.append(
            Signals(
                step=t,
                tokens=tokens[n] if np.isfinite(tokens[n]).all() else None,
                train_loss=losses[n - 1] if before else None,
                replay_loss=after[n - 1] if before and np.isfinite(after[n - 1]).any() else None,
                **valid,
            )
        )
    return found


def asked(record: Record, name: str | None, settings: Sequence[str]) -> Any:
    """The balancer that a command line asks for. Settings that are not given stay as the run had
    them, where it is the run's method.

    Args:
        name: a method's name in any case; None: the run's.
        settings: `--key value` or `--key=value`, each value YAML.

    Raises:
        ValueError: an unknown name; something that is no setting.
    """
    had = record.config.get("balancer")
    if had is None:
        raise ValueError(f"{record.folder}: found no run.json, which says what the run was.")
    had = dict(had) if isinstance(had, Mapping) else {"name": had}
    names = {known.lower(): known for known in METHODS}
    if name is None:
        name = had["name"]
    elif name.lower() not in names:
        raise ValueError(f"--balancer: found {name}, wanted one of {', '.join(METHODS)}.")
    else:
        name = names[name.lower()]
    made = had if had["name"] == name else {"name": name}
    rest = list(settings)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or (not equals and not rest):
            raise ValueError(f"found {key!r}, wanted --SETTING VALUE, as in --tau 3.")
        value = value if equals else rest.pop(0)
        document = Document(f"value: {value}", key)
        if document.problems:
            raise ValueError(f"{key}: found {value!r}, wanted a value as the YAML has it.")
        made[key[2:].replace("-", "_")] = document.data["value"]
    return made["name"] if len(made) == 1 else made


def table(one: Replay, parts: int = 5) -> str:
    """Mean weights in parts of the run, recorded and replayed, and their mean distance."""
    many = min(parts, len(one.steps))
    wide = max(4, *map(len, one.tasks))
    lines = [f"{'task':{wide}}  {'':8}  mean weight in {many} parts of the run"]
    lines.append("-" * max(len(lines[0]), wide + 12 + 7 * many))
    for k, task in enumerate(one.tasks):
        for what, values in (("recorded", one.recorded), ("replayed", one.weights)):
            cells = [f"{part.mean():.3f}" for part in np.array_split(values[:, k], many)]
            lines.append(f"{task if what == 'recorded' else '':{wide}}  {what}  {'  '.join(cells)}")
    apart = np.abs(one.weights - one.recorded).mean()
    return "\n".join([*lines, f"mean distance of a weight from the recorded one: {apart:.4f}"])


def read(folder: Path) -> dict[str, Any] | None:
    """What launch/replay.py left in a run's folder. Raises ValueError where that is damaged."""
    path = folder / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path}: found no JSON ({error}), wanted what launch/replay.py writes. Call that once "
            "more, or delete the file."
        ) from None
