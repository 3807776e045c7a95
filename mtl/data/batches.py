"""The micro-batches of one rank: of a training step, and of a group of validation rows."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from mtl.data.collate import Micro, deal
from mtl.data.encoded import Encoded, TaskData
from mtl.data.examples import Batch, Examples, Piece
from mtl.data.mix import Mix, Round, permutation
from mtl.data.next_token import NextToken


class Layout:
    """How the examples of one objective become this rank's micro-batches.

    Training and validation share it.

    Args:
        world, rank: data-parallel ranks, and which one this is.
        tokens: most positions, padding included, of a micro-batch.
        pad_id: fills what a mask or its own segment hides; any id will do.
        packed: several examples share a row, kept apart by position ids. Otherwise each has a
            padded row.
        row_length: most tokens of a packed row; None = `tokens`.
        examples: from rows to a micro-batch; None: next-token prediction, stream s being task s.
        streams: whose rows these are; None: all.
        objective: the objective's number.
    """

    def __init__(
        self,
        world: int,
        rank: int,
        tokens: int,
        pad_id: int = 0,
        packed: bool = False,
        row_length: int | None = None,
        examples: Examples | None = None,
        streams: Sequence[int] | None = None,
        objective: int = 0,
    ):
        assert 0 <= rank < world
        self.world, self.rank, self.tokens, self.packed = world, rank, tokens, packed
        self.row_length = (row_length or tokens) if packed else None
        self.examples = examples or NextToken(None, pad_id)
        self.streams, self.objective = streams, objective

    def deal(
        self, splits: Sequence[Encoded], stream: np.ndarray, row: np.ndarray
    ) -> list[tuple[Micro, int]]:
        """This rank's part of `collate.deal`, for the examples of this layout's streams.

        Beside each micro-batch stands the largest count of the first loss on any rank.
        """
        mine = range(len(stream))
        if self.streams is not None:
            mine = np.flatnonzero(np.isin(stream, self.streams)).tolist()
        # The whole batch has none for this objective. All ranks see the same and skip it alike.
        if self.streams is not None and not len(mine):
            return []
        pairs = [(int(stream[i]), int(row[i])) for i in mine]
        lengths = [int(splits[s].positions[n]) for s, n in pairs]
        dealt = deal(lengths, self.world, self.tokens, self.row_length)
        targets = [int(splits[s].targets[n]) for s, n in pairs]
        # turn: the micro-batches that all ranks run at the same time.
        most = [
            max(sum(targets[i] for row in micro for i in row) for micro in turn)
            for turn in zip(*dealt, strict=True)
        ]
        # From places among `mine` back to places in the batch.
        numbered = [[[mine[i] for i in row] for row in micro] for micro in dealt[self.rank]]
        return list(zip(numbered, most, strict=True))

    def collate(
        self,
        micro: Micro,
        most: int,
        splits: Sequence[Encoded],
        stream: np.ndarray,
        row: np.ndarray,
        key: str = "",
    ) -> Batch:
        """The micro-batch of the examples that `micro` numbers.

        Args:
            key: names this step's randomness; each row draws its own from it.
        """

        def piece(s: int, n: int) -> Piece:
            return Piece(s, splits[s].columns(n), f"{key}/{s}/{n}")

        rows = [[piece(int(stream[i]), int(row[i])) for i in indices] for indices in micro]
        is_dummy = not rows and not self.examples.makes_dummies
        if is_dummy:
            # Row 0 of a stream of ours: any row would do, since a dummy counts nothing.
            rows = [[piece(0 if self.streams is None else int(self.streams[0]), 0)]]
        made = self.examples.collate(rows, packed=self.packed, most=most, tokens=self.tokens)
        if is_dummy or self.objective:
            made = replace(made, is_dummy=is_dummy, objective=self.objective)
        return made


class Layouts:
    """The layouts of all objectives of a run: a global batch is dealt objective by objective.

    So every rank runs the same sequence of forwards.
    """

    def __init__(self, each: Sequence[Layout]):
        self.each = list(each)

    def deal(
        self, splits: Sequence[Encoded], stream: np.ndarray, row: np.ndarray
    ) -> list[tuple[Layout, Micro, int]]:
        """This rank's micro-batches of some examples, as indices; as many on every rank."""
        return [
            (layout, *dealt) for layout in self.each for dealt in layout.deal(splits, stream, row)
        ]

    def collate(
        self,
        dealt: Sequence[tuple[Layout, Micro, int]],
        splits: Sequence[Encoded],
        stream: np.ndarray,
        row: np.ndarray,
        key: str,
    ) -> Iterator[Batch]:
        """The dealt micro-batches, made one at a time."""
        for layout, micro, most in dealt:
            yield layout.collate(micro, most, splits, stream, row, key)

    def by_stream(
        self, splits: Sequence[Encoded], stream: np.ndarray, row: np.ndarray, key: str
    ) -> list[list[Batch]]:
        """The same examples, dealt stream by stream: this rank's micro-batches of each."""
        apart = []
        for s in range(len(splits)):
            mine = np.flatnonzero(stream == s)
            dealt = self.deal(splits, stream[mine], row[mine])
            apart.append(list(self.collate(dealt, splits, stream[mine], row[mine], key)))
        return apart


def _layouts(given: Layout | Layouts) -> Layouts:
    return given if isinstance(given, Layouts) else Layouts([given])


class TrainBatches:
    """A rank's micro-batches of each optimizer step, prepared `ahead` steps early by a thread.

    `.batch(step)` may be called in any order and with any step of the round: a batch is a function
    of round and number. An error in the preparation is raised by the call for that step.

    Attributes:
        now: the present round of draws.
        stop: the step at which another one begins; no batch is prepared from there on. None: no
            such step is known.
    """

    def __init__(
        self, tasks: Sequence[TaskData], mix: Mix, layout: Layout | Layouts, ahead: int = 2
    ):
        # The mix knows tasks by number only: another order would draw other rows.
        assert mix.names == [task.name for task in tasks] and mix.sizes == [
            len(task.train) for task in tasks
        ]
        self.mix, self.layouts, self.ahead = mix, _layouts(layout), ahead
        self.now, self.stop = mix.first, None
        self._splits = [task.train for task in tasks]
        # Not run on CUDA yet. A thread begins on device 0, where pinning would open a context for
        # every rank.
        self._pin = torch.accelerator.is_available()
        settle = (
            functools.partial(
                torch.accelerator.set_device_index, torch.accelerator.current_device_index()
            )
            if self._pin
            else None
        )
        # One worker: steps are made in order, and the mix's permutations are used by one thread.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=settle)
        self._coming: dict[int, Future[list[Batch]]] = {}

    def begin(self, now: Round, stop: int | None) -> None:
        """Go on in a round of draws; another one than before forgets what was prepared."""
        if now != self.now:
            # A preparation that has begun cannot be cancelled; its result is dropped.
            for late in self._coming.values():
                late.cancel()
            self._coming.clear()
        self.now, self.stop = now, stop

    def parts(self, step: int) -> np.ndarray:
        """(S,) float64: each stream's part of the examples of global batch `step`; sums to 1."""
        drawn = self.mix.drawn(step + 1, self.now) - self.mix.drawn(step, self.now)
        return drawn / drawn.sum()

    def batch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (0 is the first).

        Every rank has the same number of them, at least one.
        """
        stop = step + 1 + self.ahead
        wanted = range(step, stop if self.stop is None else min(stop, self.stop))
        # After a jump to another step, what was prepared for the old ones is useless.
        for late in [n for n in self._coming if n not in wanted]:
            self._coming.pop(late).cancel()
        for n in wanted:
            if n not in self._coming:
                self._coming[n] = self._worker.submit(self.make, n)
        return self._coming.pop(step).result()

    def by_stream(self, step: int) -> list[list[Batch]]:
        """The examples of `batch(step)`, stream by stream: this rank's micro-batches of each."""
        # On the worker, because one thread alone uses the mix's permutations.
        make = functools.partial(self.layouts.by_stream, self._splits)
        return self._worker.submit(
            lambda: make(*self.mix.batch(step, self.now), self._key(step))
        ).result()

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream and row, (n,) int64 each, of the examples of global batch `step`."""
        return self._worker.submit(lambda: self.mix.batch(step, self.now)).result()

    def reach(self, stream: int, step: int, stop: int, spare: int = 0) -> np.ndarray:
        """Ascending int64: rows of a stream in batches step..stop-1, if the present round lasts,
        and in `spare` further draws.
        """

        def rows() -> np.ndarray:
            first, last = (int(self.mix.drawn(n, self.now)[stream]) for n in (step, stop))
            return self.mix.rows(stream, first, last + spare)

        return self._worker.submit(rows).result()

    def places(self, stream: int, rows: Sequence[int]) -> list[str]:
        """Where these rows of a stream stand: `file:line`."""
        return [self._splits[stream].where(int(row)) for row in rows]

    def forget(self) -> None:
        """Drop what was prepared, and wait until the thread reads no rows: they may change then."""
        for late in self._coming.values():
            late.cancel()
        self._coming.clear()
        self._worker.submit(lambda: None).result()  # after everything that it had begun

    def close(self) -> None:
        """Stop the thread and forget what it prepared."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def make(self, step: int) -> list[Batch]:
        """The micro-batches of `batch`, made now and on this thread."""
        stream, row = self.mix.batch(step, self.now)
        dealt = self.layouts.deal(self._splits, stream, row)
        micros = list(self.layouts.collate(dealt, self._splits, stream, row, self._key(step)))
        return [micro.pinned() for micro in micros] if self._pin else micros

    def _key(self, step: int) -> str:
        return f"{self.mix.seed}/train/{step}"


class ValidationGroups:
    """Every task's validation rows, divided once into the same number of groups of whole examples.

    What does not fill a group is left over.

    A group is a fair sample of its task. Rows are sorted by their number of target tokens, then by
    the tokens themselves, so that a classifier's labels stand together. The sorted rows are divided
    into strata. Each group takes one row of each stratum, drawn by a permutation keyed by seed and
    task. Neither world size nor layout changes the groups.

    Args:
        tasks: K tasks.
        groups: groups wanted. The smallest task limits `self.groups`, the number in force, because
            all groups hold equally many examples of a task. Callers should report a difference.
        seed: keys the draw.
        layout: how examples become micro-batches.
        examples: (K,) examples of each task in a group; all rows where a task has fewer. None:
            every row is in a group, and a task's groups differ by one row at most.

    Attributes:
        parts: number of groups, plus one where rows are left over.
        splits: the K tasks' validation rows.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        groups: int,
        seed: int,
        layout: Layout | Layouts,
        examples: Sequence[int] | None = None,
    ):
        self.splits = [task.validation for task in tasks]
        each = list(examples or [None] * len(tasks))
        # `n or 1`: where all rows are dealt out, a group needs one row of each task.
        self.groups = max(
            1,
            min(
                groups,
                *(len(split) // (n or 1) for split, n in zip(self.splits, each, strict=True)),
            ),
        )
        self.layouts, self._key = _layouts(layout), f"{seed}/validation"
        self._rows = [
            stratified(
                split.targets, split.answers, self.groups, n, f"{seed}/{task.name}/validation"
            )
            for task, split, n in zip(tasks, self.splits, each, strict=True)
        ]
        # A bool counts as 0 or 1: the part of left-over rows.
        self.parts = self.groups + any(len(rows[self.groups]) for rows in self._rows)
        self._dealt: dict[int, list[tuple[Layout, Micro, int]]] = {}

    def rows(self, part: int) -> list[np.ndarray]:
        """K ascending int64 arrays: each task's rows in group `part`. The number after the last
        group names the rows left over.
        """
        assert 0 <= part < self.parts
        return [rows[part] for rows in self._rows]

    def group(self, group: int) -> Iterator[Batch]:
        """This rank's micro-batches of group `group` (or of what is left over), made one at a time.
        Every rank has the same number of them, at least one.

        Over all ranks every row of the group stands in exactly one of them.
        """
        stream, row = self.examples(group)
        dealt = self._deal(group)
        yield from self.layouts.collate(dealt, self.splits, stream, row, self._key)

    def forwards(self, group: int) -> int:
        """How many micro-batches `group` gives."""
        return len(self._deal(group))

    def _deal(self, group: int) -> list[tuple[Layout, Micro, int]]:
        if group not in self._dealt:  # the same every time, and the costly part of a large group
            self._dealt[group] = self.layouts.deal(self.splits, *self.examples(group))
        return self._dealt[group]

    def by_stream(self, group: int) -> list[list[Batch]]:
        """The examples of `group`, stream by stream: this rank's micro-batches of each."""
        return self.layouts.by_stream(self.splits, *self.examples(group), self._key)

    def examples(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Task and row, (n,) int64 each, of the examples in group `group`."""
        rows = self.rows(group)
        return np.repeat(np.arange(len(rows)), [len(some) for some in rows]), np.concatenate(rows)


def stratified(
    targets: np.ndarray, answers: np.ndarray, groups: int, examples: int | None, key: str
) -> list[np.ndarray]:
    """Row numbers of `groups` groups of `examples` rows each, then of the rows left over.

    Rows are sorted by `targets`, then `answers`. The sorted rows are divided into strata of
    neighbours, one for each example of a group. Every group draws one row of every stratum. The
    result is groups + 1 ascending arrays.

    Args:
        targets, answers: (n,) each: a row's number of target tokens, and a number for its answer
            (`Encoded.answers`).
        groups: at most n // examples where `examples` is given.
        examples: rows of a group. None deals out all rows.
        key: of the permutations.

    Example: six rows for 2 groups of 2. Sorted by targets, they form two strata of three: the short
        rows 1, 3, 5 and the long rows 0, 2, 4. Each group gets one short and one long row. One of
        each is left over.

        >>> targets, answers = np.array([9, 1, 8, 2, 9, 1]), np.zeros(6)
        >>> [rows.tolist() for rows in stratified(targets, answers, 2, 2, "a key")]
        [[0, 5], [1, 2], [3, 4]]
    """
    n = len(targets)
    random = permutation(n, key)
    # Through `random`, so that rows alike in both stand in random order.
    order = random[np.lexsort((answers[random], targets[random]))]
    # All rows: strata of `groups` rows, so that each row finds a group.
    # Else `examples` strata, equal to within a row.
    cuts = (
        range(groups, n, groups)
        if examples is None
        else [n * i // examples for i in range(1, examples)]
    )
    found = np.empty(n, dtype=np.int64)
    for i, stratum in enumerate(np.split(order, list(cuts))):
        # The first `groups` places are the groups, the others are left over. drawn[place] is a
        # row's number in the stratum; a number past the stratum's end is no row.
        drawn = permutation(max(len(stratum), groups), f"{key}/{i}")
        places = np.flatnonzero(drawn < len(stratum))
        found[stratum[drawn[places]]] = places.clip(max=groups)
    return [np.flatnonzero(found == group) for group in range(groups + 1)]
