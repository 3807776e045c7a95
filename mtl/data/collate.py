"""Examples into micro-batches: `deal` divides a global batch by lengths alone, `collate` lays it
out.

The division changes speed and memory, never the loss. Per-task sums over all micro-batches of all
ranks do not depend on it.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd, inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl.data.examples import Batch

# Matrix products like positions in whole tiles. On AMX cores 530 positions take a quarter longer
# than 544, and GPUs' tensor cores behave alike. We take the first tile here that costs few
# positions.
TILES = 32, 16, 8
# Cost factor of positions outside whole tiles of 32, used to compare divisions. It is less than the
# quarter above: a step has more than matrix products, and some machines have no tiles.
UNTILED = 1.06
# Tokens of a row at which attention's dense L x L mask doubles a position's cost. Rows of 256 take
# an eighth longer than the shortest.
DOUBLING = 2048

Piece = tuple[np.ndarray, np.ndarray, int]  # ids (n,), target mask (n,) bool, task
Row = list[int]  # indices of the examples that share a row
Micro = list[Row]


class Teacher(NamedTuple):
    """What a teacher says at the T targets of a micro-batch (`mtl.losses.teacher`).

    Attributes:
        has: (T,) bool, the targets that have one; elsewhere the others are zeros.
        ids: (T, m) int64, its likeliest tokens.
        log_p: (T, m + 1) float32, their log-probabilities and the rest's; (T, m) where m is all.
    """

    has: Tensor
    ids: Tensor
    log_p: Tensor


@dataclass(frozen=True)
class MicroBatch(Batch):
    """R rows of L token positions with T target tokens, the input of one forward on one rank.

    Attributes:
        input_ids: (R, L) int64, each example's tokens except the last, which predicts nothing.
        position_ids: (R, L) int64, restart at 0 with each example.
        attention_mask: (R, L) int64, 1 = token, where rows are padded; None where they are packed.
        at: (T,) int64, ascending flat positions (row * L + column) that predict a target: each is
            the position before the target token.
        labels: (T,) int64, the ids to predict there.
        task: (T,) int64, the task of each target.
        most: the largest T of any rank's micro-batch of this forward.
        teacher: what targets' losses are taken from, where that is a teacher; None: nowhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    at: Tensor
    labels: Tensor
    task: Tensor
    most: int
    teacher: Teacher | None = field(default=None, kw_only=True)

    @property
    def positions(self) -> int:
        return self.input_ids.numel()

    def counts(self, k: int) -> Tensor:
        """(k,) int64: target tokens of each task."""
        return torch.bincount(self.task, minlength=k)


def collate(
    rows: Sequence[Sequence[Piece]],
    pad_id: int,
    packed: bool,
    most: int = 0,
    tokens: int | None = None,
) -> MicroBatch:
    """Lay rows of examples out as one micro-batch. No rows at all give one dummy row without
    targets.

    Args:
        most: the largest number of target tokens that any rank has in this forward.
        tokens: the most positions there may be. Where given, rows are widened to whole `TILES`.

    An example of n tokens takes n - 1 positions, because nothing is predicted from its last token.
    The first token of an example is never a target, so nothing is predicted across examples.

    Padded rows hold one example. Padding stands on the right. It is masked by length, never by id,
    because pad is often eos.

    Packed rows hold any number of examples. Position ids restart with each example and there is no
    mask: this is how transformers' models tell sequences apart. The tail of a short row is a
    segment of its own.
    """
    assert packed or all(len(row) == 1 for row in rows), "a padded row holds one example"
    # Every attention implementation accepts two positions, and packing detection can read them.
    width = max(2, max((sum(len(ids) - 1 for ids, _, _ in row) for row in rows), default=2))
    if rows and tokens is not None:
        width = widened(len(rows), width, tokens)
    shape = max(1, len(rows)), width
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(
        shape, -1, dtype=np.int64
    )  # what a position predicts; -1 = nothing that counts
    task = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        end = 0
        for ids, wanted, k in row:
            assert not wanted[0], (
                "the first token of an example has nothing before it to be predicted from"
            )
            start, end = end, end + len(ids) - 1
            input_ids[r, start:end], task[r, start:end] = ids[:-1], k
            labels[r, start:end] = np.where(wanted[1:], ids[1:], -1)
            position_ids[r, start:end] = np.arange(end - start)
            mask[r, start:end] = 1
        position_ids[r, end:] = np.arange(width - end)
    if not rows:
        position_ids[0], mask[0] = np.arange(width), 1
    at = np.flatnonzero(labels >= 0)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=None if packed else torch.from_numpy(mask),
        at=torch.from_numpy(at),
        labels=torch.from_numpy(labels.flat[at]),
        task=torch.from_numpy(task.flat[at]),
        most=max(most, len(at)),
    )


def widened(rows: int, width: int, tokens: int) -> int:
    """The width at which so many rows hold whole tiles. It is at most an eighth above `width`, and
    the rows stay within `tokens` positions.
    """
    for tile in TILES:
        step = tile // gcd(tile, rows)
        wider = _ceil(width, step) * step
        if 8 * wider <= 9 * width and rows * wider <= tokens:
            return wider
    return width


def deal(
    lengths: Sequence[int], world: int, tokens: int, row_length: int | None = None
) -> list[list[Micro]]:
    """Put examples into rows, rows into micro-batches, and deal these over ranks. This is pure
    arithmetic on the lengths.

    Args:
        lengths: (n,) positions of each example.
        world: ranks. More ranks than examples is fine: the others get empty micro-batches.
        tokens: the most positions, padding included, of a micro-batch: rows times longest row.
        row_length: most positions of a row, into which whole examples are packed. None: one example
            a row.

    Returns:
        [rank][micro][row] -> indices into `lengths`, each once. Every rank has the same number of
            micro-batches; an empty list stands where it has none left (`collate` makes a dummy
            row). The largest come first, so that what does not fit in memory fails at once. Ranks
            differ in padded positions by no more than one micro-batch.

    Raises:
        ValueError: an example does not fit.
    """
    limit = tokens if row_length is None else row_length
    if limit > tokens:
        raise ValueError(f"found row_length {row_length}, wanted at most batch.tokens = {tokens}")
    longest = max(lengths, default=1)
    if longest > limit:
        name = "batch.tokens" if row_length is None else "row_length"
        raise ValueError(
            f"found an example of {longest} positions, wanted at most {name} = {limit}"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if row_length is None:
        rows = [[i] for i in order]
    else:
        rows = _fill(lengths, order, world, tokens, row_length) if order else []
    widths = [sum(lengths[i] for i in row) for row in rows]
    # A row that may fill a micro-batch has one for itself: FlashAttention packs no other.
    taken = [tokens] * len(rows) if row_length == tokens else widths
    micros = sorted(
        _split(taken, world, tokens),
        key=lambda micro: -(micro.stop - micro.start) * sum(widths[micro.start :][:1]),
    )
    # Deal back and forth over the ranks: the next, smaller round takes back a round's differences.
    turns = [
        micros[i : i + world][:: 1 if i // world % 2 == 0 else -1]
        for i in range(0, len(micros), world)
    ]
    return [[rows[turn[rank]] for turn in turns] for rank in range(world)]


def _fill(
    lengths: Sequence[int], order: Sequence[int], world: int, tokens: int, row_length: int
) -> list[Row]:
    """Pack the examples into a multiple of `world` evenly filled rows, fewer where examples are
    few.

    Where a row may fill a micro-batch (FlashAttention), each micro-batch has one row. Otherwise we
    choose the number of rows with the fewest positions. Tiles and attention count in their cost.
    """
    fewest, total, longest = (
        _ceil(len(_pack(lengths, order, row_length)), world) * world,
        sum(lengths),
        lengths[order[0]],
    )

    def packed(count: int) -> list[Row]:
        return _pack(
            lengths,
            order,
            _least(longest, row_length, lambda size: len(_pack(lengths, order, size)) <= count),
        )

    def cost(count: int, size: int) -> float:
        mine = _ceil(count, world)
        each = _ceil(mine, _ceil(mine * size, tokens))  # rows of a micro-batch
        positions = each * widened(each, size, tokens)
        slower = UNTILED if positions % TILES[0] else 1.0
        return _ceil(mine, each) * positions * slower * (1 + size / DOUBLING)

    if row_length == tokens:
        return packed(fewest)
    most = max(fewest, _ceil(total, longest) + world)
    # The costs if every row were filled to the last position. We make the packings in this order
    # until none can be better.
    promised = sorted(
        (cost(count, max(longest, _ceil(total, count))), count)
        for count in range(fewest, most + 1, world)
    )
    best: tuple[float, list[Row]] = (inf, [])
    for bound, count in promised[:8]:
        if bound < best[0]:
            rows = packed(count)
            best = min(
                best,
                (cost(len(rows), sum(lengths[i] for i in rows[0])), rows),
                key=lambda each: each[0],
            )
    return best[1]


def row_length_for(longest: int, tokens: int, dense_mask: bool) -> int:
    """The most tokens of a packed row when the user names none.

    Kernels that build a dense L x L mask (sdpa, eager) want rows not much longer than the longest
    example. 4,096 tokens of 64-token sequences took 0.22 s in rows of 512, and 0.75 s in one row.
    FlashAttention's variable-length kernel takes exactly one row.
    """
    return min(tokens, max(longest, 256)) if dense_mask else tokens


def _pack(lengths: Sequence[int], order: Sequence[int], size: int) -> list[Row]:
    """Pack the examples into rows of at most `size` tokens, best fit decreasing; the fullest row
    first.
    """
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order:
        place = bisect_left(room, (lengths[i], -1))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(i)
        else:
            free, row = size, len(rows)
            rows.append([i])
        insort(room, (free - lengths[i], row))
    return [rows[row] for _, row in room]


def _split(widths: Sequence[int], world: int, tokens: int) -> list[slice]:
    """Divide rows, sorted by falling width, into a multiple of `world` runs of even size. Each run
    has rows * widest <= tokens.
    """
    n = len(widths)

    def fewest(
        budget: int,
    ) -> list[int]:  # [i]: the fewest micro-batches that hold rows i, i+1, ...
        need = [0] * (n + 1)
        for i in reversed(range(n)):
            need[i] = 1 + need[min(n, i + budget // widths[i])]
        return need

    parts = max(1, _ceil(fewest(tokens)[0], world)) * world
    budget = _least(widths[0], tokens, lambda budget: fewest(budget)[0] <= parts) if n else tokens
    need, ahead, start, cuts = fewest(budget), sum(widths), 0, []
    for left in range(parts, 0, -1):
        stop, share = start, ahead / left
        most = min(n, start + budget // widths[start]) if start < n else n
        # Take a fair share of what is left, or more where the rest would need too many
        # micro-batches.
        while stop < most and ((stop - start) * widths[start] < share or need[stop] > left - 1):
            stop += 1
        cuts.append(slice(start, stop))
        ahead, start = ahead - sum(widths[start:stop]), stop
    return cuts


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """A small size in low..high that is enough, by bisection; `high` must be enough. It is the
    least where `enough` is monotone.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
