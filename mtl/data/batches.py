"""The micro-batches of one rank: of a training step, and of a group of validation rows."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mtl.data.collate import Micro, MicroBatch, collate, deal
from mtl.data.encoded import Encoded, TaskData
from mtl.data.mix import Mix, permutation


class Layout:
    """How examples become this rank's micro-batches; shared by training and validation.

    Args:
        world, rank: data-parallel ranks, and which one this is.
        tokens: most positions, padding included, of a micro-batch.
        pad_id: fills what a mask or its own segment hides; any id will do.
        packed: several examples a row, isolated by position ids; else one, padded.
        row_length: most tokens of a packed row; None = `tokens`.
    """

    def __init__(
        self,
        world: int,
        rank: int,
        tokens: int,
        pad_id: int,
        packed: bool = False,
        row_length: int | None = None,
    ):
        assert 0 <= rank < world
        self.world, self.rank, self.tokens, self.pad_id, self.packed = (
            world,
            rank,
            tokens,
            pad_id,
            packed,
        )
        self.row_length = (row_length or tokens) if packed else None

    def deal(
        self, splits: Sequence[Encoded], task: np.ndarray, row: np.ndarray
    ) -> list[tuple[Micro, int]]:
        """This rank's part of `collate.deal` of some examples; with each micro-batch the most
        targets any rank has in it.
        """
        pairs = list(zip(task.tolist(), row.tolist(), strict=True))
        dealt = deal(
            [int(splits[k].positions[n]) for k, n in pairs],
            self.world,
            self.tokens,
            self.row_length,
        )
        targets = [int(splits[k].targets[n]) for k, n in pairs]
        most = [
            max(sum(targets[i] for row in micro for i in row) for micro in turn)
            for turn in zip(*dealt, strict=True)
        ]
        return list(zip(dealt[self.rank], most, strict=True))

    def by_task(
        self, splits: Sequence[Encoded], task: np.ndarray, row: np.ndarray
    ) -> list[list[MicroBatch]]:
        """The same examples dealt task by task: K lists of this rank's micro-batches, each as long
        on every rank.
        """
        apart = []
        for k in range(len(splits)):
            mine = np.flatnonzero(task == k)
            dealt = self.deal(splits, task[mine], row[mine])
            apart.append([self.collate(*micro, splits, task[mine], row[mine]) for micro in dealt])
        return apart

    def collate(
        self, micro: Micro, most: int, splits: Sequence[Encoded], task: np.ndarray, row: np.ndarray
    ) -> MicroBatch:
        """The micro-batch of examples whose task and row stand at the indices in `micro`."""

        def piece(i: int) -> tuple[np.ndarray, np.ndarray, int]:
            k, n = int(task[i]), int(row[i])
            return splits[k].ids(n), splits[k].target(n), k

        return collate(
            [[piece(i) for i in indices] for indices in micro],
            self.pad_id,
            self.packed,
            most,
            self.tokens,
        )


class TrainBatches:
    """A rank's micro-batches of each optimizer step, prepared `ahead` steps early by a thread.

    `.batch(step)` may be called in any order and with any step: a batch is a function of its
    number. An error in the preparation is raised by the call for that step.
    """

    def __init__(self, tasks: Sequence[TaskData], mix: Mix, layout: Layout, ahead: int = 2):
        assert mix.names == [task.name for task in tasks] and mix.sizes == [
            len(task.train) for task in tasks
        ]
        self.mix, self.layout, self.ahead = mix, layout, ahead
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
        self._coming: dict[int, Future[list[MicroBatch]]] = {}

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step` (0 is the first): as many on every
        rank, at least one.
        """
        wanted = range(step, step + 1 + self.ahead)
        for late in [n for n in self._coming if n not in wanted]:
            self._coming.pop(late).cancel()
        for n in wanted:
            if n not in self._coming:
                self._coming[n] = self._worker.submit(self.make, n)
        return self._coming.pop(step).result()

    def by_task(self, step: int) -> list[list[MicroBatch]]:
        """The examples of `batch(step)` task by task: K lists of this rank's micro-batches, each as
        long on every rank.
        """
        return self._worker.submit(
            lambda: self.layout.by_task(self._splits, *self.mix.batch(step))
        ).result()

    def close(self) -> None:
        """Stop the thread; what it prepared is forgotten."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def make(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `batch`, made now and on this thread."""
        task, row = self.mix.batch(step)
        dealt = self.layout.deal(self._splits, task, row)
        micros = [self.layout.collate(*micro, self._splits, task, row) for micro in dealt]
        return [micro.pinned() for micro in micros] if self._pin else micros


class ValidationGroups:
    """Every task's validation rows, divided once into the same number of groups of whole examples,
    and what is left over.

    A group is a fair sample of its task: rows are sorted by their number of target tokens and then
    by what these are, so that a classifier's labels stand together, and divided into strata; each
    group has one row of each stratum, drawn by a permutation keyed by seed and task. Neither world
    size nor layout change the groups.

    Args: tasks: K tasks. groups: groups wanted. `self.groups`, the effective number, is limited by
        the smallest task so that every group
            holds as many examples of every task as the others: whoever asks should say so when the
            two differ.
        seed: keys the draw.
        layout: how examples become micro-batches.
        examples: (K,) of each task in a group (of a task with fewer rows: all of them). None: every
            row stands in a group, and those of a task differ in size by one row at most.

    Attributes:
        parts: the groups, and one more where rows are left over.
        splits: the K tasks' validation rows.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        groups: int,
        seed: int,
        layout: Layout,
        examples: Sequence[int] | None = None,
    ):
        self.splits = [task.validation for task in tasks]
        each = list(examples or [None] * len(tasks))
        self.groups = max(
            1,
            min(
                groups,
                *(len(split) // (n or 1) for split, n in zip(self.splits, each, strict=True)),
            ),
        )
        self.layout = layout
        self._rows = [
            stratified(
                split.targets, split.answers, self.groups, n, f"{seed}/{task.name}/validation"
            )
            for task, split, n in zip(tasks, self.splits, each, strict=True)
        ]
        self.parts = self.groups + any(len(rows[self.groups]) for rows in self._rows)
        self._dealt: dict[int, list[tuple[Micro, int]]] = {}

    def rows(self, part: int) -> list[np.ndarray]:
        """K ascending int64 arrays: the rows of each task in group `part`, or, after the last
        group, of those left over.
        """
        assert 0 <= part < self.parts
        return [rows[part] for rows in self._rows]

    def group(self, group: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of group `group` (or what is left over), made one at a time: as
        many on every rank, at least one.

        Over all ranks every row of the group stands in exactly one of them.
        """
        task, row = self.examples(group)
        if (
            group not in self._dealt
        ):  # the same every time, and the costly part where a group is large
            self._dealt[group] = self.layout.deal(self.splits, task, row)
        for micro in self._dealt[group]:
            yield self.layout.collate(*micro, self.splits, task, row)

    def by_task(self, group: int) -> list[list[MicroBatch]]:
        """The examples of `group` task by task: K lists of this rank's micro-batches, each as long
        on every rank.
        """
        return self.layout.by_task(self.splits, *self.examples(group))

    def examples(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Task and row, (n,) int64 each, of the examples in group `group`."""
        rows = self.rows(group)
        return np.repeat(np.arange(len(rows)), [len(some) for some in rows]), np.concatenate(rows)


def stratified(
    targets: np.ndarray, answers: np.ndarray, groups: int, examples: int | None, key: str
) -> list[np.ndarray]:
    """Row numbers of `groups` groups of `examples` rows each, and of the rows left over: ascending,
    groups + 1 arrays.

    Rows are sorted by `targets`, then `answers`, and cut into strata of neighbours, one for each
    example of a group. Every group draws one row of every stratum.

    Args:
        targets, answers: (n,) each, how many target tokens a row has, and what they are
            (`Encoded.answers`).
        groups: at most n // examples where `examples` is given.
        examples: rows of a group. None deals out all rows.
        key: of the permutations.

    Example: six rows for 2 groups of 2. Sorted by targets they are 1, 3, 5 (the short ones) and
        0, 2, 4 (the long ones): two strata of three. Each group gets one short and one long row,
        and one of each is left over.

        >>> targets, answers = np.array([9, 1, 8, 2, 9, 1]), np.zeros(6)
        >>> [rows.tolist() for rows in stratified(targets, answers, 2, 2, "a key")]
        [[0, 5], [1, 2], [3, 4]]
    """
    n = len(targets)
    random = permutation(n, key)
    # Through `random`, so that rows alike in both stand in random order.
    order = random[np.lexsort((answers[random], targets[random]))]
    cuts = (
        range(groups, n, groups)
        if examples is None
        else [n * i // examples for i in range(1, examples)]
    )
    found = np.empty(n, dtype=np.int64)
    for i, stratum in enumerate(np.split(order, list(cuts))):
        # [place]: the number of its row in the stratum; past the stratum's end, no row. The first
        # `groups` places are the groups, the others are left over.
        drawn = permutation(max(len(stratum), groups), f"{key}/{i}")
        places = np.flatnonzero(drawn < len(stratum))
        found[stratum[drawn[places]]] = places.clip(max=groups)
    return [np.flatnonzero(found == group) for group in range(groups + 1)]
