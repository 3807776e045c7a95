"""Examples of next-token prediction: token ids with a target mask, several in a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtl.data.collate import MicroBatch, collate
from mtl.data.encode import Encoder, Note, tokenizer_fingerprint
from mtl.data.encoded import NEXT_TOKEN, answer, next_token_positions
from mtl.data.examples import LOSS, Book, Piece, Row
from mtl.data.marks import marked


class NextToken:
    """What `causal_lm` trains on.

    Columns of n tokens: `ids` (n,) int32; `target` (n,) uint8, 1 where a token is a target. The
    first token never is.

    Args:
        book: None: stream s is task s.
        pad_id: fills what a mask or a segment of its own hides; any id will do.
        encoder: turns an example into its tokens; None: the rows are encoded already.
    """

    packs = True
    makes_dummies = True
    notes = True
    columns = NEXT_TOKEN

    def __init__(self, book: Book | None, pad_id: int, encoder: Encoder | None = None):
        self.book, self.pad_id, self.encoder = book, pad_id, encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    @property
    def too_long(self) -> str:
        return self.encoder.too_long

    @property
    def identity(self) -> Any:
        encoder = self.encoder
        return {
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "length": [encoder.max_length, encoder.too_long == "truncate"],
            "special text": encoder.special_text,
        }

    def encode(self, example: Any, note: Note = lambda text, times: None) -> Row:
        ids, target, truncated = self.encoder(example, note)
        columns = {"ids": ids, "target": target.astype(np.uint8)}
        return Row(columns, (int(target.sum()),), answer(ids[target]), truncated)

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        return next_token_positions(lengths)

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> MicroBatch:
        def piece(one: Piece) -> tuple[np.ndarray, np.ndarray, int]:
            task = one.stream if self.book is None else self.book.task(LOSS, one.stream)
            return one.columns["ids"], one.columns["target"].view(np.bool_), task

        return collate([list(map(piece, row)) for row in rows], self.pad_id, packed, most, tokens)

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        return marked(self.tokenizer, columns["ids"], columns["target"].view(np.bool_), color)

    def settle(self, splits: Mapping[int, Any]) -> None:
        pass
