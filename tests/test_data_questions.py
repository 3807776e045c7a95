"""Rows as questions: what a model is asked and what is right, read again from the sources."""

import json

import pytest
from chats import QWEN2, QWEN3, R1
from test_data_turns import CALL, encoder, talk
from toys import CHAT, END, START, tokenizer

from mtl.config.schema import TaskSection
from mtl.data import formats
from mtl.data.cache import encode_split, sources_of
from mtl.data.encode import Encoder
from mtl.data.encoded import DataError
from mtl.data.formats import Text
from mtl.data.next_token import NextToken
from mtl.data.questions import questions

ENC = Encoder(tokenizer(), 80)


def encoded(tmp_path, rows, form, whole=False):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = str(tmp_path / "a.jsonl")
    task = {"train": name, "validation": name if whole else "50%", "format": "text"}
    sources = sources_of(TaskSection(**task), "validation")
    side = None if whole else (0.5, True)
    make = NextToken(None, 0, ENC)
    split = encode_split(
        tmp_path / "cache", sources, form, make, None, "a", lambda text: None, side
    )
    return split, sources


def test_each_row_of_a_split_is_read_again(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}{END}", "id": i} for i in range(40)]
    rows[3] = {"prompt": "x" * 200, "completion": "too long"}
    split, sources = encoded(tmp_path, rows, formats.prompt_completion)
    found = list(questions(split, sources, formats.prompt_completion, ENC))
    assert [one.number for one in found] == list(range(len(split))) and 5 < len(split) < 35
    for one in found:
        i = one.row["id"]
        assert ENC.tokenizer.decode(one.prompt) == f"{i} + 1 =" and one.answer == f" {i + 1}"
        start = split.target(one.number).argmax()
        assert one.prompt.tolist() == split.ids(one.number)[:start].tolist()
    some = list(questions(split, sources, formats.prompt_completion, ENC, [4, 1]))
    assert [(one.number, one.answer) for one in some] == [(i, found[i].answer) for i in (1, 4)]
    assert {path.name for path in (tmp_path / "cache").rglob("*.*")} == {
        "rows.arrow",
        "report.json",
        "checksums.json",
    }


def test_a_source_that_has_lost_the_row_is_an_error(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(9)]
    split, sources = encoded(tmp_path, rows, formats.prompt_completion, whole=True)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl:\d: found no row any more"):
        list(questions(split, sources, formats.prompt_completion, ENC))


def test_a_text_has_no_question():
    with pytest.raises(formats.RowProblem, match="found a Text, wanted an example with an answer"):
        ENC.question(Text("abc"))


def test_the_question_of_a_conversation_is_all_before_its_last_target():
    chat = talk(("s", "be brief"), ("u", "hi"), ("a", "yo"), ("u", "and?"), ("a", "bye"))
    prompt, answer = ENC.question(chat)
    assert answer == "bye" and ENC.tokenizer.decode(prompt) == (
        f"{START}system\nbe brief{END}\n{START}user\nhi{END}\n{START}assistant\nyo{END}\n"
        f"{START}user\nand?{END}\n{START}assistant\n"
    )
    said = talk(*[("u", "hi"), ("a", "yo"), ("u", "and?"), ("a", "bye"), ("u", "so?")])
    context = formats.Messages(said.messages, context=frozenset({3}))
    assert ENC.question(said)[1] == "bye" and ENC.question(context)[1] == "yo"


@pytest.mark.parametrize(
    ("template", "turn", "asked", "answer"),
    [
        (CHAT, ("a", f"a{END}b"), "assistant\n", "ab"),  # as generated text is decoded
        (QWEN3, ("a", "<think>\nhm\n</think>\n\n4"), "assistant\n", "<think>\nhm\n</think>\n\n4"),
        (
            QWEN2,
            ("a", "", CALL),
            "assistant",
            '<tool_call>\n{"name": "f", "arguments": {"x": [1]}}',
        ),
        (R1, ("a", "4"), "<|assistant|><think>\n", "4"),  # as the model is asked, not as trained
    ],
)
def test_the_answer_is_as_the_template_renders_it(template, turn, asked, answer):
    enc = encoder(template)
    prompt, found = enc.question(talk(("u", "2+2?"), turn))
    assert enc.tokenizer.decode(prompt).rstrip("\n").endswith(asked.rstrip("\n"))
    assert found.strip().startswith(answer) and not enc.specials.pattern.search(found)
