"""Rows of a sample task, and their split into training and validation."""

import hashlib
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.samples.archives import BuildError

LEAST = 300  # rows to train on, of each task


@dataclass(frozen=True)
class Row:
    """One example. Of rows with the same `key` one is kept; rows of one `group` stand on the same
    side of the split.
    """

    key: str
    group: str
    data: dict[str, Any]


def words(text: str) -> str:
    """`text` without case, punctuation and layout: near-copies become equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def completion(key: str, prompt: str, answer: str, group: str | None = None) -> Row:
    return Row(key, key if group is None else group, {"prompt": prompt, "completion": answer})


def labeled(text: str, label: str) -> Row:
    return Row(words(text), words(text), {"text": text, "label": label})


def between(low: int, text: str, high: int) -> bool:
    return low <= len(text) <= high


def split(rows: Iterable[Row], limit: int, validation: int) -> tuple[list[dict], list[dict]]:
    """(train, validation) rows, in the order of their hashes; at most `limit` in all, of them
    `validation` to hold out.

    Groups go to either side whole. A training row whose key has four words in five in common with a
    validation row's is left out: its loss would say how well that row is remembered.
    """

    def place(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    unique = {row.key: row for row in rows}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in unique.values():
        groups[row.group].append(row)
    train: list[Row] = []
    valid: list[Row] = []
    for group in sorted(groups, key=place):
        fits = len(valid) + len(groups[group]) <= validation
        (valid if fits else train).extend(groups[group])
    for side in (train, valid):
        side.sort(key=lambda row: place(row.key))
    held_out = [set(row.key.split()) for row in valid]

    def apart(row: Row) -> bool:
        mine = set(row.key.split())
        return all(5 * len(mine & other) < 4 * len(mine | other) for other in held_out)

    train = [row for row in train[: limit - len(valid)] if apart(row)]
    return [row.data for row in train], [row.data for row in valid]


@dataclass(frozen=True)
class Source:
    """A task's rows, and where they come from. `hint`: what to do where it has too few."""

    rows: Iterable[Row]
    name: str
    licence: str
    hint: str = ""


def write(
    out: Path, sources: Mapping[str, Source], limit: int, validation: int
) -> dict[str, dict[str, Any]]:
    """Write OUT/TASK.train.jsonl and OUT/TASK.valid.jsonl of each task.

    Args:
        limit: most rows of a task.
        validation: how many of them are for validation.

    Returns:
        the notes for the manifest, by task: rows, median characters, source and licence.

    Raises:
        BuildError: a source has too few rows.
    """
    return {task: _write(out, task, one, limit, validation) for task, one in sources.items()}


def _write(out: Path, task: str, source: Source, limit: int, validation: int) -> dict[str, Any]:
    train, valid = split(source.rows, limit, validation)
    if len(valid) < validation or len(train) < LEAST:
        raise BuildError(
            f"{task}: found {len(train)} training and {len(valid)} validation rows in "
            f"{source.name}, wanted at least {LEAST} and {validation}. {source.hint}"
        )
    for side, kept in (("train", train), ("valid", valid)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        (out / f"{task}.{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    characters = int(statistics.median(len(json.dumps(row, ensure_ascii=False)) for row in train))
    counts = {"train": len(train), "valid": len(valid), "characters": characters}
    return {**counts, "source": source.name, "licence": source.licence}
