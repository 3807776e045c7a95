"""Examples into token ids with a target mask."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mtl.config.schema import adapter_folder
from mtl.data.encoded import DataError
from mtl.data.formats import Completion, Example, Messages, RowProblem, Text

QUIET = {
    "verbose": False
}  # no warning about a text above the model's length: what happens to it is batch.too_long's
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TokenizerChoice(Protocol):
    """What names a tokenizer: the `model` section of a config."""

    name: str
    revision: str | None
    allow_remote_code: bool
    chat_template: str | None


def load_tokenizer(model: TokenizerChoice, where: str = "config") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template of `model.chat_template` (a file) if that is
    given.

    Args:
        model: the config's section.
        where: file and line of its name, for errors.

    Raises: DataError if it cannot be loaded, or would run code that came with it.
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
    except (OSError, ValueError, ImportError, KeyError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise DataError(
                f"{where}: model.name: {name!r} runs code that comes with it. If you trust it: "
                "model.allow_remote_code: true"
            ) from error
        hint = (
            " Ask its owner for access, then log in with `hf auth login` or set HF_TOKEN."
            if "gated" in text
            else ""
        )
        raise DataError(
            f"{where}: model.name: found no tokenizer of {name!r}: {text[:500]}{hint}"
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
    token: by generation tags where the template has them, else by the difference of prefixes
    (`_by_prefix`). Completion: the tokenizer's opening tokens (bos), prompt, completion, eos;
    targets are completion and eos. The two texts are tokenized together where that starts with the
    prompt's own tokens, else each by itself: either way the completion follows exactly the tokens
    that the prompt has when the model is used. Text: opening tokens, text, eos; all are targets but
    the very first token.

    Args: tokenizer: of the model. Needs an eos token for Completion and Text, a chat template for
        Messages. max_length: most tokens of an example. too_long: what happens to a longer one:
        "truncate" it at the end, or (drop, error) raise a RowProblem.

    Raises: RowProblem for an example that cannot be used; DataError where no example could.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        too_long: Literal["drop", "truncate", "error"] = "drop",
    ):
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        bare = self._ids("a")
        full = tokenizer("a")["input_ids"]
        self._opening = next(
            (full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), []
        )

    def __call__(self, example: Example) -> Tokenized:
        match example:
            case Messages():
                ids, target = self._messages(example)
            case Completion(prompt, completion):
                ids, target = self._completion(prompt, completion)
            case Text(text):
                ids = [*self._opening, *self._ids(text), self._eos()]
                target = [True] * len(ids) if text else [False]
            case _:
                raise RowProblem(
                    "bad value",
                    f"found a {type(example).__name__} from the format, wanted an Example",
                )
        return self._limited(np.array(ids, dtype=np.int32), np.array(target, dtype=bool))

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
        before, both = self._ids(prompt), self._ids(prompt + completion)
        if both[: len(before)] != before:
            both = before + self._ids(completion)
        ids = [*self._opening, *both, self._eos()]
        start = len(self._opening) + len(before)
        return ids, [i >= start for i in range(len(ids))]

    def _messages(self, example: Messages) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.chat_template:
            raise DataError(
                "found a tokenizer without a chat template, wanted one: chat formats need it. Name "
                "a file as "
                "model.chat_template, or use the format prompt_completion"
            )
        template = self.tokenizer.get_chat_template(tools=example.tools)
        calls = any(turn.get("tool_calls") for turn in example.messages)
        for key, given in (("tools", example.tools), ("tool_calls", calls)):
            if given and key not in template:  # it would leave them out without a word
                raise RowProblem(
                    "template",
                    f"found {key}, which the chat template does not read; set model.chat_template",
                )
        if GENERATION_TAG.search(template):
            made = self._render(
                example, len(example.messages), return_dict=True, return_assistant_tokens_mask=True
            )
            return made["input_ids"], [bool(one) for one in made["assistant_masks"]]
        return self._by_prefix(example)

    def _by_prefix(self, example: Messages) -> tuple[list[int], list[bool]]:
        """Targets by rendering what comes before an assistant turn, and that with the turn: the
        difference is target.

        Holds only if both are how the whole conversation begins, which is checked, id by id. A turn
        ends with its last eos token if it has one: what templates put behind it (a newline) is
        never generated.
        """
        whole = self._render(example, len(example.messages))
        target = [False] * len(whole)
        for i, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            turn = f"turn {i + 1} (assistant)"
            if i == 0:
                raise RowProblem(
                    "template",
                    f"{turn} is the first: there is no prompt that a template could render",
                )
            with_turn = self._render(example, i + 1) if i + 1 < len(example.messages) else whole
            past = self._render(example, i, add_generation_prompt=True)
            if whole[: len(with_turn)] != with_turn:
                raise RowProblem(
                    "template",
                    f"the chat template changes {turn} once more turns follow: "
                    f"{self._differ(with_turn, whole)}. Use a "
                    "template with {% generation %} tags (model.chat_template), or split the "
                    "conversation",
                )
            if with_turn[: len(past)] != past:
                raise RowProblem(
                    "template",
                    f"the chat template's generation prompt is not how {turn} begins: "
                    f"{self._differ(past, with_turn)}. "
                    "Use a template with {% generation %} tags (model.chat_template)",
                )
            added = with_turn[len(past) :]
            ends = [j for j, token in enumerate(added, 1) if token == self.tokenizer.eos_token_id]
            end = len(past) + (ends[-1] if ends else len(added))
            target[len(past) : end] = [True] * (end - len(past))
        return whole, target

    def _render(self, example: Messages, turns: int, **options: Any) -> Any:
        options = {"return_dict": False, **options}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(turn) for turn in example.messages[:turns]],
                tools=example.tools,
                tokenizer_kwargs=QUIET,
                **options,
            )
        except (
            Exception
        ) as error:  # a template is code, of the tokenizer's author: it raises what it likes
            raise RowProblem(
                "template", f"the chat template: {type(error).__name__}: {error}"
            ) from error

    def _differ(self, one: Sequence[int], other: Sequence[int]) -> str:
        """The surroundings of the place where two renderings part."""
        at = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        shown = (self.tokenizer.decode(ids[max(0, at - 8) : at + 16]) for ids in (one, other))
        return " against ".join(map(repr, shown))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **QUIET)["input_ids"]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no eos token, which must end an answer for the model to stop "
                "there"
            )
        return self.tokenizer.eos_token_id


def _needed(ids: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without what stands behind the last target: no loss depends on it (a template's newline after
    a turn, a user's last turn).
    """
    end = int(np.flatnonzero(target)[-1]) + 1
    return ids[:end], target[:end]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal, of all that decides which ids a text gets: the tokenizer's own file, its
    specials, its template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    specials = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    settings = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    parts = [type(tokenizer).__name__, rules, specials, settings, tokenizer.chat_template]
    return hash_of(json.dumps(parts, sort_keys=True, default=repr))


def hash_of(text: str) -> str:
    """Hexadecimal, 32 digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
