"""An objective with three losses of one row, for test_streams.py: next token, a span, and a draw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.data.examples import Batch, Book, Piece, Row
from mtl.losses.terms import Terms

LOSSES = ("next", "first", "drawn")


@dataclass(frozen=True)
class ThreeBatch(Batch):
    """R rows of L tokens; numbers (3, R): the task of each loss of each row, -1: none."""

    input_ids: Tensor
    length: Tensor
    numbers: Tensor
    drawn: Tensor  # (R,) the position whose next token is the third loss
    lies: int = 0

    @property
    def positions(self) -> int:
        return self.input_ids.numel()

    def counts(self, k: int) -> Tensor:
        found = torch.zeros(k, dtype=torch.int64)
        if not self.is_dummy:
            for loss, per_row in enumerate((self.length - 1, None, None)):
                for r, task in enumerate(self.numbers[loss].tolist()):
                    if task >= 0:
                        found[task] += 1 if per_row is None else int(per_row[r])
            found[0] += self.lies
        return found


class ThreeExamples:
    packs = False
    makes_dummies = False
    columns: Mapping[str, pa.DataType] = {"ids": pa.int32()}
    identity = "three"

    def __init__(self, book: Book, tokenizer: Any, lies: int):
        self.book, self.tokenizer, self.lies = book, tokenizer, lies

    def encode(self, example: Any) -> Row:
        ids = self.tokenizer(example.text, add_special_tokens=False)["input_ids"]
        return Row({"ids": np.array(ids, np.int32)}, (len(ids) - 1, 1, 1))

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        return lengths["ids"]

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> ThreeBatch:
        assert not packed
        pieces = [piece for (piece,) in rows]
        width = max(len(piece.columns["ids"]) for piece in pieces)
        ids = np.zeros((len(pieces), width), np.int64)
        for r, piece in enumerate(pieces):
            ids[r, : len(piece.columns["ids"])] = piece.columns["ids"]
        lengths = [len(piece.columns["ids"]) for piece in pieces]
        numbers = [[self.book.task(loss, piece.stream) for piece in pieces] for loss in LOSSES]
        drawn = [int(p.rng.integers(n - 1)) for p, n in zip(pieces, lengths, strict=True)]
        tensors = map(torch.tensor, (lengths, numbers, drawn))
        return ThreeBatch(torch.from_numpy(ids), *tensors, self.lies)

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        return self.tokenizer.decode(columns["ids"].tolist())

    def settle(self, splits: Mapping[int, Any]) -> None:
        pass


class Three:
    """Losses of a row: every next token; the second token; the token after a drawn position."""

    losses = LOSSES

    def __init__(self, lies: int = 0):
        self.lies = lies

    def examples(self, book: Book, tokenizer: Any, config: Any) -> ThreeExamples:
        return ThreeExamples(book, tokenizer, self.lies)

    def __call__(self, forward: Callable, batch: ThreeBatch, k: int) -> Terms:
        logits = forward(input_ids=batch.input_ids).logits.float()
        return terms_of(logits, batch, k)


def terms_of(logits: Tensor, batch: ThreeBatch, k: int) -> Terms:
    """From (R, L, V) logits. Rows are padded on the right, which a causal model does not see."""
    ids, rows = batch.input_ids, torch.arange(len(batch.input_ids))
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    inside = torch.arange(losses.shape[1]) < batch.length[:, None] - 1
    each = [torch.where(inside, losses, 0.0).sum(1), losses[:, 0], losses[rows, batch.drawn]]
    counts = [batch.length - 1, torch.ones_like(batch.length), torch.ones_like(batch.length)]
    mine = batch.numbers[:, None] == torch.arange(k)[:, None]  # (3, K, R)
    sums = torch.where(mine, torch.stack(each)[:, None], 0.0).sum((0, 2))
    number = torch.where(mine, torch.stack(counts)[:, None], 0).sum((0, 2))
    return Terms(sums, number)
