"""Unlabelled texts of ten topics, for `configs/zeroae.yaml`.

FOLDER/archives/                what was fetched; the quickstart shares it
FOLDER/minilm/, FOLDER/model/   the encoder and the decoder
FOLDER/zeroae/labels.json       the topics' names
FOLDER/zeroae/pool.jsonl        {"text"} rows, 300 a topic, without their topics
FOLDER/zeroae/pool.gold.jsonl   the same rows as {"text", "label"}: for the score alone
FOLDER/zeroae/natural.*jsonl    3,000 rows as often as WordNet has them
FOLDER/zeroae/valid.jsonl       {"text"} rows, 16 a topic, from which validation is made
FOLDER/zeroae/test.gold.jsonl   rows that stand in no other file

A text is the first gloss of a WordNet noun, its topic the lexicographer file that it stands in. A
gloss that names its topic is left out: that would be a search for a word.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.samples import build, tasks
from mtl.samples.archives import BuildError, fetch, member
from mtl.samples.classification import build_model as build_encoder
from mtl.samples.packages import WORDNET
from mtl.samples.even import build_model
from mtl.samples.rows import between, save, words

TOPICS = {  # of WordNet's lexicographer files
    "05": "animal", "08": "body", "10": "communication", "13": "food",
    "15": "location", "18": "person", "20": "plant", "21": "possession", "27": "substance",
    "28": "time",
}  # fmt: skip
POOL, VALID, TEST = 300, 16, 100  # rows a topic; the rarest has fewer to test
NATURAL = 3000


def glosses(data: str) -> dict[str, list[str]]:
    """topic -> the glosses of WordNet's data.noun, in the order of their hashes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    seen: set[str] = set()
    for file, text in tasks.glosses(data):
        topic = TOPICS.get(file)
        if topic is None:
            continue
        plain = between(25, text, 160) and text == text.lower() and words(text) not in seen
        if plain and not re.search(rf"\b{topic}s?\b", text):
            seen.add(words(text))
            found[topic][hashlib.sha256(text.encode()).hexdigest()] = text
    return {topic: [text for _, text in sorted(found[topic].items())] for topic in TOPICS.values()}


def build_data(archives: Path, out: Path) -> dict[str, Any]:
    """Write the files; the set's note for the manifest."""
    wordnet = fetch(archives, *WORDNET)
    found = glosses(member(wordnet, "/data.noun"))
    if least := [t for t, texts in found.items() if len(texts) < POOL + 2 * VALID]:
        raise BuildError(f"{wordnet.name}: found too few glosses of {', '.join(least)}.")
    # The rarer a topic, the more of it is spent on the pool, so held-out rows are taken first.
    valid = {topic: texts[:VALID] for topic, texts in found.items()}
    rest = {topic: texts[VALID:] for topic, texts in found.items()}
    test = {topic: texts[POOL : POOL + TEST] for topic, texts in rest.items()}
    pool = {topic: texts[:POOL] for topic, texts in rest.items()}
    (out / "labels.json").write_text(json.dumps(list(found)) + "\n")
    save(out / "valid.jsonl", [{"text": text} for text, _ in _mixed(valid)])
    save(out / "test.gold.jsonl", [{"text": t, "label": label} for t, label in _mixed(test)])
    held = {text for texts in (*valid.values(), *test.values()) for text in texts}
    free = {topic: [t for t in texts if t not in held] for topic, texts in found.items()}
    natural = _mixed(free)[:NATURAL]
    for name, rows in ("pool", _mixed(pool)), ("natural", natural):
        save(out / f"{name}.jsonl", [{"text": text} for text, _ in rows])
        save(out / f"{name}.gold.jsonl", [{"text": t, "label": label} for t, label in rows])
    characters = int(np.median([len(text) for texts in pool.values() for text in texts]))
    counts = {"train": POOL * len(found), "valid": VALID * len(found), "characters": characters}
    return {"topics": {**counts, "source": wordnet.name, "licence": "WordNet"}}


def _mixed(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(text, topic), in an order that tells nothing of topics."""
    rows = [(text, topic) for topic, each in texts.items() for text in each]
    return sorted(rows, key=lambda row: hashlib.sha256(f"order {row[0]}".encode()).hexdigest())


def topics(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build what is not whole in `folder`; the notes of data and of the decoder.

    Raises:
        BuildError: what the user has to do first.
    """
    parts = {"zeroae": build_data, "minilm": build_encoder, "model": build_model}
    data, _, model = build.parts(folder, parts)
    return data, model
