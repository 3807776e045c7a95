"""Which model of a finished run is the best: the best single checkpoint, the average of the weights
along the run, or a merge of the tasks' bests.

Validation rows are divided: one half chooses, the other reports. Where every task has `test` rows
all of validation chooses, and they report.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mtl import plugins
from mtl.build import Data
from mtl.compare import evaluation
from mtl.config import Config
from mtl.distributed import comm
from mtl.merging import sources
from mtl.merging.merge import merge
from mtl.merging.methods import named
from mtl.output.export import export
from mtl.output.files import write_json
from mtl.output.report import CHOICE
from mtl.train.evaluate import ValidationResult

METHODS = ("average", "select")
HALF = "the half of validation that did not choose"


@dataclass(frozen=True)
class Candidate:
    """A model that may be exported.

    Attributes:
        folder: whose `weights` folder it is; the model itself where that is empty.
        weights: "model", "average" or "".
    """

    folder: Path
    weights: str = ""

    @property
    def path(self) -> Path:
        return self.folder / self.weights


@dataclass(frozen=True)
class Rows:
    """What chooses and what reports; `test` is None where halves of validation do."""

    validation: Data
    test: Data | None


def rows(config: Config, allow_code: Collection[str] = ()) -> Rows:
    """Encoded, or from the cache. Call it before there is a process group."""
    tested = all(task.test is not None for task in config.streams.values())
    test = evaluation.rows(config, "test", allow_code) if tested else None
    # `task/accuracy` is one task's measure; its last part names it.
    key = config.evaluate.best.rpartition("/")[2]
    asks = any(key in mine for mine in plugins.metrics(config, allow_code).values())
    return Rows(evaluation.rows(config, "validation", allow_code, asks), test)


@contextmanager
def candidates(config: Config, methods: Sequence[str]) -> Iterator[dict[str, Candidate]]:
    """By name; merges stand in a folder that goes at the end. A collective."""
    output = Path(config.output).expanduser()
    scratch = comm.on_first(lambda: _Scratch(output))
    try:
        yield comm.on_first(lambda: _candidates(config, output, methods, scratch.path))
    finally:
        if comm.rank() == 0:
            scratch.folder.cleanup()


class _Scratch:
    """A temporary folder in the run's, of which other ranks know the path."""

    def __init__(self, output: Path):
        self.folder = TemporaryDirectory(prefix=".choice.", dir=output)
        self.path = Path(self.folder.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # `on_first` pickles its result: other ranks get the path, and no folder to delete.
        return Path, (self.path,)


def _candidates(
    config: Config, output: Path, methods: Sequence[str], scratch: Path
) -> dict[str, Candidate]:
    record, found = sources.newest(output), {}
    checkpoints = output / "checkpoints"
    if not record:
        raise ValueError(f"{output}: found no finished run (no checkpoint), wanted one.")
    single = record["run"].get("single")
    if single and single["step"]:
        at = int(single["step"])
        found[f"best single checkpoint, step {at}"] = Candidate(output / f"bests/step-{at:08d}")
    # The checkpoint whose average was the best, else the newest one's.
    of_average = record["best"] if record.get("best_weights") == "average" else record["name"]
    if (checkpoints / of_average / "average").is_dir():
        step = int(of_average[5:])
        found[f"average, step {step}"] = Candidate(checkpoints / of_average, "average")
    models = sources.bests(output)
    # A merge of one model is that model.
    for method in methods if len(set(models)) > 1 else ():
        out = scratch / method
        remote = config.model.allow_remote_code
        # force: what lies far from its base is a candidate too; its losses judge it.
        merge(
            sources.base(config), models, named(method), out, force=True, allow_remote_code=remote
        )
        found[f"{method} of task bests"] = Candidate(out)
    if not found:
        raise ValueError(
            f"{output}: found no model to choose from. Train with `checkpoint.bests: each`."
        )
    return found


def choose(
    config: Config,
    given: Rows,
    found: Mapping[str, Candidate],
    allow_code: Collection[str] = (),
) -> dict[str, Any] | None:
    """Evaluate every candidate, export the best one by `evaluate.best` into the run's `model/`, and
    write it all into the run's choice.json. A collective; rank 0 gets what that file holds.

    Raises:
        ValueError: `evaluate.best` is a measure, and there are no test rows: halves have losses.
    """
    names, key = list(config.tasks), config.evaluate.best
    kind = given.validation.measures.get(key.rpartition("/")[2])
    if kind is not None and given.test is None:
        raise ValueError(
            f"{config.where('evaluate.best')}: evaluate.best: found the measure {key}, and tasks "
            "without `test` rows. Halves of validation have losses alone: name test rows."
        )
    halves = given.test is None
    evaluate = evaluation.evaluator(config, given.validation, halves=halves, allow_code=allow_code)
    passes = {name: evaluate(one.path) for name, one in found.items()}
    if given.test is None:
        chosen, reported = ({n: _half(p, g) for n, p in passes.items()} for g in (0, 1))
    else:
        chosen, tested = passes, evaluation.evaluator(config, given.test, allow_code=allow_code)
        reported = {name: tested(one.path) for name, one in found.items()}

    def value(name: str) -> float:
        one = chosen[name]
        return (one.summary(names) | one.measured(names, given.validation.measures))[key]

    better = max if kind is not None and kind.highest else min
    best = better(found, key=value)
    # Only now: the evaluations above are collectives.
    if comm.rank() > 0:
        return None
    record = {
        "chosen": best,
        "by": key,
        "rows": HALF if halves else "test",
        "unit": evaluation.unit(given.validation),
        "models": {
            name: {
                "validation": passes[name].summary(names),
                "chosen by": value(name),
                "reported": reported[name].summary(names),
            }
            for name in found
        },
    }
    output = Path(config.output).expanduser()
    one, dtype = found[best], config.export.dtype
    export(one.folder, output / "model", dtype, weights=one.weights)
    write_json(output / CHOICE, record)
    return record


def _half(result: ValidationResult, g: int) -> ValidationResult:
    return ValidationResult(result.sums[:, [g]], result.tokens[:, [g]])
