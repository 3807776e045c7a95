"""Encoded rows: what the cache holds, what a batch reads, and the report of what became of every
source row.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from mtl.data.blocks import Block, BlockError, Mapped
from mtl.data.examples import Row

Positions = Callable[[Mapping[str, np.ndarray]], np.ndarray]

NEXT_TOKEN: dict[str, pa.DataType] = {"ids": pa.int32(), "target": pa.uint8()}
"""Columns of next-token prediction. The target is not bool: Arrow packs that to bits, and we want
views.
"""


def next_token_positions(lengths: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) int64: the last token of a row is only predicted."""
    return lengths["ids"] - 1


def schema(columns: Mapping[str, pa.DataType], losses: int = 1) -> pa.Schema:
    """The file's schema: the columns, then what the framework reads of every row."""
    kinds = {name: pa.list_(kind) for name, kind in columns.items()}
    more = {f"targets.{i}": pa.int32() for i in range(1, losses)}
    return pa.schema(
        {
            **kinds,
            "targets": pa.int32(),  # the count of the first loss
            "answer": pa.int64(),
            "source": pa.int32(),  # which of the split's sources
            "row": pa.int64(),  # in it
            **more,  # the counts of further losses
        }
    )


EXAMPLES = 3  # dropped rows of each reason that a report shows


# Of a folder of the cache.
ROWS, REPORT, SUMS = "rows.arrow", "report.json", "checksums.json"
ANSWERS = "reference-{}.npy"  # of a starting model to the rows, by its key
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, pa.ArrowException)


class DataError(ValueError):
    """The data cannot be trained on. The text lists every problem found, one a line."""


@dataclass
class Report:
    """What became of the rows of one split of one task."""

    read: int = 0  # rows read; a split with a cap is read no further than its last kept row
    kept: int = 0
    tokens: int = 0  # of the kept rows
    targets: int = 0  # of the kept rows, what the first loss counts
    unit: str = "target token"  # which is that
    truncated: int = 0  # kept rows that were truncated
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    shown: dict[str, list[tuple[int, int, str]]] = field(
        default_factory=dict
    )  # reason -> first (source, row, text)
    notes: dict[str, int] = field(default_factory=dict)  # remark on kept rows -> how often

    def drop(self, source: int, row: int, reason: str, text: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.shown.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append((source, row, text))

    def lines(self, where: Callable[[int, int], str]) -> list[str]:
        """The report for people: one line of totals, then the dropped rows by reason, the first few
        with their place. `TaskData.remarks` has the notes.
        """
        what = "of them targets" if self.unit == "target token" else f"{self.unit}s"
        lines = [
            (
                f"{self.kept:,} of {_rows(self.read)} kept: {self.tokens:,} tokens, "
                f"{self.targets:,} {what}"
            )
        ]
        if self.truncated:
            lines.append(f"{_rows(self.truncated)} truncated")
        for reason, count in sorted(self.dropped.items()):
            lines.append(f"{_rows(count)} dropped: {reason}")
            lines += [f"  {where(source, row)}: {text}" for source, row, text in self.shown[reason]]
            if count > len(self.shown[reason]):
                lines.append(f"  and {count - len(self.shown[reason]):,} more")
        return lines

    @staticmethod
    def load(path: Path) -> "Report":
        return Report(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))


class Encoded:
    """One split of one stream, in memory or memory-mapped: n rows of columns.

    Attributes:
        names: of the columns.
        lengths: (n,) int64, elements of each row's first column, which are its tokens.
        positions: (n,) int64, token positions that each row takes in a forward.
        counts: (n, L) int64, what each row counts for each of the objective's L losses.
        targets: (n,) int64, the first of these: target tokens, >= 1 in next-token prediction.
        answers: (n,) int64, the same number for the same answer (`examples.Row.answer`).
        fingerprint: hexadecimal; equal for equal content that is encoded in the same way.
        report: what became of the source's rows.
        folder: where the rows lie; None: in memory alone.
    """

    def __init__(
        self,
        table: pa.Table,
        places: Sequence[Callable[[int], str]],
        fingerprint: str,
        report: Report,
        columns: Mapping[str, pa.DataType] = NEXT_TOKEN,
        positions: Positions = next_token_positions,
        mapped: Mapped | None = None,
        label: str = "",
        folder: Path | None = None,
    ):
        self._table, self._places = table, list(places)
        self._mapped, self._label = mapped, label
        self.fingerprint, self.report, self.folder = fingerprint, report, folder
        self.names = tuple(columns)
        # to_pandas_dtype gives numpy's type, whatever its name says.
        stored = {
            name: _Ragged(table.column(name), kind.to_pandas_dtype(), mapped)
            for name, kind in columns.items()
        }
        self._columns: dict[str, _Ragged | Flat | np.ndarray] = dict(stored)
        lengths = {name: column.lengths for name, column in stored.items()}
        self.lengths = lengths[self.names[0]]
        self.positions = positions(lengths)
        # `schema` writes them in the order of the losses: targets, targets.1, ...
        counted = [name for name in table.column_names if name.startswith("targets")]
        self.counts = np.stack([table.column(name).to_numpy() for name in counted], 1).astype(
            np.int64
        )
        self.targets = self.counts[:, 0]
        # A copy: later reads through the map would go unchecked.
        self.answers = np.array(table.column("answer").to_numpy())

    @staticmethod
    def open(
        folder: Path,
        places: Sequence[Callable[[int], str]],
        fingerprint: str,
        columns: Mapping[str, pa.DataType] = NEXT_TOKEN,
        positions: Positions = next_token_positions,
        label: str = "",
    ) -> "Encoded":
        """Memory-map `folder`; `places[s](r)` says where row r of source s stands.

        Args:
            label: what to call the split in an error.

        Raises:
            DataError: the folder is damaged. Reading a row raises it too: rows are compared with
                their checksums when they are first read.
        """
        try:
            report, blocks = _report_and_blocks(folder)
            mapped = Mapped(folder / ROWS, blocks)
            with pa.ipc.open_stream(mapped.buffer) as reader:
                table = reader.read_all()
            if len(table) != report.kept:  # Arrow takes the end of the file for the end of the rows
                raise ValueError(f"found {_rows(len(table))}, wanted {report.kept:,}")
        except _UNREADABLE as error:
            raise DataError(_damaged(folder, label, error)) from error
        return Encoded(
            table, places, fingerprint, report, columns, positions, mapped, label, folder
        )

    @staticmethod
    def of(rows: Iterable[tuple[Sequence[int], Sequence[bool]]], name: str = "memory") -> "Encoded":
        """Rows (ids, target mask) given in code: for tests, and for data that is no file."""
        kept = []
        for i, (ids, target) in enumerate(rows):
            ids, target = np.asarray(ids, np.int32), np.asarray(target, np.uint8)
            row = Row({"ids": ids, "target": target}, (int(target.sum()),), answer(ids[target > 0]))
            kept.append((row, 0, i))
        table = pa.Table.from_batches([record_batch(kept)], schema(NEXT_TOKEN))
        tokens = sum(len(row.columns["ids"]) for row, *_ in kept)
        report = Report(len(kept), len(kept), tokens, sum(row.counts[0] for row, *_ in kept))
        return Encoded(table, [lambda row: f"{name}, row {row + 1}"], name, report)

    def __len__(self) -> int:
        return len(self.lengths)

    def columns(self, i: int) -> dict[str, np.ndarray]:
        """Row i: its 1-D arrays by name, read-only.

        Raises:
            DataError: its bytes in the cache are not what was written.
        """
        with self._whole():
            return {name: column[i] for name, column in self._columns.items()}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Within it, a damaged block is an error that names the split."""
        try:
            yield
        except BlockError as error:
            raise DataError(_damaged(self._mapped.path.parent, self._label, error)) from error

    def attach(self, name: str, values: "np.ndarray | Flat") -> None:
        """Add a column in memory, or replace the one of that name; values[i] is row i's array."""
        assert len(values) == len(self), f"{name}: {len(values)} for {_rows(len(self))}"
        if isinstance(values, np.ndarray):
            values.setflags(write=False)
        self._columns[name] = values

    def detach(self, name: str) -> None:
        """Take an attached column away, where there is one."""
        self._columns.pop(name, None)

    def ids(self, i: int) -> np.ndarray:
        """Of next-token prediction: (lengths[i],) int32, read-only."""
        with self._whole():
            return self._columns["ids"][i]

    def target(self, i: int) -> np.ndarray:
        """Of next-token prediction: (lengths[i],) bool, read-only.

        Token j is predicted, from position j - 1, and trained. Element 0 is False.
        """
        with self._whole():
            return self._columns["target"][i].view(np.bool_)

    def where(self, i: int) -> str:
        """The place of row i in its source: `file:line`, or `source, row n`."""
        source, row = self.origin(i)
        return self._places[source](row)

    def origin(self, i: int) -> tuple[int, int]:
        """Which of the split's sources row i comes from, and its number there, both from 0."""
        with self._whole():
            if self._mapped is not None:
                self._mapped.check_unchanged()
            return tuple(self._table.column(name)[i].as_py() for name in ("source", "row"))

    def problems(self) -> list[str]:
        """The report as lines, with places."""
        return self.report.lines(lambda source, row: self._places[source](row))


@dataclass(frozen=True)
class TaskData:
    """One stream: the name of its task, and its two splits, encoded.

    Attributes:
        shared: validation rows that are training rows too.
    """

    name: str
    train: Encoded
    validation: Encoded
    shared: int = 0

    def reports(self) -> Iterator[tuple[str, Encoded, list[str]]]:
        """Each split by its name, with what became of its rows as lines."""
        yield "train", self.train, self.train.problems()
        lines = self.validation.problems()
        if self.shared:
            lines.append(
                f"{self.shared:,} of {_rows(len(self.validation))} are among the training rows: "
                "their loss says little about new rows"
            )
        yield "validation", self.validation, lines

    def remarks(self) -> list[str]:
        """The notes on rows that are kept, a line each, with how often they hold in both splits."""
        both = Counter(self.train.report.notes) + Counter(self.validation.report.notes)
        return [f"{text}: {count:,}" for text, count in sorted(both.items())]


def record_batch(
    rows: Sequence[tuple[Row, int, int]],
    columns: Mapping[str, pa.DataType] = NEXT_TOKEN,
    losses: int = 1,
) -> pa.RecordBatch:
    """(row, source, its number in the source) as Arrow."""
    kept, source, number = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = []
    for name, kind in columns.items():
        values = [row.columns[name] for row in kept]
        dtype = kind.to_pandas_dtype()
        offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
        # The empty array sets the type where there are no rows at all.
        flat = pa.array(np.concatenate([np.empty(0, dtype), *values]).astype(dtype))
        arrays.append(pa.ListArray.from_arrays(offsets, flat))
    counts = [pa.array([row.counts[i] for row in kept], pa.int32()) for i in range(losses)]
    answers = pa.array([row.answer for row in kept], pa.int64())
    places = [pa.array(source, pa.int32()), pa.array(number, pa.int64())]
    return pa.RecordBatch.from_arrays(
        [*arrays, counts[0], answers, *places, *counts[1:]], schema=schema(columns, losses)
    )


def save_sums(folder: Path, blocks: Sequence[Block]) -> None:
    """Write down what `Encoded.open` compares a finished folder with."""
    sums = {REPORT: zlib.crc32((folder / REPORT).read_bytes()), ROWS: blocks}
    (folder / SUMS).write_text(json.dumps(sums))


def damage(folder: Path) -> str:
    """What is not as it was written in a folder of the cache; empty where all is well."""
    try:
        Mapped(folder / ROWS, _report_and_blocks(folder)[1]).check_all()
    except _UNREADABLE as error:
        return str(error)
    return ""


def _report_and_blocks(folder: Path) -> tuple[Report, list[Block]]:
    sums = json.loads((folder / SUMS).read_text())
    if zlib.crc32((folder / REPORT).read_bytes()) != sums[REPORT]:
        raise ValueError(f"{REPORT} is not what was written")
    return Report.load(folder / REPORT), sums[ROWS]


def _damaged(folder: Path, label: str, error: Exception) -> str:
    return (
        f"{label}: the encoded data in {folder / ROWS} is damaged: {error}. Start again with "
        "--rebuild-cache, which encodes anew what is damaged"
    )


def answer(targets: np.ndarray) -> int:
    """One number for a row of ids: the first three, 21 bits each, in the order of the ids."""
    padded = [*targets[:3].tolist(), 0, 0, 0]
    return padded[0] << 42 | padded[1] << 21 | padded[2]


def _rows(n: int) -> str:
    return f"{n:,} row{'s' * (n != 1)}"


class Flat:
    """Rows of different lengths, one after the other in an array.

    Args:
        values: (sum of counts, ...), read-only or memory-mapped.
        counts: (n,) int64, elements of each row.
    """

    def __init__(self, values: np.ndarray, counts: np.ndarray):
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        assert len(values) == self._starts[-1], f"{len(values)} elements, not {self._starts[-1]}"
        self._values = values

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self._values[self._starts[i] : self._starts[i + 1]]


class _Ragged:
    """An Arrow column of lists as numpy views. Element i takes no copy and a few microseconds.

    Args:
        mapped: the file that holds the column; its checksums are compared. None: it is in memory.
    """

    def __init__(self, column: pa.ChunkedArray, dtype: type, mapped: Mapped | None = None):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        # In memory: a file that is cut takes only what `check` has a look at with it.
        self._offsets = [np.array(chunk.offsets.to_numpy()) for chunk in chunks]
        self._values = [chunk.values.to_numpy().view(dtype) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._mapped, self._size = mapped, np.dtype(dtype).itemsize
        # Where each chunk's values begin in the file, which the checksums count from.
        self._places = [
            mapped and values.ctypes.data - mapped.buffer.address for values in self._values
        ]
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self._offsets)]).astype(
            np.int64
        )

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"row {i} of {self._starts[-1]}")
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        local = i - self._starts[chunk]
        start, stop = self._offsets[chunk][local : local + 2].tolist()
        if self._mapped is not None and start < stop:
            place = self._places[chunk]
            self._mapped.check(place + start * self._size, place + stop * self._size)
        return self._values[chunk][start:stop]
