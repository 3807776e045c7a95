"""Rows of a sample task, and their split into training and validation."""

import hashlib
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mtl.samples.archives import BuildError

SIDES = ("train", "valid", "test")


@dataclass(frozen=True)
class Sample:
    """One example. Of rows with the same `key` one is kept; rows of one `group` stand on the same
    side of the split.
    """

    key: str
    group: str
    data: dict[str, Any]


def words(text: str) -> str:
    """`text` without case, punctuation and layout: near-copies become equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def completion(key: str, prompt: str, answer: str, group: str | None = None) -> Sample:
    return Sample(key, key if group is None else group, {"prompt": prompt, "completion": answer})


def labeled(text: str, label: str) -> Sample:
    return Sample(words(text), words(text), {"text": text, "label": label})


def between(low: int, text: str, high: int) -> bool:
    return low <= len(text) <= high


def split(rows: Iterable[Sample], limit: int, validation: int, test: int = 0) -> list[list[dict]]:
    """Training, validation and test rows, in the order of their hashes; at most `limit` in all, of
    them `validation` and `test` to hold out.

    Groups go to one side whole. A training row whose key has four words in five in common with a
    held-out row's is left out: its loss would say how well that row is remembered.
    """

    def place(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    unique = {row.key: row for row in rows}
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in unique.values():
        groups[row.group].append(row)
    train: list[Sample] = []
    valid: list[Sample] = []
    tested: list[Sample] = []
    for group in sorted(groups, key=place):
        for side, most in (valid, validation), (tested, test), (train, len(unique)):
            if len(side) + len(groups[group]) <= most:
                side.extend(groups[group])
                break
    for side in (train, valid, tested):
        side.sort(key=lambda row: place(row.key))
    held_out = [set(row.key.split()) for row in (*valid, *tested)]

    def apart(row: Sample) -> bool:
        mine = set(row.key.split())
        return all(5 * len(mine & other) < 4 * len(mine | other) for other in held_out)

    train = list(islice(filter(apart, train), max(0, limit - len(held_out))))
    return [[row.data for row in side] for side in (train, valid, tested)]


@dataclass(frozen=True)
class SampleSource:
    """A task's rows, and where they come from. `hint`: what to do where it has too few."""

    rows: Iterable[Sample]
    name: str
    licence: str
    hint: str = ""


def save(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write(
    out: Path,
    task: str,
    source: SampleSource,
    *,
    limit: int,
    validation: int,
    least: int,
    test: int = 0,
    change: Callable[[list[dict]], list[dict]] = lambda rows: rows,
) -> dict[str, Any]:
    """Write OUT/TASK.train.jsonl, OUT/TASK.valid.jsonl and, where `test` rows are wanted,
    OUT/TASK.test.jsonl; the note for the manifest: rows, median characters, source and licence.

    Args:
        change: what becomes of the training rows before they are written.

    Raises:
        BuildError: the source has fewer than `least` rows to train on, or than `validation` and
            `test` to hold out.
    """
    sides = dict(zip(SIDES, split(source.rows, limit, validation, test), strict=True))
    found, wanted = [len(kept) for kept in sides.values()], (least, validation, test)
    if any(has < wants for has, wants in zip(found, wanted, strict=True)):
        raise BuildError(
            "{}: found {} training, {} validation and {} test rows in {}, wanted at least {}, {} "
            "and {}. {}".format(task, *found, source.name, *wanted, source.hint)
        )
    if not test:
        del sides["test"]
    sides["train"] = change(sides["train"])
    for side, kept in sides.items():
        save(out / f"{task}.{side}.jsonl", kept)
    characters = int(
        statistics.median(len(json.dumps(row, ensure_ascii=False)) for row in sides["train"])
    )
    counts = {**{side: len(kept) for side, kept in sides.items()}, "characters": characters}
    return {**counts, "source": source.name, "licence": source.licence}


def write_all(out: Path, sources: Mapping[str, SampleSource], **limits: int) -> dict[str, Any]:
    """`write` each task's source, with the same limits; the notes by task."""
    return {task: write(out, task, source, **limits) for task, source in sources.items()}
