"""The texts of a tokenizer's special tokens: what becomes of them where the data holds them.

A chat template writes such texts too, and there they must be tokens. To tell the two apart, each
such text in the data is masked by one character before the template sees it. When the rendered
text is read, characters and tokens change places: a copy of the tokenizer knows the characters as
the tokens, and reads the tokens' texts as any other text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from mtl.data.formats import Messages, RowProblem

Policy = Literal["keep", "plain", "refuse"]
Note = Callable[[str, int], None]
"""Takes a remark on a row that is kept, and how often it holds. The report adds remarks up over
rows.
"""
MASKS = 0x100000  # the first of 65,534 characters that no standard gives a meaning


class Read(NamedTuple):
    """A text's n tokens: their ids, and where each begins and ends in it, in characters."""

    ids: list[int]
    begin: np.ndarray  # (n,) int64
    end: np.ndarray


class Specials:
    """A tokenizer's special tokens.

    Args:
        tokenizer: any. For `read` it must be a fast one.
        policy: `batch.special_text`.

    Attributes:
        pattern: finds their texts, the longest first. Without such tokens it finds nothing.
        ids: their ids.
        options: keywords with which the tokenizer reads a text of the data.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: Policy = "keep"):
        self.tokenizer, self.policy = tokenizer, policy
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = frozenset({*tokenizer.all_special_ids, *added})
        texts = {*tokenizer.all_special_tokens, *(token.content for token in added.values())}
        self._texts = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self.options = {"split_special_tokens": True} if policy == "plain" else {}
        self._mask = {text: chr(MASKS + i) for i, text in enumerate(self._texts)}
        self._unmask = {ord(mask): text for text, mask in self._mask.items()}

    def look(self, texts: Iterable[str], note: Note) -> bool:
        """Note or refuse special tokens' texts in the data, as the policy says. Kept, they become
        these tokens, so an answer may end too early.

        Returns:
            Whether there are any.

        Raises:
            RowProblem: the policy refuses one, or it cannot be read as plain text.
        """
        found = sorted({match[0] for text in texts for match in self.pattern.finditer(text)})
        for token in found:
            shown = f"found the text of {token}, which "
            if self.policy == "refuse":
                raise RowProblem("special token", f"{shown}the model reads as a token")
            if self.policy == "keep":
                becomes = "which becomes that token (batch.special_text)"
                note(f"rows with the text of {token} in them, {becomes}", 1)
            elif self.tokenizer.convert_tokens_to_ids(token) in self._plain(token):
                raise RowProblem(
                    "special token", f"{shown}the tokenizer has no other tokens for, wanted some"
                )
        return bool(found)

    def mask(self, example: Messages) -> Messages:
        """The conversation with one character in the place of each special token's text."""

        def hide(value: Any) -> Any:
            match value:
                case str():
                    return self.pattern.sub(lambda match: self._mask[match[0]], value)
                case Mapping():
                    return {hide(key): hide(inner) for key, inner in value.items()}
                case list() | tuple():
                    return [hide(inner) for inner in value]
            return value

        return replace(example, messages=hide(example.messages), tools=hide(example.tools))

    def unmask(self, text: str) -> str:
        """The text without masks."""
        return text.translate(self._unmask)

    def shown(self, message: str) -> str:
        """A message for people without masks, also where `repr` wrote them as escapes."""
        for mask, text in self._unmask.items():
            message = message.replace(f"\\U{mask:08x}", text)
        return self.unmask(message)

    def read(self, text: str, masked: bool) -> Read:
        """Tokenize a rendered text, in which special tokens are tokens.

        Args:
            masked: whether masks in it are plain text. Else their characters are the data's own.
        """
        if not masked:
            options = {"add_special_tokens": False, "return_offsets_mapping": True}
            made = self.tokenizer(text, verbose=False, **options)
            offsets = np.array(made["offset_mapping"], np.int64).reshape(-1, 2)
            return Read(made["input_ids"], *offsets.T)
        pieces, first, last, at = [], [], [], 0
        for match in self._either.finditer(text):
            start, stop = match.span()
            other = self._mask.get(match[0]) or self._unmask[ord(match[0])]
            pieces += [text[at:start], other]
            first += [np.arange(at, start), np.full(len(other), start)]
            last += [np.arange(at, start) + 1, np.full(len(other), stop)]
            at = stop
        first = np.concatenate([*first, np.arange(at, len(text) + 1)])
        last = np.concatenate([*last, np.arange(at, len(text)) + 1])
        made = self._swapped.encode("".join([*pieces, text[at:]]), add_special_tokens=False)
        begin, end = np.array(made.offsets, np.int64).reshape(-1, 2).T
        ids = [self._swapped_ids.get(token, token) for token in made.ids]
        return Read(ids, first[begin], np.where(end > begin, last[end - 1], first[end]))

    def _plain(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    @cached_property
    def _either(self) -> re.Pattern[str]:
        """Finds special tokens' texts and masks."""
        return re.compile(f"{self.pattern.pattern}|[{''.join(self._mask.values())}]")

    @cached_property
    def _swapped(self) -> Tokenizer:
        """Knows masks as tokens, and no special token's text. Masks are not special to it: it
        would read those as text too.
        """
        made = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        made.no_truncation()
        made.no_padding()
        known = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        for text, mask in self._mask.items():
            token = known.get(text)
            how = {
                name: getattr(token, name, False) for name in ("lstrip", "rstrip", "single_word")
            }
            made.add_tokens([AddedToken(mask, normalized=False, **how)])
        made.encode_special_tokens = True
        return made

    @cached_property
    def _swapped_ids(self) -> dict[int, int]:
        """The copy's id of each mask -> the special token's."""
        ids = self.tokenizer.convert_tokens_to_ids
        return {self._swapped.token_to_id(mask): ids(text) for text, mask in self._mask.items()}


def texts_of(example: Messages, keys: Iterable[str]) -> Iterator[str]:
    """The texts of a conversation that a template may render: under these keys of its turns, and
    in its tools.
    """
    for turn in example.messages:
        for key in keys:
            yield from _texts(turn.get(key))
    yield from _texts(example.tools)


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                yield from _texts(key)
                yield from _texts(inner)
        case list() | tuple():
            for inner in value:
                yield from _texts(inner)
