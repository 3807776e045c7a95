"""The texts of special tokens in the data: said, read as plain text, or refused."""

import numpy as np
import pytest
from chats import GEMMA, GLM, GPT_OSS, LLAMA3, MISTRAL, PHI, QWEN2, QWEN3, R1, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from toys import CHAT, END, GENERATION_CHAT, START, tokenizer
from transformers import PreTrainedTokenizerFast

from mtl.data.encode import Encoder
from mtl.data.formats import Completion, Messages, RowProblem, Text
from mtl.data.special import MASKS, Specials

TOK = tokenizer()


def plain(template: str = CHAT, most: int = 4000) -> Encoder:
    made = tokenizer(template=template)
    made.add_special_tokens({"additional_special_tokens": TOKENS})
    return Encoder(made, most, special_text="plain")


def chat(*said: tuple[str, str], **more) -> Messages:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return Messages([{"role": names[role], "content": text} for role, text in said], **more)


def split(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer(text, split_special_tokens=True)["input_ids"]


def notes_of(encoder: Encoder, example) -> dict[str, int]:
    said: dict[str, int] = {}
    encoder(example, lambda text, n: said.update({text: said.get(text, 0) + n}))
    return said


# Completion and Text


def test_a_text_of_a_special_token_is_plain_text():
    encoder, eos = Encoder(TOK, 99, special_text="plain"), TOK.eos_token_id
    before, after = split(encoder, f"a{END}"), split(encoder, f"b{START}c")
    made = encoder(Completion(f"a{END}", f"b{START}c"))
    assert made.ids.tolist() == [*before, *after, eos] and made.ids.tolist().count(eos) == 1
    assert made.target.tolist() == [False] * len(before) + [True] * (len(after) + 1)
    made = encoder(Text(f"a{END}b"))
    assert made.ids.tolist() == [*split(encoder, f"a{END}b"), eos]
    assert notes_of(encoder, Text(f"a{END}b")) == {}, "nothing is lost"


@pytest.mark.parametrize("example", [Completion("2+2 =", f" 4{END}"), Text(f"ab{END}")])
def test_an_eos_at_the_end_is_still_the_end(example):
    kept, made = Encoder(TOK, 99)(example), Encoder(TOK, 99, special_text="plain")(example)
    assert made.ids.tolist() == kept.ids.tolist() and made.ids[-1] == TOK.eos_token_id


def test_a_token_that_the_vocabulary_has_no_pieces_for_is_refused():
    """A whole vocabulary may hold the text as one piece, special or not."""
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert Encoder(words, 99, special_text="plain")(Text("a a")).ids.tolist() == [0, 0, 1]
    with pytest.raises(RowProblem, match="the text of </s>, which the tokenizer has no other"):
        Encoder(words, 99, special_text="plain")(Text("a </s> a"))


def test_the_question_and_the_answer_of_a_completion_are_plain():
    encoder = Encoder(TOK, 99, special_text="plain")
    prompt, answer = encoder.question(Completion(f"a{END}", f"b{START}{END}"))
    assert prompt.tolist() == split(encoder, f"a{END}") and answer == f"b{START}"
    generated = split(encoder, f"b{START}")
    assert TOK.decode(generated, skip_special_tokens=True) == answer


# Chats


@pytest.mark.parametrize("template", [CHAT, GENERATION_CHAT, QWEN2, QWEN3, LLAMA3, GPT_OSS])
def test_a_template_s_tokens_are_tokens_and_the_data_s_are_text(template):
    encoder = plain(template)
    said = (("u", f"is {END} the end?"), ("a", f"no{START}assistant"), ("u", END), ("a", f"{END}."))
    made, twin = encoder(chat(*said)), [(role, text.replace("|", "!")) for role, text in said]
    other = encoder(chat(*twin))
    text = encoder.tokenizer.decode(made.ids)
    assert text.replace("|", "!") == encoder.tokenizer.decode(other.ids).replace("|", "!")
    assert made.ids.tolist().count(TOK.eos_token_id) == other.ids.tolist().count(TOK.eos_token_id)
    assert made.target.tolist() == other.target.tolist(), "a text of as many bytes, without a token"
    assert notes_of(encoder, chat(*said)) == {}


TEMPLATES = [CHAT, GENERATION_CHAT, QWEN2, QWEN3, LLAMA3, GPT_OSS, R1, GEMMA, MISTRAL, PHI, GLM]
ENCODERS = {template: plain(template) for template in TEMPLATES}
SAID = st.lists(
    st.sampled_from(["a", " b", "\n", ".", END, START, "<|user|>", "[INST]"]), max_size=5
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(TEMPLATES), st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_any_text_is_read_as_one_without_special_texts_is(template, said):
    """Beside a twin of as many bytes: `~|end|>` for `<|end|>`. Ids differ in those bytes alone."""
    encoder = ENCODERS[template]

    def row(change) -> Messages:
        turns = [
            (who, change("".join(["x", *parts])))
            for pair in said
            for who, parts in zip("ua", pair, strict=True)
        ]
        return chat(*turns)

    pattern = encoder.specials.pattern
    made = encoder(row(str))
    other = encoder(row(lambda text: pattern.sub(lambda match: "~" + match[0][1:], text)))
    (less, bracket, tilde) = (encoder.tokenizer(one)["input_ids"][0] for one in "<[~")
    assert made.target.tolist() == other.target.tolist()
    changed = made.ids != other.ids
    assert set(made.ids[changed].tolist()) <= {less, bracket}
    assert set(other.ids[changed].tolist()) <= {tilde}
    texts = "".join(part for pair in said for parts in pair for part in parts)
    assert changed.sum() == len(pattern.findall(texts))


def test_the_question_and_the_answer_of_a_chat_are_plain():
    encoder = plain(QWEN2)
    said = chat(("u", f"a{END}"), ("a", "b"), ("u", "c"), ("a", f"d{START}e"))
    made, (prompt, answer) = encoder(said), encoder.question(said)
    assert made.ids[: len(prompt)].tolist() == prompt.tolist()
    assert answer == f"d{START}e"
    assert made.ids[len(prompt) :].tolist() == [*split(encoder, answer), TOK.eos_token_id]


def test_calls_and_schemas_are_plain_too():
    encoder = plain("{% if tools %}{{ tools | tojson }}{% endif %}" + QWEN2)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [f"y{END}"]}}}
    said = [{"role": "user", "content": "w"}]
    said.append({"role": "assistant", "content": "", "tool_calls": [call]})
    schema = [{"type": "function", "function": {"name": "f", "description": f"ends at {START}"}}]
    row = Messages(said, schema)
    made = encoder(row).ids.tolist()
    kept = Encoder(encoder.tokenizer, 4000)
    tokens = kept(row).ids.tolist()
    for token in (START, END):
        id_ = TOK.convert_tokens_to_ids(token)
        assert tokens.count(id_) == made.count(id_) + 1
    texts = [
        f"rows with the text of {token} in them, which becomes that token (batch.special_text)"
        for token in (END, START)
    ]
    assert notes_of(kept, row) == dict.fromkeys(texts, 1)
    with pytest.raises(RowProblem, match=r"found the text of <\|end\|>"):
        Encoder(encoder.tokenizer, 4000, special_text="refuse")(row)


def test_a_key_that_no_template_reads_is_not_looked_at():
    row = Messages([{"role": "user", "content": "a", "id": END}, *chat(("a", "b")).messages])
    assert notes_of(Encoder(TOK, 99), row) == {
        "rows whose turns have the key id, which nothing reads": 1
    }


def test_a_template_that_reads_the_text_itself_is_refused():
    shouts = CHAT.replace("{{ message.content }}", "{{ message.content.split('<|end|>')[0] }}")
    encoder = plain(shouts)
    assert len(encoder(chat(("u", "a"), ("a", "b"))).ids)
    with pytest.raises(RowProblem, match=r"in a way of its own.*keep or refuse") as problem:
        encoder(chat(("u", f"a{END}c"), ("a", "b")))
    assert problem.value.reason == "special token"


REFUSES = (
    "{% if messages[0].content|length > 3 %}{{ raise_exception(messages[0].content) }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (REFUSES + CHAT, f"TemplateError: abc{END}"),
        # A mark puts more before the end of the first five characters.
        (CHAT.replace("message.content }}", "message.content[:5] }}"), f"abc{END}"),
        (CHAT.replace("{{ message.content", "{{ message.content[-1:]"), f"{END}{END}"),
    ],
)
def test_an_error_of_a_row_shows_the_texts_of_special_tokens(template, text):
    encoder, row = plain(template), chat(("u", f"abc{END}"), ("a", "b"))
    for work in encoder, encoder.question:
        with pytest.raises(RowProblem) as problem:
            work(row)
        assert text in str(problem.value), problem.value
        assert "\\U0010" not in str(problem.value) and chr(MASKS) not in str(problem.value)


def test_a_cut_and_generation_tags_count_the_plain_tokens():
    encoder = plain(GENERATION_CHAT)
    said = chat(("u", "a"), ("a", f"b{END}c"))
    whole = encoder(said)
    n = len(whole.ids) - 4  # within the text of the token
    cut = Encoder(encoder.tokenizer, n, "truncate", "plain")(said)
    assert cut.truncated and len(cut.ids) == n
    assert cut.ids.tolist() == whole.ids[:n].tolist()
    assert cut.target.tolist() == whole.target[:n].tolist()


# Reading


def llama2() -> PreTrainedTokenizerFast:
    """Puts U+2581 before every text between special tokens, as Llama 2's does, and eats space."""
    letters = ["\u2581", *"abcd<>/s", "\u2581a", "<s>", "</s>"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, [("\u2581", "a")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 10)])
    backend.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("made", [tokenizer(), llama2()], ids=["bytes", "llama2"])
@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.sampled_from(["a", "b ", " c", "<s>", "</s>", START, END, "\n"])))
def test_a_text_without_masks_is_read_as_ever(made, parts):
    """Through the copy too, which knows masks as tokens: a mask is put behind the text."""
    specials, text = Specials(made, "plain"), "".join(parts)
    usual = made(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, begin, end = specials.read(text, masked=False)
    assert ids == usual["input_ids"]
    assert np.stack([begin, end], 1).tolist() == [list(one) for one in usual["offset_mapping"]]
    token = specials.pattern.findall(START + "<s>")[0]
    text += made.eos_token
    usual = made(text, add_special_tokens=False, return_offsets_mapping=True)
    masked = text + specials.mask(chat(("u", token))).messages[0]["content"]
    ids, begin, end = specials.read(masked, masked=True)
    n = len(usual["input_ids"])
    assert ids[:n] == usual["input_ids"] and made.decode(ids[n:]).strip() == token
    assert np.stack([begin, end], 1)[:n].tolist() == [list(o) for o in usual["offset_mapping"]]
    assert set(begin[n:]) == {len(text)} and set(end[n:]) == {len(text) + 1}
    assert not set(ids[n:]) & specials.ids


@pytest.mark.parametrize("policy", ["keep", "plain"])
def test_a_character_of_the_data_that_is_a_mask_elsewhere_stays_itself(policy):
    encoder, odd = Encoder(TOK, 400, special_text=policy), chr(MASKS)
    said = chat(("u", f"a{odd}"), ("a", f"b{odd}"), ("u", "c"), ("a", odd))
    usual = TOK.apply_chat_template([dict(turn) for turn in said.messages], return_dict=False)
    assert encoder(said).ids.tolist() == usual[:-1]  # without the last line break
    prompt, answer = encoder.question(said)
    assert answer == odd and prompt.tolist() == usual[: len(prompt)]
    both = chat(("u", f"{odd}{END}"), ("a", "b"))
    if policy == "plain":
        with pytest.raises(RowProblem, match="the chat template renders the text"):
            encoder(both)


def test_a_mask_is_undone():
    specials = Specials(TOK)
    masked = specials.mask(chat(("u", f"{END}a{START}"))).messages[0]["content"]
    assert (
        len(masked) == 3 and ord(masked[0]) >= MASKS and specials.unmask(masked) == f"{END}a{START}"
    )
