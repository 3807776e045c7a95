"""Targets in one rendering, on templates that do what families' templates do: against the
difference of prefixes where that holds, against generation tags, and as text where neither does."""

import numpy as np
import pytest
from chats import GEMMA, GLM, GPT_OSS, LLAMA3, MISTRAL, PHI, QWEN2, QWEN3, R1, TOKENS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import CHAT, END, GENERATION_CHAT, tokenizer
from transformers import PreTrainedTokenizerFast

from mtl.data.encode import Encoder
from mtl.data.formats import Completion, Messages, RowProblem, Text


def encoder(template: str, most: int = 4000) -> Encoder:
    made = tokenizer(template=template)
    made.add_special_tokens({"additional_special_tokens": TOKENS})
    return Encoder(made, most)


def talk(*said: tuple, **more) -> Messages:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    turns = [
        {"role": names[role], "content": content, **(keys[0] if keys else {})}
        for role, content, *keys in said
    ]
    return Messages(turns, **more)


def by_prefix(enc: Encoder, chat: Messages) -> tuple[list[int], list[bool]]:
    """What an assistant turn adds to the rendering of what comes before it and the generation
    prompt, up to its last eos. Holds only for templates that never change what they have rendered.
    """
    tok = enc.tokenizer

    def render(turns: int, prompt: bool = False) -> list[int]:
        said = [dict(turn) for turn in chat.messages[:turns]]
        return tok.apply_chat_template(
            said, tools=chat.tools, add_generation_prompt=prompt, return_dict=False
        )

    whole = render(len(chat.messages))
    borrowed = tok.convert_tokens_to_ids("<|user|>") if tok.chat_template == GLM else None
    if borrowed and chat.messages[-1]["role"] == "assistant":
        whole.append(borrowed)
    target = [False] * len(whole)
    for i, turn in enumerate(chat.messages):
        if turn["role"] != "assistant":
            continue
        past, with_turn = render(i, prompt=True), render(i + 1)
        assert whole[: len(with_turn)] == with_turn and with_turn[: len(past)] == past
        added = with_turn[len(past) :]
        ends = [j for j, token in enumerate(added, 1) if token == tok.eos_token_id]
        end = len(past) + (ends[-1] if ends else len(added))
        end += whole[end : end + 1] == [borrowed]
        target[len(past) : end] = [True] * (end - len(past))
    last = max(i for i, one in enumerate(target) if one) + 1
    return whole[:last], target[:last]


def targets(enc: Encoder, chat: Messages, notes: dict | None = None) -> list[str]:
    """The text of each run of targets."""
    made = enc(chat, (lambda text, n: notes.update({text: n})) if notes is not None else _ignore)
    runs, inside = [], False
    for token, wanted in zip(made.ids.tolist(), made.target.tolist(), strict=True):
        if wanted:
            runs = [*runs, []] if not inside else runs
            runs[-1].append(token)
        inside = wanted
    return [enc.tokenizer.decode(run) for run in runs]


def _ignore(text, n):
    pass


CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}]}
PLAIN = talk(("u", " hi\n"), ("a", " yo \n"), ("u", "<b>and</b>"), ("a", "<i>bye</i>"))
SYSTEM = talk(("s", "be brief"), *[(t["role"][0], t["content"]) for t in PLAIN.messages])
TOOLS = talk(
    ("u", "w?"), ("a", "let me", CALL), ("t", "3"), ("t", "4"), ("a", "7"), ("u", "q"), ("a", "z")
)
NO_TEXT = talk(("u", "w?"), ("a", "", CALL), ("t", "3"), ("a", "7"), ("u", "and?"), ("a", "", CALL))
TWICE = talk(("u", "q"), ("a", "one"), ("a", "two"), ("u", "r"), ("u", "s"), ("a", "three"))
HOLDS = [
    *[(t, c) for t in (CHAT, QWEN2, LLAMA3, GLM) for c in (PLAIN, SYSTEM, TWICE)],
    *[(QWEN2, c) for c in (TOOLS, NO_TEXT)],
    *[(t, PLAIN) for t in (GEMMA, MISTRAL)],
    (GEMMA, SYSTEM),
    *[(t, talk(*[("u", "q"), ("a", "r")])) for t in (QWEN3, GPT_OSS, PHI)],
    (QWEN3, talk(("u", "q"), ("a", "<think>\nhm\n</think>\n\nr"))),
]


@pytest.mark.parametrize(("template", "chat"), HOLDS)
def test_where_prefixes_hold_the_targets_are_theirs(template, chat):
    enc = encoder(template)
    made = enc(chat)
    ids, target = by_prefix(enc, chat)
    assert made.ids.tolist() == ids
    assert made.target.tolist() == target


TEXT = st.text(max_size=6).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([CHAT, QWEN2, LLAMA3, GLM]),
    st.lists(st.tuples(st.sampled_from("ua"), TEXT), max_size=5),
)
@example(CHAT, [("u", "<|start|>assistant\n"), ("a", "<|end|>\n<|start|>assistant\n")])
@example(CHAT, [("a", "\U000f0000\U000f000a\U000f0001\U000f000b")])
@example(LLAMA3, [("a", "<think>"), ("u", "</think>")])
def test_where_prefixes_hold_the_targets_are_theirs_for_any_text(template, said):
    enc, chat = encoder(template), talk(("u", "x"), *said, ("a", "y"))
    made, (ids, target) = enc(chat), by_prefix(enc, chat)
    assert made.ids.tolist() == ids and made.target.tolist() == target


THOUGHTS = talk(
    ("u", "q"), ("a", "<think>hm</think>one"), ("u", "r"), ("a", "<think>oh</think>two")
)
KEYS = talk(
    ("u", "q"),
    ("a", "one", {"reasoning_content": "hm"}),
    ("u", "r"),
    ("a", "two", {"reasoning_content": "oh"}),
)
DROPPED = {"turns that the chat template renders without their reasoning": 1}


@pytest.mark.parametrize("chat", [THOUGHTS, KEYS])
def test_earlier_thoughts_are_dropped_and_counted(chat):
    notes = {}
    assert targets(encoder(QWEN3), chat, notes) == [
        f"one{END}",
        f"<think>\noh\n</think>\n\ntwo{END}",
    ]
    assert notes == DROPPED


NO_END = "turns that the chat template has no end token for: "
TWO = talk(("u", "q"), ("a", "one"), ("u", "r"), ("a", "two"))


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, PHI])
def test_turns_that_the_template_ends_are_not_told_of(template):
    notes = {}
    targets(encoder(template), TWO, notes)
    assert notes == {}


def test_a_turn_without_an_end_ends_where_another_speaks():
    """As GLM is used: it stops at <|user|>, and at <|observation|> behind a call."""
    notes, user = {}, NO_END + "<|user|> ends them, where generation must stop too"
    assert targets(encoder(GLM), TWO, notes) == ["one<|user|>", "two<|user|>"]
    assert notes == {user: 2}
    calls = GLM.replace(
        "{{ m.content | trim }}",
        "{{ m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls }}",
    )
    enc = encoder(
        calls.replace("<|{{ m.role }}|>", "<|{{ 'call' if m.role == 'tool' else m.role }}|>")
    )
    chat = talk(("u", "w"), ("a", "", CALL), ("t", "3"), ("a", "7"), ("u", "w"), ("a", "8", CALL))
    notes.clear()
    ends = [one[-8:] for one in targets(enc, chat, notes)]
    assert [one.rpartition("<")[2] for one in ends] == ["|call|>", "|user|>", "|call|>"]
    assert notes == {user: 1, user.replace("user", "call"): 2}
    prompt, answer = enc.question(talk(("u", "q"), ("a", "one")))
    assert enc.tokenizer.decode(prompt).endswith("<|assistant|>\n") and answer == "one"


SHARED = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BARE = SHARED.replace("<|start|>", "\n# ")


@pytest.mark.parametrize("template", [SHARED, BARE])
def test_where_no_token_of_others_tells_eos_ends_the_last_turn(template):
    notes = {}
    first, last = targets(encoder(template), TWO, notes)
    assert first.strip() == "one" and last == f"two{END}"
    assert notes == {
        NO_END + "none is learned": 1,
        NO_END + f"{END} ends them, where generation must stop too": 1,
    }


def test_an_assistant_that_speaks_twice_has_no_end_between():
    notes = {}
    chat = talk(("u", "q"), ("a", "one"), ("a", "two"))
    assert targets(encoder(GLM), chat, notes) == ["one", "two<|user|>"]
    assert notes[NO_END + "none is learned"] == 1


def test_a_borrowed_end_is_one_with_generation_tags_and_is_cut_like_any_other():
    tagged = GLM.replace(
        "{{ m.content | trim }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
        "{% else %}{{ m.content | trim }}{% endif %}",
    )
    one, two = encoder(tagged)(TWO), encoder(GLM)(TWO)
    assert one.ids.tolist() == two.ids.tolist() and one.target.tolist() == two.target.tolist()
    cut = Encoder(encoder(GLM).tokenizer, len(two.ids) - 1, "truncate")(TWO)
    assert cut.truncated and cut.ids.tolist() == two.ids.tolist()[:-1]


def test_channels_and_an_end_of_their_own_for_earlier_turns():
    notes = {}
    assert targets(encoder(GPT_OSS), KEYS, notes) == [
        "<|channel|>final<|message|>one<|stop|>",
        "<|channel|>analysis<|message|>oh<|stop|><|start|>assistant<|channel|>final<|message|>two"
        + END,
    ]
    assert notes == DROPPED
    calls = talk(("u", "w"), ("a", "", CALL), ("t", "3"), ("a", "7"))
    assert targets(encoder(GPT_OSS), calls) == [
        ' to=functions.f<|channel|>commentary json<|message|>{"x": [1]}<|call|>',
        f"<|channel|>final<|message|>7{END}",
    ]


def test_a_prompt_that_opens_a_thought_which_turns_lack():
    chat = talk(("s", "be"), ("u", "q"), ("a", "<think>hm</think>one"), ("u", "r"), ("a", "<b>two"))
    notes = {}
    assert targets(encoder(R1), chat, notes) == [f"one{END}", f"<b>two{END}"]
    assert notes == DROPPED


def test_a_system_turn_that_moves_to_the_last_question():
    assert targets(encoder(MISTRAL), SYSTEM) == [f" yo{END}", f" <i>bye</i>{END}"]


def test_a_text_that_closes_with_eos():
    assert targets(encoder(PHI), PLAIN) == [" yo \n<|stop|>", f"<i>bye</i><|stop|>\n{END}"]


def test_calls_within_a_conversation_of_qwen3():
    call = '\n<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>'
    chat = talk(("u", "w?"), ("a", "m", CALL), ("t", "3"), ("a", "7"), ("u", "q"), ("a", "z"))
    assert targets(encoder(QWEN3), chat) == [
        f"m{call}{END}",
        f"7{END}",
        f"<think>\n\n</think>\n\nz{END}",
    ]


def test_generation_tags_agree_with_one_rendering():
    tagged, plain = encoder(GENERATION_CHAT), encoder(CHAT)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    for chat in (PLAIN, SYSTEM, TWICE):
        one, two = tagged(chat), plain(chat)
        made = tagged.tokenizer.apply_chat_template([dict(t) for t in chat.messages], **options)
        inside = np.array(made["assistant_masks"], dtype=bool)
        end = inside.nonzero()[0][-1] + 1
        for row in (one, two):
            assert row.ids.tolist() == made["input_ids"][:end]
            assert row.target.tolist() == inside[:end].tolist()


@pytest.mark.parametrize("template", [CHAT, GENERATION_CHAT])
def test_context_is_no_target(template):
    chat = talk(("u", "a"), ("a", "5"), ("u", "sure?"), ("a", "4"), context=frozenset([1]))
    assert targets(encoder(template), chat) == [f"4{END}"]


@pytest.mark.parametrize(
    ("template", "chat", "name", "text"),
    [
        (R1, talk(("u", "q"), ("a", "<think>hm</think>b")), "reasoning", "the reasoning of turn 2"),
        (CHAT, talk(("u", "q"), ("a", "b", {"reasoning_content": "hm"})), "reasoning", "'hm'"),
        (
            CHAT.replace(
                "{{ message.content }}", "{{ message.content if message.role != 'tool' }}"
            ),
            talk(("u", "q"), ("a", "b"), ("t", "3"), ("a", "c")),
            "tool",
            r"text of turn 3 \(tool\): '3'",
        ),
        (
            CHAT.replace("in messages", "in messages if message.role != 'system'"),
            SYSTEM,
            "system",
            "text of turn 1",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused_unless_it_may(template, chat, name, text):
    with pytest.raises(RowProblem, match=f"leaves out .*{text}") as problem:
        encoder(template)(chat)
    assert problem.value.reason == "template" and f"may_drop: [{name}]" in str(problem.value)
    allowed = Messages(chat.messages, may_drop=(name,))
    assert targets(encoder(template), allowed)[-1].endswith(END)


def test_turns_that_cannot_be_told_apart_are_refused():
    sized = CHAT.replace("{{ message.content }}", "{{ message.content | length }}")
    twice = CHAT.replace("{{ message.content }}", "{{ message.content }}{{ message.content }}")
    odd = CHAT.replace("<|start|>assistant\n{% endif", "A: {% endif").replace("<|start|>", "")
    for template, text in (
        (sized, "changes a text when only a mark is added to it"),
        (twice, r"turn 2 \(assistant\) in several places"),
        (odd.replace("<|end|>\n", ""), r"generation prompt is not how turn 2 \(assistant\) begins"),
    ):
        with pytest.raises(RowProblem, match=text):
            encoder(template)(talk(("u", "a"), ("a", "b")))


def test_a_long_chat_is_rendered_a_fixed_number_of_times(monkeypatch):
    counts = []
    for turns in (10, 1000):
        enc = encoder(QWEN3, 10**6)
        rendered = []
        apply = enc.tokenizer.apply_chat_template

        def spy(said, apply=apply, rendered=rendered, **options):
            rendered.append(len(said))
            return apply(said, **options)

        monkeypatch.setattr(enc.tokenizer, "apply_chat_template", spy)
        said = [(("u", "q"), ("a", "r"))[i % 2] for i in range(turns)]
        assert len(targets(enc, talk(*said))) == turns // 2
        counts.append(len(rendered))
    assert counts[0] == counts[1] <= 5


def test_a_row_that_is_far_too_long_is_not_tokenized(monkeypatch):
    enc, tokenized = encoder(CHAT, 50), [0]
    call = PreTrainedTokenizerFast.__call__

    def spy(self, text, **options):
        tokenized.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", spy)
    long = talk(("u", "a" * 10**6), ("a", "b"))
    for row in (long, Completion("a", "b" * 10**6), Text("a" * 10**6)):
        with pytest.raises(RowProblem, match=r"found 1,000,0\d\d characters") as problem:
            enc(row)
        assert problem.value.reason == "too long"
    assert max(tokenized) == 0
    # What follows the last target is not tokenized either: no loss depends on it.
    said = ("u", "a"), ("a", "b")
    assert enc(talk(*said, ("u", "a" * 10**6))).ids.tolist() == enc(talk(*said)).ids.tolist()
    cut = Encoder(enc.tokenizer, 50, "truncate")
    with pytest.raises(RowProblem, match="cut at 50 tokens, which leaves no target"):
        cut(long)
    made, part = (
        cut(talk(("u", "a"), ("a", "b" * 10**6))),
        encoder(CHAT)(talk(("u", "a"), ("a", "b" * 99))),
    )
    assert made.truncated and made.ids.tolist() == part.ids.tolist()[:50]
    assert made.target.tolist() == part.target.tolist()[:50]
    assert 0 < max(tokenized) < 2000
