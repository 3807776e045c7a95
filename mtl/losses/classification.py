"""Single-label classification of whole texts, several tasks on one model.

The model has one logit for each label of each task. A task's loss is the cross-entropy over its own
labels only, in nats per example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.config import Config
from mtl.data.encode import tokenizer_fingerprint
from mtl.data.encoded import DataError, Encoded
from mtl.data.examples import LOSS, Batch, Book, Piece, Row
from mtl.data.formats import Labeled, RowProblem
from mtl.data.special import Note, Specials
from mtl.losses.objective import Measure, ratio
from mtl.losses.terms import Terms


def macro_f1(sums: np.ndarray) -> float:
    """The mean of the labels' F1, from (3, C) true positives, false positives, false negatives.

    A label that is neither present nor predicted is left out, as by default in scikit-learn.
    """
    right, wrong, missed = sums.reshape(3, -1)
    there = right + wrong + missed > 0
    if not there.any():
        return float("nan")
    return float(np.mean(2 * right[there] / (2 * right + wrong + missed)[there]))


@dataclass(frozen=True)
class LabelBatch(Batch):
    """R padded texts, one a row.

    Attributes:
        input_ids, attention_mask: (R, L) int64; 1 = token.
        label: (R,) int64, the logit that each text's label has.
        low, high: (R,) int64, the logits of its task: low <= label < high.
        task: (R,) int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    label: Tensor
    low: Tensor
    high: Tensor
    task: Tensor

    @property
    def positions(self) -> int:
        return self.input_ids.numel()

    def counts(self, k: int) -> Tensor:
        """(k,) int64: examples of each task."""
        return self.tally(self.task, k)


class LabelExamples:
    """What `classification` trains on.

    Columns of a text of n tokens: `ids` (n,) int32; `label`, its name in UTF-8 bytes; `labels`, the
    names that the format lists, joined by newlines. `labels` is empty where it lists none.

    Attributes:
        labels: each task's label names in the order of their logits, after `settle`.
    """

    packs = False
    makes_dummies = False
    notes = True
    unit = "example"
    columns: Mapping[str, pa.DataType] = {
        "ids": pa.int32(), "label": pa.uint8(), "labels": pa.uint8()
    }  # fmt: skip

    def __init__(self, book: Book, tokenizer: Any, config: Config):
        self.book, self.tokenizer = book, tokenizer
        self.max_length, self.too_long = config.batch.max_length, config.batch.too_long
        self.specials = Specials(tokenizer, config.batch.special_text)
        self.pad_id = tokenizer.pad_token_id or 0
        self.labels: dict[str, list[str]] = {}

    @property
    def identity(self) -> Any:
        length = [self.max_length, self.too_long == "truncate"]
        return [tokenizer_fingerprint(self.tokenizer), length, self.specials.policy]

    def encode(self, example: Any, note: Note = lambda text, times: None) -> Row:
        if not isinstance(example, Labeled):
            found = type(example).__name__
            raise RowProblem(
                "bad value", f"found a {found}, wanted a labeled text (format: labeled)"
            )
        if not example.text.strip():
            raise RowProblem("no target", "the text is empty")
        texts = [example.text] + [example.pair] * (example.pair is not None)
        self.specials.look(texts, note)
        ids = self.tokenizer(*texts, verbose=False, **self.specials.options)["input_ids"]
        truncated = len(ids) > self.max_length
        if truncated and self.too_long != "truncate":
            found = f"found {len(ids)} tokens, wanted at most batch.max_length = {self.max_length}"
            raise RowProblem("too long", found)
        if truncated:
            options = {"truncation": True, "max_length": self.max_length, **self.specials.options}
            ids = self.tokenizer(*texts, verbose=False, **options)["input_ids"]
        name = _bytes(example.label)
        columns = {
            "ids": np.array(ids, np.int32),
            "label": name,
            "labels": _bytes("\n".join(example.labels or ())),
        }
        # Seven bytes, since eight may not fit a signed 64-bit column.
        number = int.from_bytes(name.tobytes()[:7], "little")
        return Row(columns, (1,), number, truncated)

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        return lengths["ids"]

    def settle(self, splits: Mapping[int, tuple[Encoded, Encoded]]) -> None:
        self.first: dict[int, int] = {}
        for stream, (train, validation) in splits.items():
            task = self.book.streams[stream]
            # Every row has the format's list, so the first one's is all rows'.
            listed = _text(train.columns(0)["labels"])
            known = {_text(train.columns(i)["label"]) for i in range(len(train))}
            names = listed.split("\n") if listed else sorted(known)
            other = {_text(validation.columns(i)["label"]) for i in range(len(validation))}
            if new := sorted(other - set(names)):
                raise DataError(
                    f"tasks.{task}: found labels in the validation rows that no training row has: "
                    f"{new[:5]}. Wanted some of {names[:10]}. List all in the format: "
                    "{name: labeled, labels: [...]}."
                )
            if len(names) < 2:
                raise DataError(
                    f"tasks.{task}: found the label {names} alone, wanted two at least."
                )
            # The task's first logit: tasks' labels stand one after another.
            self.first[stream] = sum(map(len, self.labels.values()))
            self.labels[task] = names

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> LabelBatch:
        pieces = [piece for row in rows for piece in row]
        width = max(len(piece.columns["ids"]) for piece in pieces)
        ids = np.full((len(pieces), width), self.pad_id, np.int64)
        mask = np.zeros_like(ids)
        label, low, high, task = (np.zeros(len(pieces), np.int64) for _ in range(4))
        for r, piece in enumerate(pieces):
            n = len(piece.columns["ids"])
            ids[r, :n], mask[r, :n] = piece.columns["ids"], 1
            names = self.labels[self.book.streams[piece.stream]]
            low[r] = self.first[piece.stream]
            high[r] = low[r] + len(names)
            label[r] = low[r] + names.index(_text(piece.columns["label"]))
            task[r] = self.book.task(LOSS, piece.stream)
        return LabelBatch(*map(torch.from_numpy, (ids, mask, label, low, high, task)))

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        text = self.tokenizer.decode(columns["ids"].tolist())
        mark = "\033[32m{}\033[0m" if color else "[[{}]]"
        return f"{text} -> {mark.format(_text(columns['label']))}"


class Classification:
    """Cross-entropy over a task's labels, nats per example; measures accuracy and macro-F1."""

    losses = (LOSS,)
    unit = LabelExamples.unit
    measures: Mapping[str, Measure] = {
        "accuracy": Measure(ratio),
        "macro_f1": Measure(macro_f1),
    }

    def examples(self, book: Book, tokenizer: Any, config: Config) -> LabelExamples:
        return LabelExamples(book, tokenizer, config)

    def __call__(self, forward: Callable, batch: LabelBatch, k: int) -> Terms:
        logits = forward(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits.float()
        at = torch.arange(logits.shape[-1], device=logits.device)
        mine = (at >= batch.low[:, None]) & (at < batch.high[:, None])
        # -inf: other tasks' labels get no probability and no gradient.
        logits = logits.masked_fill(~mine, float("-inf"))
        terms = Terms.by_task(F.cross_entropy(logits, batch.label, reduction="none"), batch.task, k)
        return Terms(terms.sums, terms.counts, {}, _measured(logits, batch, k))


def _measured(logits: Tensor, batch: LabelBatch, k: int) -> dict[str, Tensor]:
    """(K, 2): right answers and all; (K, 3 C): every logit's true positives, false positives and
    false negatives.
    """
    with torch.no_grad():
        # A task's own labels only, as all others are -inf.
        guess, c = logits.argmax(-1), logits.shape[-1]
        mine = F.one_hot(batch.task, k).T.double()  # (K, R)
        wanted, found = F.one_hot(batch.label, c).double(), F.one_hot(guess, c).double()
        right = (guess == batch.label).double()
        each = [wanted * found, found * (1 - wanted), wanted * (1 - found)]
        accuracy = torch.stack([mine @ right, mine.sum(1)], 1)
        return {"accuracy": accuracy, "macro_f1": torch.cat([mine @ one for one in each], 1)}


def _bytes(text: str) -> np.ndarray:
    return np.array(bytearray(text.encode()), np.uint8)


def _text(raw: np.ndarray) -> str:
    return raw.tobytes().decode()
