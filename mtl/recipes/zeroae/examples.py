"""Texts with the class that they are taken for: their arrays and their batches, for both parts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from mtl.config import Config, ConfigError
from mtl.data.encode import tokenizer_fingerprint
from mtl.data.encoded import Encoded
from mtl.data.examples import LOSS, Batch, Book, Piece, Row
from mtl.data.formats import Labeled, RowProblem
from mtl.data.special import Note, Specials

SCORERS = "bi", "cross"
Ids = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class PromptBatch(Batch):
    """P pairs of a text and a class's prompt.

    Attributes:
        input_ids, attention_mask: (N, T) int64, what the encoder reads. `bi`: the texts, then the
            prompts; `cross`: a row is text and prompt.
        token_type_ids: (N, T) int64, which of the two a token belongs to.
        text, prompt: (P,) int64, a pair's rows among the N; `cross`: the same row.
        right: (P,) float32, 1: the text's class, 0: another.
        task: (P,) int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    text: Tensor
    prompt: Tensor
    right: Tensor
    task: Tensor

    @property
    def positions(self) -> int:
        return self.input_ids.numel()

    def counts(self, k: int) -> Tensor:
        """(k,) int64: two pairs a text."""
        return self.tally(self.task, k)


@dataclass(frozen=True)
class TextBatch(Batch):
    """B texts to recover.

    Attributes:
        input_ids, attention_mask: (B, T) int64, what the encoder reads.
        decoder_ids, decoder_mask: (B, L) int64: prompt, text, end.
        at: (S, 2) int64, text and position whose next token is a target; (S,) `labels` their ids.
        label: (B,) int64, the classes. noise: (B, m) float32, Gumbel noise of the codes.
        first, second: (Q,) int64, texts whose codes the adversary compares, under the first's
            class; same: (Q,) float32, 1: the second is of that class too.
        task: (S,) int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_ids: Tensor
    decoder_mask: Tensor
    at: Tensor
    labels: Tensor
    label: Tensor
    noise: Tensor
    first: Tensor
    second: Tensor
    same: Tensor
    task: Tensor

    @property
    def positions(self) -> int:
        return self.input_ids.numel() + self.decoder_ids.numel()

    def counts(self, k: int) -> Tensor:
        """(k,) int64: tokens of the texts and their ends."""
        return self.tally(self.task, k)


class Classes:
    """The classes' names and prompts, as encoder and decoder read them.

    Args:
        encoder: folder or hub name of the encoder, for its tokenizer.
        labels: a JSON file with the list of names.
        prompt: a text with {label}.

    Attributes:
        names, prompts: C texts. ids: for each prompt the encoder's token ids.

    Raises:
        ConfigError: the file, the names or the prompt cannot be used.
    """

    def __init__(self, config: Config, encoder: str, labels: str, prompt: str):
        def wrong(key: str, found: str, wanted: str) -> ConfigError:
            return ConfigError([config.error(("objective", key), found, wanted)])

        try:
            names = json.loads(Path(labels).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise wrong("labels", f"{labels!r}: {error}", "a JSON file with a list") from error
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise wrong("labels", f"{names!r}"[:60], "a list of the classes' names")
        if len(names) < 2:
            raise wrong("labels", f"the names {names}", "two or more")
        if twice := [name for name in set(names) if names.count(name) > 1]:
            raise wrong("labels", f"{min(twice)!r} twice", "each name once")
        try:
            self.prompts = [prompt.format(label=name) for name in names]
        except (KeyError, IndexError, ValueError) as error:
            raise wrong("prompt", repr(prompt), "a text with {label}") from error
        if len(set(self.prompts)) < len(names):
            raise wrong("prompt", repr(prompt), "a text with {label}")
        self.names: list[str] = names
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.ids = [self.tokenizer(text)["input_ids"] for text in self.prompts]
        pad = self.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else pad

    @cached_property
    def seams(self) -> "Seams":
        """How the encoder reads two texts as one."""
        return Seams(self.tokenizer)


class ZeroExamples:
    """What both parts share. Columns of a row: `ids`, the encoder's token ids; `label`, (1,), the
    number of the class that the text is taken for.
    """

    packs = False
    makes_dummies = False
    notes = True
    columns: Mapping[str, pa.DataType] = {"ids": pa.int32(), "label": pa.int32()}

    def __init__(self, book: Book, tokenizer: Any, config: Config, classes: Classes):
        self.book, self.tokenizer, self.classes = book, tokenizer, classes
        self.max_length, self.too_long = config.batch.max_length, config.batch.too_long
        both, special_text = (classes.tokenizer, tokenizer), config.batch.special_text
        self.specials = [Specials(one, special_text) for one in both]

    @property
    def identity(self) -> Any:
        tokenizers = [tokenizer_fingerprint(t) for t in (self.tokenizer, self.classes.tokenizer)]
        limits = [self.max_length, self.too_long == "truncate", self.specials[0].policy]
        return [tokenizers, self.classes.names, self.classes.prompts, limits]

    def encode(self, example: Any, note: Note = lambda text, times: None) -> Row:
        if not isinstance(example, Labeled) or example.pair is not None:
            found = type(example).__name__
            raise RowProblem("bad value", f"found a {found}, wanted one labeled text")
        if not example.text.strip():
            raise RowProblem("no target", "the text is empty")
        if example.label not in self.classes.names:
            names = ", ".join(self.classes.names[:8])
            raise RowProblem("unknown class", f"label: found {example.label!r}, wanted {names}")
        said: dict[str, int] = {}  # once a row, though both tokenizers may have the token
        for one in self.specials:
            one.look([example.text], said.__setitem__)
        for text, times in said.items():
            note(text, times)
        options = {"verbose": False, **self.specials[0].options}
        ids = self.classes.tokenizer(example.text, **options)["input_ids"]
        long = len(ids) > self.max_length
        if long:
            options |= {"truncation": True, "max_length": self.max_length}
            ids = self.classes.tokenizer(example.text, **options)["input_ids"]
        label = self.classes.names.index(example.label)
        columns, count, cut = self._columns(example.text, label)
        if (long or cut) and self.too_long != "truncate":
            wanted = f"at most batch.max_length = {self.max_length}"
            raise RowProblem("too long", f"found more tokens than that, wanted {wanted}")
        both = {"ids": np.array(ids, np.int32), "label": np.array([label], np.int32), **columns}
        return Row(both, (count,), label + 1, long or cut)

    def _columns(self, text: str, label: int) -> tuple[dict[str, np.ndarray], int, bool]:
        """Further columns, the loss's count, and whether something was cut."""
        raise NotImplementedError

    def _task(self, piece: Piece) -> int:
        return self.book.task(LOSS, piece.stream)

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        mark = "\033[32m{}\033[0m" if color else "[[{}]]"
        name = self.classes.names[int(columns["label"][0])]
        return f"{self.classes.tokenizer.decode(columns['ids'].tolist())} -> {mark.format(name)}"

    def settle(self, splits: Mapping[int, tuple[Encoded, Encoded]]) -> None:
        pass


class PromptExamples(ZeroExamples):
    """A text beside its class's prompt, and beside another's. A class is drawn as the wrong one by
    1 / (1 + the times it is the right one among all training rows), so that a frequent class is
    not wrong as often as it is right.

    Args:
        scorer: `bi` or `cross`, as the loader's.
    """

    unit = "pair"

    def __init__(self, book: Book, tokenizer: Any, config: Config, classes: Classes, scorer: str):
        super().__init__(book, tokenizer, config, classes)
        self.scorer = scorer
        self.rarity = np.ones(len(classes.names))

    def _columns(self, text: str, label: int) -> tuple[dict[str, np.ndarray], int, bool]:
        return {}, 2, False

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        longest = max(map(len, self.classes.ids))
        return lengths["ids"] if self.scorer == "bi" else 2 * (lengths["ids"] + longest)

    def settle(self, splits: Mapping[int, tuple[Encoded, Encoded]]) -> None:
        c = len(self.classes.names)
        labels = [int(t.columns(i)["label"][0]) for t, _ in splits.values() for i in range(len(t))]
        self.rarity = 1.0 / (1.0 + np.bincount(labels, minlength=c))

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> PromptBatch:
        pieces = [piece for row in rows for piece in row]
        classes = []
        for piece in pieces:
            right = int(piece.columns["label"][0])
            # The wrong class is never the right one.
            chance = np.where(np.arange(len(self.rarity)) == right, 0.0, self.rarity)
            classes += [right, int(piece.rng.choice(len(chance), p=chance / chance.sum()))]
        of = np.repeat(np.arange(len(pieces)), 2)
        texts = [piece.columns["ids"] for piece in pieces]
        read = pairs(texts, of, np.array(classes), self.classes, self.scorer)
        right = np.tile(np.array([1.0, 0.0], np.float32), len(pieces))
        task = np.repeat([self._task(piece) for piece in pieces], 2)
        return PromptBatch(*map(torch.from_numpy, (*read, right, task)))


class Seams:
    """Two texts as one, as the tokenizer itself would join them.

    Args:
        tokenizer: the encoder's.
    """

    def __init__(self, tokenizer: Any):
        # Measured on two short texts: tokenizers have no call that joins ids.
        one, two = tokenizer("a"), tokenizer("a", "a")
        self.outer = one.sequence_ids().index(0), one.sequence_ids()[::-1].index(0)
        of, ids = two.sequence_ids(), two["input_ids"]
        types = two.get("token_type_ids") or [0] * len(ids)
        n = of.count(0)
        first, second = of.index(0), of.index(1)
        cuts = slice(0, first), slice(first + n, second), slice(second + n, None)
        self.ids = [ids[cut] for cut in cuts]
        self.types = [types[cut] for cut in cuts]
        self.kinds = types[first], types[second]

    def join(self, first: Ids, second: Ids) -> tuple[list[int], list[int]]:
        """Ids and token types of two texts whose ids have their own special tokens around them."""
        before, after = self.outer
        a, b = (list(ids)[before : len(ids) - after] for ids in (first, second))
        (begin, middle, end), of = self.ids, self.types
        types = [*of[0], *[self.kinds[0]] * len(a), *of[1], *[self.kinds[1]] * len(b), *of[2]]
        return [*begin, *a, *middle, *b, *end], types


def pairs(
    texts: Sequence[Ids], of: np.ndarray, classes: np.ndarray, known: Classes, scorer: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The encoder's rows for P pairs of a text and a class: ids, mask and types (N, T), and each
    pair's rows of text and of prompt (P,), as `PromptBatch` has them.
    """
    if scorer == "bi":
        ids, mask = padded([*texts, *known.ids], known.pad_id)
        # Prompts stand after the texts, in the order of the classes.
        return ids, mask, np.zeros_like(ids), of, len(texts) + classes
    # Text first: an NLI model takes it for the premise, and the prompt for the hypothesis.
    rows = [known.seams.join(texts[i], known.ids[c]) for i, c in zip(of, classes, strict=True)]
    ids, mask = padded([row for row, _ in rows], known.pad_id)
    types, _ = padded([row for _, row in rows], 0)
    return ids, mask, types, np.arange(len(rows)), np.arange(len(rows))


class TextExamples(ZeroExamples):
    """A text to recover. Further column: `decoder`, the decoder's ids of prompt, text and end;
    `start` (1,), where the text begins.

    Args:
        codes: m, how many there are: the noise of a row's code has that many numbers.
    """

    columns: Mapping[str, pa.DataType] = {
        **ZeroExamples.columns, "decoder": pa.int32(), "start": pa.int32()
    }  # fmt: skip

    def __init__(self, book: Book, tokenizer: Any, config: Config, classes: Classes, codes: int):
        super().__init__(book, tokenizer, config, classes)
        self.codes = codes
        pad = tokenizer.pad_token_id
        self.pad_id = tokenizer.eos_token_id if pad is None else pad

    def prompt(self, label: int) -> list[int]:
        """What the decoder reads before a text of the class."""
        ids = self.tokenizer(self.classes.prompts[label], add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return ids if begin is None else [begin, *ids]

    def _columns(self, text: str, label: int) -> tuple[dict[str, np.ndarray], int, bool]:
        prompt = self.prompt(label)
        options = {"add_special_tokens": False, "verbose": False, **self.specials[1].options}
        # A space first: the text follows a prompt, and decoders' words begin with their space.
        ids = self.tokenizer(f" {text}", **options)["input_ids"]
        # - 1: the end has a token too.
        room = self.max_length - len(prompt) - 1
        if room < 1:
            wanted = "a batch.max_length that leaves a token for the text"
            raise RowProblem("too long", f"found a prompt of {len(prompt)} tokens, wanted {wanted}")
        whole = [*prompt, *ids[:room], self.tokenizer.eos_token_id]
        columns = {"decoder": np.array(whole, np.int32), "start": np.array([len(prompt)], np.int32)}
        return columns, len(whole) - len(prompt), len(ids) > room

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        return lengths["ids"] + lengths["decoder"]

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> TextBatch:
        pieces = [piece for row in rows for piece in row]
        ids, mask = padded([piece.columns["ids"] for piece in pieces], self.classes.pad_id)
        whole, seen = padded([piece.columns["decoder"] for piece in pieces], self.pad_id)
        label = np.array([int(piece.columns["label"][0]) for piece in pieces])
        at, labels, task = [], [], []
        noise = np.zeros((len(pieces), self.codes), np.float32)
        compared: list[tuple[int, int, float]] = []
        for i, piece in enumerate(pieces):
            rng, n = piece.rng, len(piece.columns["decoder"])
            noise[i] = rng.gumbel(size=self.codes)
            start = int(piece.columns["start"][0])
            # A token is predicted one position before it: the text's first at the prompt's end.
            at += [(i, t) for t in range(start - 1, n - 1)]
            labels += piece.columns["decoder"][start:].tolist()
            task += [self._task(piece)] * (n - start)
            # Pairs come from this micro-batch: no codes of other texts are at hand.
            mine = np.flatnonzero((label == label[i]) & (np.arange(len(label)) != i))
            for others, same in (mine, 1.0), (np.flatnonzero(label != label[i]), 0.0):
                if len(others):
                    compared.append((i, int(rng.choice(others)), same))
        first, second, same = np.array(compared, np.float32).reshape(-1, 3).T
        arrays = (
            ids, mask, whole, seen, np.array(at, np.int64).reshape(-1, 2),
            np.array(labels, np.int64), label.astype(np.int64), noise,
            first.astype(np.int64), second.astype(np.int64), same.copy(), np.array(task, np.int64),
        )  # fmt: skip
        return TextBatch(*map(torch.from_numpy, arrays))


def padded(rows: Sequence[Ids], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N, T) int64 with padding at the right, and their mask, 1 = token."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask
