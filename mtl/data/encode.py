"""Examples into token ids with a target mask."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mtl.config.schema import adapter_folder
from mtl.data.encoded import DataError
from mtl.data.formats import REASONING, Completion, Example, Messages, RowProblem, Text
from mtl.data.special import Note, Policy, Specials, texts_of
from mtl.data.turns import Turns, find_turns, where_they_differ

QUIET = {
    "verbose": False
}  # no warning about a text above the model's length: what happens to it is batch.too_long's
SLACK = 64  # tokens at a shortened text's end that may differ from the whole text's
READ = {
    "role",
    "content",
    "tool_calls",
    *REASONING,
}  # keys of a turn that the encoder handles itself
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TokenizerChoice(Protocol):
    """What names a tokenizer: the `model` section of a config."""

    name: str
    revision: str | None
    allow_remote_code: bool
    chat_template: str | None


def load_tokenizer(model: TokenizerChoice, where: str = "config") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template of the file `model.chat_template`, if given.

    Args:
        model: the config's section.
        where: file and line of its name, for errors.

    Raises:
        DataError: it cannot be loaded, or would run code that came with it.
    """
    name = str(adapter_folder(model.name) or model.name)
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (adapter.parent / "tokenizer_config.json").is_file():
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().exists() else name,
            revision=model.revision,
            trust_remote_code=model.allow_remote_code,
        )
    except Exception as error:  # tokenizers raises no other class for a file that it cannot read
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise DataError(
                f"{where}: model.name: {name!r} runs code that comes with it. If you trust it: "
                "model.allow_remote_code: true"
            ) from error
        hint = (
            " Ask its owner for access, then log in with `hf auth login` or set HF_TOKEN."
            if "gated" in text
            else " Its tokenizer.json is damaged, or of a newer version of tokenizers."
            if type(error) is Exception
            else ""
        )
        raise DataError(
            f"{where}: model.name: found no tokenizer of {name!r}, neither in the folder "
            f"{Path(name).expanduser().absolute()} nor on the hub: {text[:500]}{hint}"
        ) from error
    if model.chat_template is not None:
        path = Path(model.chat_template).expanduser()
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"model.chat_template {path}: {error}") from error
    return tokenizer


class Tokenized(NamedTuple):
    """An encoded example: n tokens, the last one a target, the first never."""

    ids: np.ndarray  # (n,) int32
    target: np.ndarray  # (n,) bool
    truncated: bool  # whether it was truncated


class Encoder:
    """Calls take an Example and return its Tokenized.

    Messages: the chat template's text. Targets are the assistant's turns with their end-of-turn
    token (`find_turns`). Where the template has generation tags, targets are what these enclose,
    and the end-of-turn token.

    Completion: the tokenizer's opening tokens (bos), prompt, completion, eos. Targets are
    completion and eos. The two texts are tokenized together where that starts with the prompt's own
    tokens, else each by itself. Either way the completion follows exactly the tokens that the
    prompt has when the model is used.

    Text: opening tokens, text, eos. All are targets except the very first token.

    Args:
        tokenizer: of the model. Completion and Text need an eos token, Messages a chat template.
        max_length: most tokens of an example.
        too_long: what happens to a longer one: "truncate" cuts its end; "drop" and "error" raise a
            RowProblem.
        special_text: what happens to a special token's text inside the data: "keep" makes it that
            token; "plain" reads it as any other text; "refuse" refuses the row.

    Raises:
        RowProblem for an example that cannot be used; DataError where no example could.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        too_long: Literal["drop", "truncate", "error"] = "drop",
        special_text: Policy = "keep",
    ):
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.specials = Specials(tokenizer, special_text)
        bare = self._ids("a")
        full = tokenizer("a")["input_ids"]
        self._opening = next(
            (full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), []
        )
        # No token stands for more characters than its own text has (a byte-level one: bytes).
        self._widest = max(map(len, tokenizer.get_vocab()), default=1)

    def __call__(self, example: Example, note: Note = lambda text, times: None) -> Tokenized:
        match example:
            case Messages():
                ids, target = self._messages(example, note)
            case Completion(prompt, completion):
                completion = self._bare(completion)
                self.specials.look([prompt, completion], note)
                ids, target = self._completion(prompt, completion)
            case Text(text):
                text = self._bare(text)
                self.specials.look([text], note)
                ids = [*self._opening, *self._ended(self._ids(self._bounded(text)))]
                target = [True] * len(ids) if text else [False]
            case _:
                raise RowProblem(
                    "bad value",
                    f"found a {type(example).__name__} from the format, wanted an Example",
                )
        return self._limited(np.array(ids, dtype=np.int32), np.array(target, dtype=bool))

    def question(self, example: Example) -> tuple[np.ndarray, str]:
        """What a model is given to go on from, and the right answer.

        Returns:
            (n,) int32 ids; the text, as `decode(ids, skip_special_tokens=True)` gives one. Of
            Messages it is the last turn that is a target, as the template renders it.

        Raises:
            RowProblem: the example has no answer, or the template refuses it.
        """
        match example:
            case Completion(prompt, completion):
                answer = self._bare(completion) if self._is_plain else self._shown(completion)
                return np.array([*self._opening, *self._ids(prompt)], np.int32), answer
            case Messages(turns):
                last = example.last
                shown = self.specials.mask(example) if self._is_plain else example
                masked, turns = shown != example, shown.messages
                text, spans, *_ = self._turns(replace(shown, messages=turns[: last + 1]), masked)
                prompt = self._text(replace(shown, messages=turns[:last]), prompt=True)
                if not spans or spans[-1].turn != last:
                    raise RowProblem("template", f"the chat template leaves out turn {last + 1}")
                answer = self._shown(text[spans[-1].start : spans[-1].stop])
                ids = np.array(self.specials.read(prompt, masked).ids, np.int32)
                return ids, self.specials.unmask(answer) if masked else answer
        raise RowProblem(
            "no question", f"found a {type(example).__name__}, wanted an example with an answer"
        )

    @property
    def _is_plain(self) -> bool:
        return self.specials.policy == "plain"

    def _shown(self, text: str) -> str:
        return self.specials.pattern.sub("", text)

    def _turns(self, example: Messages, masked: bool) -> Turns:
        eos = self.tokenizer.eos_token or ""
        try:
            return find_turns(example, self._text, eos, self.specials.pattern)
        except RowProblem as problem:
            if not masked:
                raise
            raise RowProblem(problem.reason, self.specials.shown(str(problem))) from problem

    def _bare(self, text: str) -> str:
        """The text without the eos at its end, which an answer may bring along."""
        return text.removesuffix(self.tokenizer.eos_token or "\0")

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self._eos()] else [*ids, self._eos()]

    def _bounded(self, text: str, needed: int | None = None) -> str:
        """The text, or the part of it that matters where it has too many tokens in any case.

        Tokenizing takes a second a megabyte or more, and a row may have many megabytes. needed:
        characters up to the last target; None: all.
        """
        most = self.max_length * self._widest
        needed = len(text) if needed is None else needed
        if needed <= most:
            return text if len(text) <= 2 * most else text[: needed + most]
        if self.too_long != "truncate":
            raise RowProblem(
                "too long",
                f"found {needed:,} characters, more than batch.max_length = "
                f"{self.max_length} tokens",
            )
        return text[: most + self._widest * SLACK]

    def _limited(self, ids: np.ndarray, target: np.ndarray) -> Tokenized:
        target[:1] = False  # nothing stands before the first token
        if not target.any():
            raise RowProblem(
                "no target", f"none of its {len(ids)} tokens is a target: the answer is empty"
            )
        ids, target = _needed(ids, target)
        length = len(ids)
        if length <= self.max_length:
            return Tokenized(ids, target, False)
        if self.too_long != "truncate":
            raise RowProblem(
                "too long",
                f"found {length} tokens, wanted at most batch.max_length = {self.max_length}",
            )
        ids, target = ids[: self.max_length], target[: self.max_length]
        if not target.any():
            raise RowProblem(
                "no target", f"cut at {self.max_length} of {length} tokens, which leaves no target"
            )
        return Tokenized(*_needed(ids, target), True)

    def _completion(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        if not completion:
            raise RowProblem("no target", "the completion is empty")
        whole = self._bounded(prompt + completion)
        prompt, completion = whole[: len(prompt)], whole[len(prompt) :]
        before, both = self._ids(prompt), self._ids(whole)
        if both[: len(before)] != before:
            both = self._joined(before, completion, both)
        ids = [*self._opening, *self._ended(both)]
        start = len(self._opening) + len(before)
        return ids, [i >= start for i in range(len(ids))]

    def _joined(self, before: list[int], completion: str, both: list[int]) -> list[int]:
        """The prompt's own tokens, then the completion's. Together they decode to the two texts
        joined.

        Some tokenizers (Llama 2's) put a space before every text, so also before a completion that
        is tokenized by itself. They put none behind another character, which we remove again.
        """
        wanted = self._decode(both)
        for lead in ("", "\n", "=", "a", "0"):
            led, joined = self._ids(lead), self._ids(lead + completion)
            if joined[: len(led)] == led:
                made = before + joined[len(led) :]
                if self._decode(made) == wanted:
                    return made
        raise RowProblem(
            "boundary",
            "the tokenizer joins the end of the prompt and the start of the completion "
            f"({wanted[:60]!r}...): begin the completion with a space or a line break",
        )

    def _messages(self, example: Messages, note: Note) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.chat_template:
            raise DataError(
                "found a tokenizer without a chat template, wanted one: chat formats need it. Name "
                "a file as model.chat_template, or use the format prompt_completion"
            )
        template = self.tokenizer.get_chat_template(tools=example.tools)
        calls = any(turn.get("tool_calls") for turn in example.messages)
        for key, given in (("tools", example.tools), ("tool_calls", calls)):
            if given and key not in template:  # it would leave them out without a word
                raise RowProblem(
                    "template",
                    f"found {key}, which the chat template does not read; set model.chat_template",
                )
        read = set(READ)
        for key in sorted({key for turn in example.messages for key in turn} - READ):
            if re.search(rf"\b{re.escape(key)}\b", template):
                read.add(key)
            else:
                note(f"rows whose turns have the key {key}, which nothing reads", 1)
        masked = self.specials.look(texts_of(example, read), note) and self._is_plain
        shown = self.specials.mask(example) if masked else example
        text, spans, unreasoned, added = self._turns(shown, masked)
        if masked:
            self._same(self.specials.unmask(text), self._text(example) + added)
        if unreasoned:
            note("turns that the chat template renders without their reasoning", unreasoned)
        spans = [span for span in spans if span.turn not in example.context]
        if not spans:
            raise RowProblem("no target", "the chat template leaves out every turn to train on")
        if (last := example.messages[-1]["role"]) != "assistant":
            note(f"rows that end with a turn of the {last}, from which nothing is learned", 1)
        borrowed = Counter(span.borrowed for span in spans if span.borrowed is not None)
        for token, times in borrowed.items():
            said = (
                f"{token} ends them, where generation must stop too" if token else "none is learned"
            )
            note(f"turns that the chat template has no end token for: {said}", times)
        whole, text = text, self._bounded(text, spans[-1].stop)
        if spans[0].start >= len(text):
            raise RowProblem(
                "no target", f"cut at {self.max_length} tokens, which leaves no target"
            )
        if not self.tokenizer.is_fast:
            raise DataError(
                f"found the tokenizer {type(self.tokenizer).__name__}, which does not say which "
                "characters its tokens stand for; wanted a fast one for chat formats"
            )
        ids, begin, end = self.specials.read(text, masked)
        target = [False] * len(ids)
        tagged = self._tagged(shown, whole, added) if GENERATION_TAG.search(template) else None
        for turn, start, stop, _ in spans:
            if start >= len(text):  # it has been cut off
                break
            # The first token that reaches into the turn, and the first that begins after it.
            i, j = int(np.searchsorted(end, start, "right")), int(np.searchsorted(begin, stop))
            if stop <= len(text):
                said = text[start:stop]
                self._verify(ids[i:j], self.specials.unmask(said) if masked else said, turn)
            inside = [True] * (j - i) if tagged is None else tagged[begin[i:j]].tolist()
            if any(inside):  # tags may leave out the end of the turn
                end_at = start + len(text[start:stop].rstrip())
                last = int(np.searchsorted(begin, end_at)) - 1
                inside[last - i] |= ids[last] in self.specials.ids
            target[i:j] = inside
        return ids, target

    def _tagged(self, example: Messages, text: str, added: str) -> np.ndarray:
        """Which characters of a text the template's generation tags enclose: (n,) bool. The
        template has not rendered the last of them, `added`.

        The library says it of tokens. Where masks stand in the text, the row's are others.
        """
        made = self._render(example, return_dict=True, return_assistant_tokens_mask=True)
        options = {"add_special_tokens": False, "return_offsets_mapping": True, **QUIET}
        coded = self.tokenizer(text.removesuffix(added), **options)
        tagged = np.zeros(len(text), dtype=bool)
        both = zip(coded["offset_mapping"], made["assistant_masks"], strict=True)
        for (start, stop), is_inside in both:
            tagged[start:stop] |= bool(is_inside)
        return tagged

    def _same(self, found: str, wanted: str) -> None:
        """Refuse a rendering that depends on whether masks stand in the place of special texts."""
        if found != wanted:
            masked, whole = where_they_differ(found, wanted)
            raise RowProblem(
                "special token",
                "the chat template renders the text of a special token in the data in a way of its "
                f"own: found {whole!r}, wanted {masked!r}. Use batch.special_text: keep or refuse",
            )

    def _verify(self, ids: list[int], text: str, turn: int) -> None:
        """Check that the targets decode to the turn's text.

        White space does not count: some tokenizers drop it at the start of a text. Nor does what
        the tokenizer changes in any text.
        """
        found = "".join(self._decode(ids).split())
        if found != "".join(text.split()) and found != "".join(
            self._decode(self._ids(text)).split()
        ):
            raise RowProblem(
                "template",
                f"the tokens of turn {turn + 1} (assistant) are not its text: found "
                f"{self._decode(ids)[:60]!r}, wanted {text[:60]!r}. A token reaches over its start "
                "or its end; set model.chat_template",
            )

    def _text(self, example: Messages, prompt: bool = False) -> str:
        return self._render(example, tokenize=False, add_generation_prompt=prompt)

    def _render(self, example: Messages, **options: Any) -> Any:
        options = {"return_dict": False, "tokenizer_kwargs": QUIET, **options}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(turn) for turn in example.messages], tools=example.tools, **options
            )
        except (
            Exception
        ) as error:  # a template is code, of the tokenizer's author: it raises what it likes
            raise RowProblem(
                "template", f"the chat template: {type(error).__name__}: {error}"
            ) from error

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _ids(self, text: str) -> list[int]:
        """Of a text of the data."""
        options = {**QUIET, **self.specials.options}
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no eos token, which must end an answer for the model to stop "
                "there"
            )
        return self.tokenizer.eos_token_id


def _needed(ids: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The example up to its last target. No loss depends on what follows: a template's newline
    after a turn, a user's last turn.
    """
    end = int(np.flatnonzero(target)[-1]) + 1
    return ids[:end], target[:end]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal hash of all that decides a text's ids: the tokenizer's own file, its special
    tokens, its template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else _file(backend)
    specials = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    settings = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    parts = [type(tokenizer).__name__, rules, specials, settings, tokenizer.chat_template]
    parts += [datetime.now().strftime(one) for one in dates(tokenizer)]
    return hash_of(json.dumps(parts, sort_keys=True, default=repr))


def _file(backend: Tokenizer) -> str:
    """A tokenizer's own file without truncation and padding.

    Some files have these. Every call sets them anew, so a process that has encoded a text would
    otherwise have another fingerprint than one that waited.
    """
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        return backend.to_str()
    finally:
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def dates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Today's date in each form that the chat template reads. What it renders changes with the
    date.
    """
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False).replace(r"\"", '"')
    calls = template.count("strftime_now")
    formats = [one[1] for one in re.findall(r"""strftime_now\(\s*(['"])(.*?)\1""", template)]
    return sorted(formats) if len(formats) == calls else ["%Y-%m-%d"]


def hash_of(text: str) -> str:
    """Hexadecimal, 32 digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
