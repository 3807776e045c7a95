"""What the rounds did, by texts whose class is known. Nothing here is read by a round."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON Lines file, each with its line's number.

    Raises:
        ValueError: a line is no JSON object.
    """
    # Not splitlines: texts may hold separators of other kinds.
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: found {line[:60]!r}, wanted a JSON object.")
            yield number, row


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. Raises as `numbered`."""
    return [row for _, row in numbered(path)]


def probe(codes: Ints, classes: Ints) -> tuple[float, float]:
    """How well a code tells a text's class: the share of texts that are of their code's most
    frequent class, and of those that are of the most frequent class. Equal: it tells nothing.

    Classes are counted on one half of the texts and scored on the other, both ways.

    Args:
        codes, classes: (n,) numbers from 0 of n texts; n is at least 2.
    """
    by_code = always = 0
    for side in range(2):
        here = np.arange(len(codes)) % 2 == side
        counts = np.zeros((codes.max() + 1, classes.max() + 1))
        np.add.at(counts, (codes[here], classes[here]), 1)
        most = counts.sum(0).argmax()
        # A code that this half lacks stands for the most frequent class.
        named = np.where(counts.any(1), counts.argmax(1), most)
        by_code += (named[codes[~here]] == classes[~here]).sum()
        always += (most == classes[~here]).sum()
    return float(by_code / len(codes)), float(always / len(codes))


def by_round(
    out: Path, rounds: int, pool: Sequence[str], names: Sequence[str], truth: Mapping[str, str]
) -> list[dict[str, Any]]:
    """For each round its counts, and shares of texts that are right; None: no such text.

    Args:
        out: folder of the rounds.
        truth: text -> class. Texts of the pool that it lacks are left out.

    Returns:
        Of each round its number, `accuracy` over the pool before it trained, `pseudo` and
        `selected`, the share of such rows whose class is right, and `code_probe` and
        `code_chance`, `probe` on the texts for the generator.
    """
    label = np.array([names.index(truth[t]) if t in truth else -1 for t in pool])
    known, found = label >= 0, []
    for number in range(rounds):
        folder = out / f"round-{number:02d}"
        with np.load(folder / "scores.npz") as kept:
            first, chosen, codes = kept["scores"].argmax(1), kept["chosen"], kept["codes"]
        note = {"round": number, "accuracy": _share(first[known] == label[known])}
        for name in "pseudo", "selected":
            rows = [row for row in read(folder / f"{name}.jsonl") if row["text"] in truth]
            note[name] = _share([truth[row["text"]] == row["label"] for row in rows])
        if len(codes):
            mine = known[chosen]
            told = probe(codes[mine], label[chosen][mine]) if mine.sum() > 1 else (None, None)
            note |= dict(zip(("code_probe", "code_chance"), told, strict=True))
        found.append(note)
    return found


def _share(right: Sequence[bool] | NDArray[np.bool_]) -> float | None:
    return float(np.mean(right)) if len(right) else None
