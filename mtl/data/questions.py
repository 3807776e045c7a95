"""Rows as questions with a right answer, for metrics of what a model generates.

Nothing is kept for them on disk: an encoded row knows its place in its source, and is read again.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mtl.data.cache import example_of
from mtl.data.encode import Encoder
from mtl.data.encoded import DataError, Encoded
from mtl.data.formats import Completion, Example, Format, Messages, RowProblem
from mtl.data.source import Source


class Question(NamedTuple):
    """A row of a split, as generation takes it.

    Attributes:
        number: of the row in the split, from 0.
        prompt: (n,) int32 ids that a model goes on from: of a conversation all before its last
            target turn, and the generation prompt. They are not cut at `batch.max_length`.
        answer: the right text, as `decode(ids, skip_special_tokens=True)` gives a generated one. A
            turn's reasoning and tool calls stand in it as the template renders them.
        example: what the format made of the row, its turns included.
        row: the source's row, for metrics that read keys of their own.
    """

    number: int
    prompt: np.ndarray
    answer: str
    example: Example
    row: Mapping[str, Any]

    @property
    def said(self) -> str:
        """The right text as the row has it: of a conversation the turn's content alone."""
        if isinstance(self.example, Messages):
            return str(self.example.messages[self.example.last].get("content") or "")
        return self.answer

    def saying(self, text: str) -> Example:
        """The example with this text in place of the right one, which is its only target."""
        if not isinstance(self.example, Messages):
            return Completion(self.example.prompt, text)
        *before, last = self.example.messages[: self.example.last + 1]
        turns = [*before, {"role": last["role"], "content": text}]
        # Every turn before is context, the assistant's among them.
        return replace(self.example, messages=turns, context=frozenset(range(len(before))))


def questions(
    split: Encoded,
    sources: Sequence[Source],
    to_example: Format,
    encoder: Encoder,
    numbers: Collection[int] | None = None,
) -> Iterator[Question]:
    """The split's rows, in their order, read again from where they come from.

    Args:
        sources: those that the split was encoded from (`cache.sources_of`), unchanged since.
        to_example: the task's format.
        encoder: with the task's tokenizer.
        numbers: of the rows that are wanted (a rank's, a sample's); None = all.

    Raises:
        DataError: a row has no question (a text, a classifier's row), or is not what it was.
    """
    wanted: dict[tuple[int, int], int] = {}
    for number in range(len(split)) if numbers is None else sorted(numbers):
        wanted[split.origin(number)] = number
    # Sources after the last wanted row need not be read.
    last = max((source for source, _ in wanted), default=-1)
    for s, source in enumerate(sources[: last + 1]):
        for row in source.rows():
            number = wanted.pop((s, row.number), None)
            if number is None:
                continue
            try:
                example = example_of(row, to_example)
                prompt, answer = encoder.question(example)
            except RowProblem as problem:
                raise DataError(f"{source.where(row.number)}: {problem}") from problem
            yield Question(number, prompt, answer, example, row.value)
    if wanted:
        place = split.where(min(wanted.values()))
        raise DataError(f"{place}: found no row any more, of which the cache has one")
