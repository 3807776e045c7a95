"""Which rows stand in which global batch: arithmetic on the step number, so that a run resumes from
one integer, or, where shares change, from the round that it is in.

It has two independent parts; neither knows the world size. *Which task* the next example is from
(`Round`) follows the divisor method (Webster / Sainte-Lague). Draw j of task k stands at time
(2j + 1) / (2 s_k), and all draws are taken in the order of time. *Which row* of the task draw j is
(`Mix`): element j mod n_k of a permutation keyed by (seed, task, epoch j // n_k).

Replicas of a run (`Order`) differ in the second part alone, or in the order of whole batches.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Share = int | float | Fraction
GRID = 2**20  # shares that are computed are multiples of 1 / GRID: sums of draws stay exact


@dataclass(frozen=True)
class Round:
    """A stretch of batches with the same shares. Which task each of its draws is from.

    A later round goes on where the one before stopped: what a task is behind or ahead of its
    planned draws moves its own draws to an earlier or a later time. So after any number of rounds
    of K >= 2 tasks, each with a share above 0, a task has at most (K - 1) / 2 draws more and at
    most K - 3 / 2 fewer than planned (docs/balancers.md has the proof). A round that leaves a task
    out which the one before had begins without debts: what was drawn counts as planned.

    Args:
        shares: K integers >= 0, not all 0: in their proportion the tasks are drawn. One of 0 is
            not drawn.
        start: its first batch.
        drawn: K integers, the draws of each task before it.
        owed: K integers, the planned draws of each task before it less `drawn`, in parts of a draw
            of which one has sum(shares).
    """

    shares: tuple[int, ...]
    start: int = 0
    drawn: tuple[int, ...] = ()
    owed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # () means none drawn and none owed. `object.__setattr__`, because the class is frozen.
        for name in ("drawn", "owed"):
            object.__setattr__(self, name, getattr(self, name) or (0,) * len(self.shares))

    @property
    def parts(self) -> np.ndarray:
        """(K,) float64, each task's part of the draws; sums to 1."""
        total = sum(self.shares)
        return np.array([share / total for share in self.shares])

    def draws(self, first: int, last: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Draws per task before position `first` of the round's sequence, those before the round
        included, and (task, draw) of the positions first..last-1.

        With shares of sum 1 the draws of task k up to time x are floor(s_k x + o_k + 1/2), or none
        where that is below 0; o_k is what it is owed. Over the tasks that can be drawn those
        numbers sum up to within K/2 of x + sum o_k, and the zeros add at most what the others are
        owed. At x = first - K/2 - sum max(o_k, 0) >= 0 there are therefore at most `first`, and at
        x = last + K/2 - sum o_k at least `last`: only what is in between, about last - first + 2K
        draws, has to be sorted. Exact: no float and no replay.
        """
        total = sum(self.shares)
        active = [
            (share, owed) for share, owed in zip(self.shares, self.owed, strict=True) if share
        ]
        early = sum(max(owed, 0) for _, owed in active)
        late = sum(owed for _, owed in active)

        def until(twice: int) -> list[int]:  # draws of each task up to time twice / (2 total)
            return [
                max(0, (share * twice + 2 * owed + total) // (2 * total)) if share else 0
                for share, owed in zip(self.shares, self.owed, strict=True)
            ]

        # Twice the time x of the docstring, so that K/2 is whole. Rounding goes down:
        # a little early is safe, late would miss draws.
        begin = 2 * first - len(active) + -2 * early // total
        low = until(begin) if begin > 0 else [0] * len(self.shares)
        high = until(2 * last + len(active) - 2 * late // total)
        draws = sorted(
            # Twice the draw's time, exactly. Ties go to the first task, so the order is total.
            (Fraction((2 * j + 1) * total - 2 * owed, share), k, j)
            for k, (share, owed) in enumerate(zip(self.shares, self.owed, strict=True))
            for j in range(low[k], high[k])
        )
        # The first of the sorted draws still belong before `first`.
        skip = first - sum(low)
        for _, k, _ in draws[:skip]:
            low[k] += 1
        counts = [before + n for before, n in zip(self.drawn, low, strict=True)]
        found = draws[skip : skip + last - first]
        return counts, [(k, self.drawn[k] + j) for _, k, j in found]


@dataclass(frozen=True)
class Order:
    """Which of `of` replicas of an order this is.

    Ju et al. (2024, arXiv 2410.03743) train one model for each replica and merge them.

    Args:
        scheme: "rotate": place p of n -> (p + replica * n // of) mod n, so that the replicas' first
            n / of places are a partition of the rows. "shuffle": the permutation's key has the
            replica in it. "batch": whole batches change places within each window.
        replica: 0 .. of - 1.
        epochs: "first": only each task's first epoch (batch: the first window) differs; "all".
        window: batches that change places among themselves ("batch" only), >= 1.
        steps: batches in the run ("batch" only). No window goes beyond them, or replicas would
            differ in their rows.
    """

    scheme: str
    replica: int
    of: int
    epochs: str = "first"
    window: int = 1
    steps: int = 1

    def concerns(self, epoch: int) -> bool:
        return epoch == 0 or self.epochs == "all"


class Mix:
    """The endless sequence of global batches over K tasks.

    Args:
        names: the tasks. A task's name keys its row order; its place in the list does not.
        sizes: (K,) training rows of each task, >= 1.
        shares: (K,) positive numbers in the proportion of the tasks' draws: see `shares_for`. After
            any M draws a task's count differs from `share * M` by at most (1 + share * (K - 2)) /
            2, the share in 0..1. With `shares == sizes` the first sum(sizes) draws are every row
            once.
        examples: examples in a global batch, B.
        seed: keys every permutation.
        order: the replica; None: the one order.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        shares: Sequence[Share],
        examples: int,
        seed: int,
        order: Order | None = None,
    ):
        if not len(names) == len(sizes) == len(shares) > 0:
            raise ValueError(
                f"found {len(names)} names, {len(sizes)} sizes, {len(shares)} shares, wanted "
                "equally many, at least one"
            )
        for name, size, share in zip(names, sizes, shares, strict=True):
            if size < 1:
                raise ValueError(f"task {name}: found {size} training rows, wanted at least 1")
            if not 0 < share < math.inf:
                raise ValueError(
                    f"task {name}: found share {share}, wanted a finite number above 0"
                )
        if examples < 1:
            raise ValueError(f"found {examples} examples in a batch, wanted at least 1")
        self.names, self.sizes = list(names), [int(n) for n in sizes]
        self.examples, self.seed, self.order = int(examples), int(seed), order
        self.first = Round(_integers(shares))
        self._orders: dict[
            int, tuple[int, np.ndarray]
        ] = {}  # task -> (epoch, permutation): the epoch being read

    @property
    def shares(self) -> np.ndarray:
        """(K,) float64, each task's part of all draws; sums to 1."""
        return self.first.parts

    def drawn(self, step: int, now: Round | None = None) -> np.ndarray:
        """(K,) int64: examples drawn from each task by the first `step` batches. With `scheme:
        batch` this holds at the ends of windows only.

        Args:
            now: the round that `step` is in; None: the first, which ends with the run.
        """
        counts, _ = self._draws(step, step, now)
        return np.array(counts, dtype=np.int64)

    def batch(self, step: int, now: Round | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The tasks (B,) and rows (B,) of global batch `step` (0 is the first), int64, in the order
        they are drawn.

        Args:
            now: as in `drawn`.
        """
        step = self._place(step)
        _, draws = self._draws(step, step + 1, now)
        rows = [self._row(k, j) for k, j in draws]
        return np.array([k for k, _ in draws], dtype=np.int64), np.array(rows, dtype=np.int64)

    def rows(self, k: int, first: int, last: int) -> np.ndarray:
        """Ascending int64: the rows of task k that its draws first..last-1 are, each once."""
        if last - first >= 2 * self.sizes[k]:  # a whole epoch is among them
            return np.arange(self.sizes[k])
        return np.unique(np.array([self._row(k, j) for j in range(first, last)], dtype=np.int64))

    def next(self, now: Round, step: int, parts: np.ndarray) -> Round:
        """The round that follows `now` from batch `step` on.

        Args:
            parts: (K,) float64 >= 0, not all 0: the tasks' parts of the draws, up to a factor.
        """
        assert step >= now.start
        shares = on_grid(parts)
        n, total, drawn = (step - now.start) * self.examples, sum(now.shares), self.drawn(step, now)
        # From parts of which a draw has `total` to parts of which it has GRID, `shares`' sum.
        owed = [
            (owed + share * n - (after - before) * total) * GRID // total
            for owed, share, after, before in zip(
                now.owed, now.shares, drawn.tolist(), now.drawn, strict=True
            )
        ]
        if any(had and not has for had, has in zip(now.shares, shares, strict=True)):
            owed = [0] * len(owed)
        return Round(shares, step, tuple(drawn.tolist()), tuple(owed))

    def _draws(
        self, step: int, stop: int, now: Round | None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        now = now or self.first
        assert now.start <= step
        return now.draws((step - now.start) * self.examples, (stop - now.start) * self.examples)

    def _row(self, k: int, j: int) -> int:
        n, order, replica = self.sizes[k], self.order, ""
        epoch, place = divmod(j, n)
        if order and order.concerns(epoch):
            if order.scheme == "rotate":
                place = (place + order.replica * n // order.of) % n
            elif order.scheme == "shuffle":
                replica = f"/replica {order.replica}"
        if self._orders.get(k, (None,))[0] != epoch:
            self._orders[k] = (
                epoch,
                permutation(n, f"{self.seed}/{self.names[k]}/{epoch}{replica}"),
            )
        return int(self._orders[k][1][place])

    def _place(self, step: int) -> int:
        """Which batch of the one order stands at `step`."""
        order = self.order
        # Steps past the end come up too: TrainBatches prepares batches ahead.
        if order is None or order.scheme != "batch" or step >= order.steps:
            return step
        # Here an epoch is a window, and a place is a batch in it.
        epoch, place = divmod(step, order.window)
        if not order.concerns(epoch):
            return step
        start = epoch * order.window
        size = min(order.window, order.steps - start)
        key = f"{self.seed}/batches/{epoch}/replica {order.replica}"
        return start + int(permutation(size, key)[place])


def shares_for(
    kind: str,
    sizes: Sequence[int],
    *,
    temperature: float | None = None,
    share: Sequence[float | None] | None = None,
    epochs: Sequence[float | None] | None = None,
) -> list[Fraction]:
    """(K,) shares of the tasks by one of the five rules.

    `proportional`: n_k. `equal`: 1. `explicit`: the given `share`. `temperature`: n_k^(1/T), so T =
    1 is proportional and T -> inf equal. It is the sampling of multilingual models (Arivazhagan et
    al. 2019, arXiv 1907.05019, section 3). `epochs`: n_k e_k, so that task k has passed e_k times
    when all sum(n_k e_k) draws are done.

    Raises:
        ValueError: an unknown kind, or a number that is missing or not positive.
    """

    def given(key: str, values: Sequence[float | None] | None) -> list[Fraction]:
        # A missing list reads as one missing number, which the next line refuses.
        found = list(values or [None])
        if any(value is None or not 0 < value < math.inf for value in found):
            raise ValueError(f"shares {kind}: found {key} {values}, wanted a finite number above 0")
        return [_decimal(value) for value in found]

    match kind:
        case "proportional":
            return [Fraction(n) for n in sizes]
        case "equal":
            return [Fraction(1) for _ in sizes]
        case "explicit":
            return given("share", share)
        case "epochs":
            return [n * e for n, e in zip(sizes, given("epochs", epochs), strict=True)]
        case "temperature":
            (t,) = given("temperature", [temperature])
            # Powers differ in their last bits from machine to machine. So we round them to a coarse
            # grid.
            return [Fraction(round(n ** float(1 / t) * GRID), GRID) for n in sizes]
    raise ValueError(
        f"found shares {kind!r}, wanted proportional, equal, explicit, temperature or epochs"
    )


def on_grid(parts: np.ndarray) -> tuple[int, ...]:
    """K integers of sum `GRID`, in the proportion of the (K,) parts to within 1 (the largest: K);
    one below half of a `GRID`-th becomes 0. On the grid already: as they are.
    """
    whole = np.round(parts / parts.sum() * GRID).astype(np.int64)
    # The largest share takes what rounding left: there it changes the proportion least.
    whole[whole.argmax()] += GRID - whole.sum()
    return tuple(whole.tolist())


def steps_for(epochs: float, sizes: Sequence[int], examples: int) -> int:
    """Optimizer steps of `epochs` passes over all training rows together: ceil(epochs * sum n_k /
    examples).
    """
    # Exact: in floats 1.1 * 100 is a little above 110, which would take a step more.
    return math.ceil(_decimal(epochs) * sum(sizes) / examples)


def permutation(n: int, key: str) -> np.ndarray:
    """(n,) int64: 0..n-1 in an order that `key` alone gives, the same on every machine and in every
    version.

    The rows are sorted by a 64-bit hash of their index: splitmix64 (Steele, Lea, Flood 2014, doi
    10.1145/2660193.2660195). It starts at the first 8 bytes of BLAKE2b of the key. It is a
    bijection of 64-bit words, so no two rows tie.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = np.uint64(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable").astype(np.int64)


def _decimal(value: Share) -> Fraction:
    """The number as written: 0.1 is one tenth, not the nearest binary fraction."""
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)


def _integers(shares: Sequence[Share]) -> tuple[int, ...]:
    """The shares as integers in the same proportion, without a common factor."""
    exact = [_decimal(share) for share in shares]
    scale = math.lcm(*(share.denominator for share in exact))
    integers = [int(share * scale) for share in exact]
    factor = math.gcd(*integers)
    return tuple(n // factor for n in integers)
