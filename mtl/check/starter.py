"""A starter YAML from data files: formats recognised by the rows, tasks named by the files."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mtl.config import dump, parse
from mtl.data.encoded import DataError
from mtl.data.formats import FORMATS, RowProblem
from mtl.data.source import open_source

HELD_OUT = "5%"  # of the training rows, where no file has validation rows
SAMPLE = 200  # rows of a file that are looked at
SIDES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "validation"),
    "test": "test",
}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
TEXT = """\
# Next: mtl check --config THIS_FILE shows what a run would do. docs/config.md has every key.
model:
  name: HuggingFaceTB/SmolLM2-135M-Instruct   # yours: a folder, or a name on the hub
{tasks}batch: {{examples: 32, tokens: 8192}}   # examples a step; token positions of a GPU's forward
train: {{epochs: 1}}
optimizer: {{lr: 2.0e-5}}
schedule: {{name: cosine}}                   # warmup: 20, once there are hundreds of steps
balancer: {{name: CoBa, gate: 1.0}}          # equal weights for 100 steps (warmup), then by slopes
mix: {{shares: equal, follow: balancer}}     # a task is drawn as often as its weight says
output: runs/{name}
"""
# What rows need that the YAML says once for all tasks, or that only their owner can choose.
LABELS = """\
# {task}: nothing reads its `label`. For a classifier: model.loader: sequence_classification,
# objective: classification, format: labeled (docs/classification.md). As an answer in words:
# format: {{name: prompt_completion, prompt: text, completion: label}}.
"""
CHOICES = """\
# {task}: its rows are dropped unless model.loader and objective are kpe (docs/kpe.md).
"""


class Named(NamedTuple):
    """What a file's name says: its task, and "train", "validation", "test" or "" for none."""

    task: str
    side: str


def starter(files: Sequence[str]) -> str:
    """The YAML of a run on `files`: pairs by their names, as code.train.jsonl and code.valid.jsonl.
    A validation file that stands beside a training file need not be named; where there is none,
    HELD_OUT of the training rows is.

    Raises:
        DataError: every file that cannot be read, has rows of no format, or stands for validation
            without a training file.
    """
    sides: dict[str, dict[str, list[str]]] = defaultdict(
        lambda: {"train": [], "validation": [], "test": []}
    )
    for file in dict.fromkeys(files):
        named = name(file)
        sides[named.task][named.side or "train"].append(file)
    tasks, problems = {}, []
    for task, paths in sides.items():
        paths["validation"] = paths["validation"] or beside(task, paths["train"])
        try:
            tasks[task] = _entry(task, paths)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    run = next(iter(tasks)) if len(tasks) == 1 else "mine"
    remarks = (_remark(task, entry, sides[task]["train"][0]) for task, entry in tasks.items())
    text = TEXT.format(tasks="".join([dump({"tasks": tasks}), *remarks]), name=run)
    parse(text, "the starter")  # what we write is what we read
    return text


def name(file: str) -> Named:
    """data/code.train.jsonl, code_train.jsonl, code/train-00000-of-00001.parquet: code, train."""
    path = Path(file)
    stem = path.name
    while Path(stem).suffix.lower() in SUFFIXES:
        stem = Path(stem).stem
    stem = re.sub(r"-\d+-of-\d+$", "", stem)
    words = re.split(r"[._-]", stem)
    side = next((SIDES[word.lower()] for word in reversed(words) if word.lower() in SIDES), "")
    for word in words:
        if side and SIDES.get(word.lower()) == side:
            stem = re.sub(rf"(^|[._-]){re.escape(word)}(?=[._-]|$)", "", stem)
    stem = stem.strip("._-") or path.absolute().parent.name
    return Named(re.sub(r"[^A-Za-z0-9_.-]", "_", stem), side)


def beside(task: str, train: Sequence[str]) -> list[str]:
    """The task's validation files in the folders of its training files."""
    found = (
        str(other)
        for folder in dict.fromkeys(Path(file).parent for file in train)
        if folder.is_dir()
        for other in sorted(folder.iterdir())
        if other.suffix.lower() in SUFFIXES and name(str(other)) == (task, "validation")
    )
    return list(found)[:1]


def _entry(task: str, paths: dict[str, list[str]]) -> dict[str, object]:
    formats = {file: recognise(file) for side in paths.values() for file in side}
    if len(set(formats.values())) > 1:
        found = ", ".join(f"{file} is {form}" for file, form in formats.items())
        raise DataError(f"task {task}: {found}; wanted one format in a task.")
    if not paths["train"]:
        given = ", ".join(paths["validation"] + paths["test"])
        raise DataError(
            f"{given}: found no train file of the task {task}, wanted one beside it, such as "
            f"{task}.train.jsonl. Name it too."
        )
    # No validation file: a part of the training rows is held out.
    paths = {**paths, "validation": paths["validation"] or [HELD_OUT]}
    entry = {side: some[0] if len(some) == 1 else some for side, some in paths.items() if some}
    form = next(iter(formats.values()))
    # Pairs have no tokens to predict: the objective of the other tasks would drop them.
    objective = {"objective": "preference"} if form == "preference" else {}
    return {**entry, "format": form, **objective}


def _remark(task: str, entry: dict[str, object], file: str) -> str:
    if entry["format"] == "choices":
        return CHOICES.format(task=task)
    labeled = entry["format"] == "text" and any("label" in row for row in _sample(file))
    return LABELS.format(task=task) if labeled else ""


def recognise(file: str) -> str:
    """The format that reads most of the first rows.

    Raises:
        DataError: none reads any, with what the first row holds.
    """
    rows = _sample(file)
    # Of formats that read equally many, the first in FORMATS wins.
    counts = Counter(
        {form: sum(_reads(dotted, row) for row in rows) for form, dotted in FORMATS.items()}
    )
    ((best, count),) = counts.most_common(1)
    if not count:
        found = f"rows with the keys {', '.join(rows[0])}" if rows else "no readable row"
        raise DataError(f"{file}: found {found}, wanted one of the formats {', '.join(FORMATS)}.")
    return best


def _sample(file: str) -> list[Mapping[str, Any]]:
    """The first rows that can be read."""
    rows = (row.value for row in itertools.islice(open_source(file).rows(), SAMPLE))
    return [row for row in rows if row is not None]


def _reads(dotted: str, row: Mapping[str, Any]) -> bool:
    module, _, function = dotted.partition(":")
    try:
        getattr(import_module(module), function)(row)
    except RowProblem:
        return False
    return True
