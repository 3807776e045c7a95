"""Formats and encoding: which tokens an example becomes, and exactly which of them are trained."""

import json
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from toys import CHAT, END, GENERATION_CHAT, START, tokenizer
from transformers import PreTrainedTokenizerFast

from mtl.config.schema import ModelSection
from mtl.data import formats
from mtl.data.encode import Encoder, load_tokenizer
from mtl.data.encoded import DataError
from mtl.data.formats import FORMATS, Completion, Messages, RowProblem, Text

TOK = tokenizer()
TAGGED = tokenizer(template=GENERATION_CHAT)


def marked(encoder: Encoder, example) -> str:
    """The example's text with each run of targets in [brackets]."""
    ids, target, _ = encoder(example)
    text, inside = "", False
    for token, wanted in zip(ids.tolist(), target.tolist(), strict=True):
        text += ("[" if wanted else "]") if wanted != inside else ""
        text += encoder.tokenizer.decode([token])
        inside = wanted
    return text + ("]" if inside else "")


def turns(*pairs: tuple[str, str]) -> Messages:
    return Messages([{"role": role, "content": content} for role, content in pairs])


# Encoding


def test_completion_has_no_template_and_trains_eos():
    assert marked(Encoder(TOK, 99), Completion("2+2 =", " 4")) == f"2+2 =[ 4{END}]"


def test_completion_without_a_prompt_trains_all_but_the_first_token():
    assert marked(Encoder(TOK, 99), Completion("", "abc")) == f"a[bc{END}]"


def test_text_trains_all_but_the_first_token():
    assert marked(Encoder(TOK, 99), Text("abc")) == f"a[bc{END}]"


TALK = turns(
    ("system", "be brief"),
    ("user", "hi"),
    ("assistant", "yo"),
    ("user", "and?"),
    ("assistant", "bye"),
)
TALK_MARKED = (
    f"{START}system\nbe brief{END}\n{START}user\nhi{END}\n{START}assistant\n[yo{END}]\n"
    f"{START}user\nand?{END}\n{START}assistant\n[bye{END}]"  # no loss depends on the template's last newline
)


def test_every_assistant_turn_is_a_target_with_its_end():
    assert marked(Encoder(TOK, 200), TALK) == TALK_MARKED


def test_nothing_is_kept_behind_the_last_target():
    """Nor does a question that no turn answers count against the length, or one that a cut has left alone."""
    asked = turns(("user", "hi"), ("assistant", "yo"), ("user", "and?" * 20))
    short = marked(Encoder(TOK, 200), turns(("user", "hi"), ("assistant", "yo")))
    assert short.endswith(f"[yo{END}]") and marked(Encoder(TOK, 48), asked) == short
    talk = Messages([*asked.messages, {"role": "assistant", "content": "bye"}])
    made = Encoder(TOK, 80, "truncate")(talk)
    assert made.truncated and made.ids.tolist() == Encoder(TOK, 48)(asked).ids.tolist()


def test_the_end_of_a_turn_without_a_token_is_the_end_of_its_text_and_eos():
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert marked(
        Encoder(tokenizer(template=plain), 99), turns(("user", "a"), ("assistant", "b"))
    ) == (f"<user>a\n<assistant>[b\n{END}]")


def test_a_template_that_refuses_a_row():
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHAT
    )
    with pytest.raises(RowProblem, match="the chat template: TemplateError: user first"):
        Encoder(tokenizer(template=strict), 99)(
            turns(("system", "s"), ("user", "a"), ("assistant", "b"))
        )
    with pytest.raises(RowProblem, match=r"turn 1 \(assistant\) is the first"):
        Encoder(TOK, 99)(turns(("assistant", "b")))


def test_tools_reach_the_template():
    with_tools = "{% if tools %}{{ tools[0].function.name }};{% endif %}" + CHAT
    talk = Messages(
        turns(("user", "a"), ("assistant", "b")).messages, [{"function": {"name": "clock"}}]
    )
    assert marked(Encoder(tokenizer(template=with_tools), 99), talk).startswith(
        f"clock;{START}user"
    )


def test_what_the_template_would_leave_out_is_refused():
    talk = turns(("user", "a"), ("assistant", "b")).messages
    with pytest.raises(RowProblem, match="found tools, which the chat template does not read"):
        Encoder(TOK, 99)(Messages(talk, [{"function": {"name": "clock"}}]))
    called = [
        talk[0],
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]},
    ]
    with pytest.raises(RowProblem, match="found tool_calls, which the chat template does not read"):
        Encoder(TOK, 99)(Messages(called))


def test_no_template():
    with pytest.raises(DataError, match="found a tokenizer without a chat template, wanted one"):
        Encoder(tokenizer(chat=False), 99)(TALK)


def test_no_eos():
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        Encoder(bare, 99)(Text("abc"))


@pytest.mark.parametrize(
    ("example", "length", "policy", "result"),
    [
        (Completion("abc", "defg"), 8, "drop", f"abc[defg{END}]"),
        (Completion("abc", "defg"), 7, "drop", "too long"),
        (Completion("abc", "defg"), 7, "error", "too long"),
        (Completion("abc", "defg"), 5, "truncate", "abc[de]"),
        (Completion("abc", "defg"), 3, "truncate", "no target"),
        (Completion("abc", ""), 9, "drop", "no target"),
        (Text(""), 9, "drop", "no target"),
        (Text("a"), 9, "drop", f"a[{END}]"),
    ],
)
def test_length(example, length, policy, result):
    encoder = Encoder(TOK, length, policy)
    if " " not in result:
        assert marked(encoder, example) == result
        assert encoder(example).truncated == (policy == "truncate")
    else:
        with pytest.raises(RowProblem) as problem:
            encoder(example)
        assert problem.value.reason == result


@settings(deadline=None)
@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_completion_is_prompt_then_completion_then_eos(prompt, completion):
    ids, target, cut = Encoder(TOK, 999)(Completion(prompt, completion))
    before = TOK(prompt)["input_ids"]
    assert ids.tolist() == before + TOK(completion)["input_ids"] + [TOK.eos_token_id] and not cut
    assert target.tolist() == [i >= max(1, len(before)) for i in range(len(ids))]


def words_with_bos() -> PreTrainedTokenizerFast:
    """Puts a bos first and merges `ab`, so that texts put together are not always their tokens put together."""
    backend = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(["a", "b", "c", "ab", "<s>", "</s>"])},
            merges=[("a", "b")],
        )
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 4)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_the_prompt_has_the_tokens_it_has_when_the_model_is_used():
    encoder = Encoder(words_with_bos(), 99)
    for prompt, completion, ids, first in (
        ("c", "ab", [4, 2, 3, 5], 2),
        ("ca", "bc", [4, 2, 0, 1, 2, 5], 3),
    ):
        made = encoder(Completion(prompt, completion))
        assert made.ids.tolist() == ids and made.target.tolist() == [
            i >= first for i in range(len(ids))
        ]
        assert made.ids.tolist()[:first] == encoder.tokenizer(prompt)["input_ids"]
    assert encoder(Text("ab")).target.tolist() == [False, True, True]


def test_a_space_that_a_tokenizer_puts_before_every_text_is_not_put_inside_one():
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(["_", "a", "b", "</s>"])}, merges=[])
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), 99)
    assert encoder(Completion("a", "b")).ids.tolist() == [0, 1, 2, 3]


# Formats


def test_formats_that_are_listed_are_there():
    for dotted in FORMATS.values():
        module, name = dotted.split(":")
        assert module.startswith("mtl.") and callable(getattr(import_module(module), name))


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_arguments_of_calls_are_objects(arguments):
    function = {"name": "weather", "arguments": arguments}
    for call in ({"id": "c1", "type": "function", "function": function}, function):
        said = [{"role": "user", "content": "w"}, {"role": "assistant", "tool_calls": [call]}]
        made = formats.messages({"messages": said}).messages[1]["tool_calls"][0]
        assert made.get("function", made)["arguments"] == {"city": "Oslo"}
        assert made.get("id") == call.get("id")
    value = json.dumps(function)
    said = [{"from": "human", "value": "w"}, {"from": "function_call", "value": value}]
    call = formats.sharegpt({"conversations": said}).messages[1]["tool_calls"][0]
    assert call == {"type": "function", "function": {**function, "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("arguments", ["Oslo", "[1]", '"x"'])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"function": {"name": "weather", "arguments": arguments}}
    said = [{"role": "user", "content": "w"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RowProblem, match="messages, turn 2: tool_calls, arguments: found"):
        formats.messages({"messages": said})


def test_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": ["he", "llo"]}]
    assert formats.messages({"messages": said}) == turns(
        ("user", "Say hello"), ("assistant", "hello")
    )
    wanted = "messages, turn 1: content: found the part .*wanted text"
    for other in (
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image", "text": "what it shows"},
        {"type": "text", "text": None},
    ):
        with pytest.raises(RowProblem, match=wanted):
            formats.messages({"messages": [{"role": "user", "content": [*parts, other]}, said[1]]})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_turn_may_be_context(mark):
    said = [("user", "a"), ("assistant", "5"), ("user", "sure?"), ("assistant", "4")]
    made = [{"role": role, "content": text} for role, text in said]
    made[1] |= mark
    made[3] |= {key: 1 for key in mark}
    chat = formats.messages({"messages": made})
    assert chat == Messages(turns(*said).messages, context=frozenset([1]))
    assert marked(Encoder(TOK, 200), chat).endswith(
        f"5{END}\n{START}user\nsure?{END}\n{START}assistant\n[4{END}]"
    )
    with pytest.raises(RowProblem, match="every turn of the assistant is context"):
        formats.messages({"messages": made[:2]})
    with pytest.raises(RowProblem, match="turn 2: weight: found 0.5, wanted 0 or 1"):
        formats.messages({"messages": [made[0], {**made[3], "weight": 0.5}]})


def test_a_system_text_beside_the_turns_is_the_first():
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bonjour"}]
    first = ("system", "In French.")
    assert formats.messages({"system": "In French.", "messages": said}) == turns(
        first, ("user", "hello"), ("assistant", "bonjour")
    )
    with pytest.raises(RowProblem, match="found system and a system turn in messages"):
        said = turns(first, ("user", "a"), ("assistant", "b")).messages
        formats.messages({"system": "In French.", "messages": said})
    said = [{**turn, "role": turn["role"].replace("system", "sys")} for turn in said]
    with pytest.raises(RowProblem, match="found system and a system turn in messages"):
        formats.messages({"system": "In French.", "messages": said}, roles={"sys": "system"})
    said = [{"from": turn["role"], "value": turn["content"]} for turn in turns(first).messages]
    said += [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(RowProblem, match="found system and a system turn in conversations"):
        formats.sharegpt({"system": "In French.", "conversations": said})
    assert formats.sharegpt({"system": "In French.", "conversations": said[1:]}) == turns(
        first, ("user", "a"), ("assistant", "b")
    )


@pytest.mark.parametrize("role", ["tool_call", "Assistant"])
def test_roles_are_checked(role):
    said = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    with pytest.raises(RowProblem, match=f"turn 2: found the role '{role}', wanted one of system,"):
        formats.messages({"messages": said})
    assert formats.messages({"messages": said}, roles={role: "assistant"}) == turns(
        ("user", "a"), ("assistant", "b")
    )


def test_an_empty_turn_of_the_assistant_is_refused_as_an_empty_completion_is():
    said = [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")]
    made = [{"role": role, "content": text} for role, text in said]
    with pytest.raises(RowProblem, match=r"turn 2 \(assistant\) is empty") as problem:
        formats.messages({"messages": made})
    assert problem.value.reason == "no target"
    made[1]["weight"] = 0
    assert marked(Encoder(TOK, 200), formats.messages({"messages": made})).endswith(f"[c{END}]")


def test_conversational_prompt_and_completion():
    row = {
        "prompt": [{"role": role, "content": text} for role, text in (*TALK_PAIRS, ("user", "c"))],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    chat = formats.prompt_completion(row)
    assert chat.context == {1} and marked(Encoder(TOK, 200), chat).count("[") == 1
    assert marked(Encoder(TOK, 200), chat).endswith(f"[d{END}]")
    with pytest.raises(RowProblem, match="completion: found 'd', wanted a list"):
        formats.prompt_completion({**row, "completion": "d"})


TALK_PAIRS = (("user", "a"), ("assistant", "b"))


def test_generation_tags_may_leave_out_the_end_of_a_turn():
    tagged = GENERATION_CHAT.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert marked(Encoder(tokenizer(template=tagged), 200), TALK) == TALK_MARKED


def test_an_end_of_turn_outside_of_tags_may_be_a_token_that_is_special_without_a_name():
    """As Llama 3's <|eot_id|> is: the tokenizer's list of special tokens has the named ones only."""
    tagged = GENERATION_CHAT.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|eot|>")
    made = tokenizer(template=tagged)
    made.add_tokens([AddedToken("<|eot|>", special=True)])
    eot = made.convert_tokens_to_ids("<|eot|>")
    assert eot not in made.all_special_ids
    row = Encoder(made, 200)(turns(("user", "a"), ("assistant", "b")))
    assert row.ids[row.target].tolist() == [*made("b")["input_ids"], eot]


@pytest.mark.parametrize("example", [Completion("2+2 =", f" 4{END}"), Text(f"abc{END}")])
def test_an_eos_at_the_end_gets_no_second_one(example):
    said = {}
    made = Encoder(TOK, 99, special_text="refuse")(example, lambda text, n: said.update({text: n}))
    assert made.ids.tolist().count(TOK.eos_token_id) == 1 and not said


def test_the_text_of_a_special_token_inside_data_is_said_or_refused():
    said = {}
    examples = (
        Completion(f"a{END}", "b"),
        Text(f"a{END}b"),
        turns(("user", f"a{END}"), ("assistant", "b")),
    )
    for example in examples:
        Encoder(TOK, 99)(example, lambda text, n: said.update({text: said.get(text, 0) + n}))
        with pytest.raises(RowProblem, match=r"found the text of <\|end\|>") as problem:
            Encoder(TOK, 99, special_text="refuse")(example)
        assert problem.value.reason == "special token"
    assert said == {
        f"rows with the text of {END} in them, which becomes that token (batch.special_text)": 3
    }


def test_keys_of_turns_that_no_template_reads_are_said():
    chat = turns(("user", "a"), ("assistant", "b"))
    chat.messages[0]["id"], chat.messages[1]["id"] = 1, 2
    said = {}
    Encoder(TOK, 99)(chat, lambda text, n: said.update({text: n}))
    assert said == {"rows whose turns have the key id, which nothing reads": 1}


def llama2() -> PreTrainedTokenizerFast:
    """Puts U+2581 before every text and in the place of every space, as Llama 2's does."""
    letters = ["\u2581", *"abcd:", "\u2581a", "\u2581b", ":b", "</s>", "\n"]
    merges = [("\u2581", "a"), ("\u2581", "b"), (":", "b")]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_no_space_comes_between_prompt_and_completion():
    encoder = Encoder(llama2(), 99)
    for prompt, completion in (("ab:", "bc"), ("ab:", " bc"), ("d", "c"), ("a ", "b")):
        ids, target, _ = encoder(Completion(prompt, completion))
        assert encoder.tokenizer.decode(ids[:-1]) == prompt + completion
        assert ids[~target].tolist() == encoder.tokenizer(prompt)["input_ids"]


def test_a_token_that_reaches_over_the_start_of_a_turn_is_refused():
    """`:b` is one token: the template's colon and the turn's first letter."""
    made = llama2()
    made.chat_template = (
        "{% for m in messages %}{{ 'a' if m.role == 'assistant' else 'd' }}:{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    row = Encoder(made, 99)(turns(("user", "c"), ("assistant", "cb")))
    assert made.decode(row.ids[row.target]) == "cb</s>"
    with pytest.raises(RowProblem, match=r"turn 2 \(assistant\) are not its text: found ':bc</s>'"):
        Encoder(made, 99)(turns(("user", "c"), ("assistant", "bc")))


def test_messages_drops_what_arrow_fills_in():
    row = {
        "messages": [
            {"role": "user", "content": "a", "name": None},
            {"role": "assistant", "content": "b"},
        ],
        "tools": None,
    }
    assert formats.messages(row) == turns(("user", "a"), ("assistant", "b"))


def test_messages_with_a_tool():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    assert formats.messages({"messages": said, "tools": '[{"name": "f"}]'}) == Messages(
        said, [{"name": "f"}]
    )


def test_prompt_completion_and_text_rename_their_keys():
    assert formats.prompt_completion(
        {"q": "a", "r": "b"}, prompt="q", completion="r"
    ) == Completion("a", "b")
    assert formats.text({"body": "a"}, text="body") == Text("a")


def test_alpaca():
    row = {
        "instruction": "Add",
        "input": "1 2",
        "output": "3",
        "system": "s",
        "history": [["a", "b"]],
    }
    assert formats.alpaca(row) == turns(
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add\n1 2"), ("assistant", "3")
    )
    assert formats.alpaca({"instruction": "Hi", "input": "", "output": "Ho"}) == turns(
        ("user", "Hi"), ("assistant", "Ho")
    )


def test_sharegpt():
    said = [
        ("human", "a"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "1"),
        ("gpt", "b"),
    ]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in said],
        "system": "s",
        "tools": '[{"name": "f"}]',
    }
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert formats.sharegpt(row) == Messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ],
        [{"name": "f"}],
    )


def test_chat_rounds():
    rounds = [("system", "s"), ("human", "a"), ("bot", "b"), ("human", "c"), ("bot", "d")]
    row = {
        "id": 1,
        "data_name": "x",
        "chat_rounds": [
            {"role": role, "content": text, "chat_round_id": i}
            for i, (role, text) in enumerate(rounds)
        ],
    }
    assert formats.chat_rounds(row) == turns(
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    )


@pytest.mark.parametrize(
    ("call", "reason", "text"),
    [
        (
            lambda: formats.text({"body": 1, "id": 2}),
            "missing key",
            "found the keys body, id, wanted text",
        ),
        (lambda: formats.text({}), "missing key", "found the keys (none), wanted text"),
        (lambda: formats.text({"text": 3}), "bad value", "text: found 3, wanted text"),
        (
            lambda: formats.prompt_completion({"prompt": "a"}),
            "missing key",
            "found the keys prompt, wanted completion",
        ),
        (
            lambda: formats.messages({"messages": "hi"}),
            "bad value",
            "messages: found 'hi', wanted a list",
        ),
        (
            lambda: formats.messages({"messages": ["hi"]}),
            "bad value",
            "messages: found the turn 'hi', wanted an object",
        ),
        (
            lambda: formats.messages({"messages": [{"role": "user", "text": "a"}]}),
            "missing key",
            "messages, turn 1: found the keys role, text, wanted content",
        ),
        (
            lambda: formats.messages({"messages": [{"role": "user", "content": "a"}]}),
            "no target",
            "found user, wanted at least one turn of the assistant",
        ),
        (
            lambda: formats.sharegpt({"conversations": [{"from": "alien", "value": "a"}]}),
            "bad value",
            "conversations, turn 1: found the role 'alien', wanted one of system, human, user, gpt,",
        ),
        (
            lambda: formats.sharegpt({"conversations": [{"from": "function_call", "value": "f("}]}),
            "bad value",
            "conversations, turn 1: found 'f(', wanted JSON",
        ),
        (
            lambda: formats.chat_rounds({"chat_rounds": [{"role": "human"}]}),
            "missing key",
            "chat_rounds, turn 1: found the keys role, wanted content",
        ),
        (
            lambda: formats.alpaca({"instruction": "a", "output": "b", "history": [["x"]]}),
            "bad value",
            "history: found ['x'], wanted pairs [question, answer]",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_what_was_found_and_wanted(call, reason, text):
    with pytest.raises(RowProblem) as problem:
        call()
    assert problem.value.reason == reason and str(problem.value).startswith(text)


# Loading


def test_load_tokenizer(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(ModelSection(name=str(tmp_path / "model")))
    assert loaded("ab")["input_ids"] == TOK("ab")["input_ids"] and loaded.chat_template == CHAT
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    changed = load_tokenizer(
        ModelSection(name=str(tmp_path / "model"), chat_template=str(tmp_path / "t.jinja"))
    )
    assert changed.chat_template == "{{ messages }}"


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(DataError, match="config: model.name: found no tokenizer of .*nowhere"):
        load_tokenizer(ModelSection(name=str(tmp_path / "nowhere")))
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="model.chat_template .*none.jinja"):
        load_tokenizer(ModelSection(name=str(tmp_path), chat_template=str(tmp_path / "none.jinja")))
