"""Examples of next-token prediction: token ids with a target mask, several in a row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mtl.data.collate import MicroBatch, Teacher, collate
from mtl.data.encode import Encoder, tokenizer_fingerprint
from mtl.data.encoded import NEXT_TOKEN, answer, next_token_positions
from mtl.data.examples import LOSS, Book, Piece, Row
from mtl.data.marks import marked
from mtl.data.special import Note

TEACHER = "teacher.ids", "teacher.log_p"
"""Columns of rows with a teacher: what it says at each target, (targets, m) int32 and (targets,
m + 1) float32."""


def taught(pieces: Sequence[Piece]) -> Teacher | None:
    """What the teachers of some of the pieces say at their targets, in the order in which `collate`
    has them; None where no piece has one.
    """
    if not any(TEACHER[0] in piece.columns for piece in pieces):
        return None
    count = [int(piece.columns["target"].sum()) for piece in pieces]
    starts = np.cumsum([0, *count])
    known = [i for i, piece in enumerate(pieces) if TEACHER[0] in piece.columns]
    has = np.zeros(starts[-1], dtype=bool)
    columns = []
    for name, dtype in zip(TEACHER, (np.int64, np.float32), strict=True):
        width = pieces[known[0]].columns[name].shape[1]
        columns.append(np.zeros((starts[-1], width), dtype))
        for i in known:
            columns[-1][starts[i] : starts[i + 1]] = pieces[i].columns[name]
            has[starts[i] : starts[i + 1]] = True
    return Teacher(*map(torch.from_numpy, (has, *columns)))


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
    text_column = "ids"
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
            "special text": encoder.specials.policy,
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

        laid = [list(map(piece, row)) for row in rows]
        made = collate(laid, self.pad_id, packed, most, tokens)
        teacher = taught([one for row in rows for one in row])
        return made if teacher is None else replace(made, teacher=teacher)

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        return marked(self.tokenizer, columns["ids"], columns["target"].view(np.bool_), color)

    def settle(self, splits: Mapping[int, Any]) -> None:
        pass
