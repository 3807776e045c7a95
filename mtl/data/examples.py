"""What an objective trains on: how a format's example becomes arrays, and arrays a micro-batch.

A **stream** has rows: a task of the YAML with `train` and `validation`. A **task** is a loss that
the balancer weighs. Usually it is a stream's own; with `of` it is another loss of other streams'
rows.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

LOSS = "loss"  # the loss of an objective that has no other


@dataclass(frozen=True)
class Book:
    """Which task each loss of each stream's rows counts for.

    Attributes:
        tasks: the K tasks' names, in the order of every (K,) array.
        streams: the S tasks with rows of their own, in the same order.
        number: loss -> (S,) int64, the task that this loss of stream s counts for; -1: none.
    """

    tasks: tuple[str, ...]
    streams: tuple[str, ...]
    number: Mapping[str, np.ndarray]

    @classmethod
    def plain(cls, names: Sequence[str], loss: str = LOSS) -> Self:
        """Every stream is one task of its own name."""
        return cls(tuple(names), tuple(names), {loss: np.arange(len(names))})

    def task(self, loss: str, stream: int) -> int:
        """The task that this loss of the stream's rows counts for; -1: none."""
        return int(self.number[loss][stream]) if loss in self.number else -1

    def reads(self, task: int) -> list[int]:
        """The streams whose rows this task's loss reads."""
        found = np.zeros(len(self.streams), dtype=bool)
        for numbers in self.number.values():
            found |= numbers == task
        return np.flatnonzero(found).tolist()


class Row(NamedTuple):
    """An encoded example.

    Attributes:
        columns: 1-D arrays by name.
        counts: for each loss of the objective, what its sum is divided by: its target tokens, or 1.
        answer: equal for equal answers, so that validation groups get each in proportion; 0: none.
        truncated: whether it was truncated at `batch.max_length`.
    """

    columns: Mapping[str, np.ndarray]
    counts: tuple[int, ...]
    answer: int = 0
    truncated: bool = False


class Piece(NamedTuple):
    """An encoded row, as it stands in a batch.

    Attributes:
        stream: its number.
        columns: 1-D arrays by name, read-only views of the cache.
        key: names its randomness. In training it holds seed, step, stream and row. In validation
            the step is left out, so that every probe draws the same.
    """

    stream: int
    columns: Mapping[str, np.ndarray]
    key: str = ""

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator for this row in this step: randomness without a state to save."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=16).digest()
        # PCG64 by name: what numpy's default_rng stands for may change.
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: the input of one forward on one rank. A dataclass of tensors, and named tuples
    of tensors, derives from it.

    Attributes:
        objective: the number of its objective among the run's.
        is_dummy: whether it stands in for examples that this rank lacks. A dummy counts nothing.
    """

    objective: int = 0
    is_dummy: bool = False

    @property
    def positions(self) -> int:
        """Token positions computed, padding included."""
        raise NotImplementedError

    def counts(self, k: int) -> Tensor:
        """(k,) int64, what its `Terms.counts` will be; zeros for a dummy."""
        raise NotImplementedError

    def tally(self, task: Tensor, k: int) -> Tensor:
        """(k,) int64, how often each task is in (n,) int64 `task`; zeros for a dummy."""
        found = torch.bincount(task, minlength=k)
        return found * 0 if self.is_dummy else found

    def to(self, device: Any) -> Self:
        """Copy it to a device. From pinned memory the copy runs while the host goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """Move it to memory that an accelerator copies from by itself. Needs an accelerator."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            # A named tuple takes its fields one by one.
            return type(value)(*map(change, value)) if isinstance(value, tuple) else value

        names = [field.name for field in fields(self)]
        return type(self)(**{name: changed(getattr(self, name)) for name in names})


class Examples(Protocol):
    """How a format's example becomes arrays, and arrays a micro-batch. Made once a process.

    Attributes:
        packs: whether several pieces may share a row without seeing each other.
        makes_dummies: whether `collate` of no rows gives a batch without targets. If not, a rank
            without an example runs another rank's row and counts nothing of it.
        columns: Arrow's type of an element, for each column of a row.
        identity: all that decides how an example is encoded, as JSON-able data. It keys the cache.

    A class may set `notes = True`. Then `encode` gets `note=` too, a function of (text, times) that
    takes remarks on rows that are kept. The report adds them up over the rows.

    A class whose first loss counts something else than target tokens names it in `unit`, as in
    `unit = "pair"`, for the report on the rows.

    A class whose rows are texts that a causal model writes may name a column of their token ids in
    `text_column`. Saved models then stop at the special tokens that end these texts.
    """

    packs: ClassVar[bool]
    makes_dummies: ClassVar[bool]
    columns: ClassVar[Mapping[str, pa.DataType]]
    identity: Any

    def encode(self, example: Any) -> Row:
        """The example's arrays.

        Raises:
            RowProblem: it cannot be used.
        """

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n,) int64: token positions that each of n rows takes in a forward, from its columns'
        lengths.
        """

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> Batch:
        """The micro-batch of these rows of pieces. Unless `packed`, a row holds one piece.

        Args:
            most: the largest count of the first loss that any rank has in this forward.
            tokens: the most positions there may be, padding included.
        """

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        """A row as the model reads it, its targets marked: for `check`."""

    def settle(self, splits: Mapping[int, tuple[Any, Any]]) -> None:
        """Learn what only all rows tell, such as label names. Called once, before the first batch.

        Args:
            splits: stream -> its (train, validation) `Encoded`.
        """
