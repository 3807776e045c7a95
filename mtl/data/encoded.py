"""Encoded rows: what the cache holds, what a batch reads, and the report of what became of every
source row.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "target": pa.list_(
            pa.uint8()
        ),  # not bool, which Arrow packs to bits: a memory-mapped view is wanted
        "targets": pa.int32(),
        "answer": pa.int64(),
        "source": pa.int32(),  # which of the split's sources
        "row": pa.int64(),  # in it
    }
)
EXAMPLES = 3  # dropped rows of each reason that a report shows


class DataError(ValueError):
    """Data that cannot be trained on. The text lists every problem found, one a line."""


@dataclass
class Report:
    """What became of the rows of one split of one task."""

    read: int = 0  # rows read; a split with a cap is read no further than its last kept row
    kept: int = 0
    tokens: int = 0  # of the kept rows
    targets: int = 0  # target tokens of the kept rows
    truncated: int = 0  # kept rows that were truncated
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    shown: dict[str, list[tuple[int, int, str]]] = field(
        default_factory=dict
    )  # reason -> first (source, row, text)
    notes: dict[str, int] = field(default_factory=dict)  # what is said of kept rows -> how often

    def drop(self, source: int, row: int, reason: str, text: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.shown.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append((source, row, text))

    def lines(self, where: Callable[[int, int], str]) -> list[str]:
        """For people: one line of totals, then the dropped rows by reason, the first few with their
        place.
        """
        lines = [
            (
                f"{self.kept:,} of {_rows(self.read)} kept: {self.tokens:,} tokens, {self.targets:,} "
                "of them targets"
            )
        ]
        if self.truncated:
            lines.append(f"{_rows(self.truncated)} truncated")
        lines += [f"{text}: {count:,}" for text, count in sorted(self.notes.items())]
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
    """One split of one task, in memory or memory-mapped: n rows of token ids with a target mask
    each.

    Attributes: lengths: (n,) int64, tokens of each row. positions: (n,) int64, what each row takes
        in a forward: its last token is only predicted. targets: (n,) int64, target tokens of each
        row, >= 1. answers: (n,) int64, each row's first three target ids as one number: the same
        for the same label. fingerprint: hexadecimal; equal for equal content, encoded in the same
        way. report: what became of the source's rows.
    """

    def __init__(
        self,
        table: pa.Table,
        places: Sequence[Callable[[int], str]],
        fingerprint: str,
        report: Report,
    ):
        self._table, self._places, self.fingerprint, self.report = (
            table,
            list(places),
            fingerprint,
            report,
        )
        self._ids = _Ragged(table.column("ids"), np.int32)
        self._target = _Ragged(table.column("target"), np.bool_)
        self.lengths = self._ids.lengths
        self.positions = self.lengths - 1
        self.targets = table.column("targets").to_numpy().astype(np.int64)
        self.answers = table.column("answer").to_numpy()

    @staticmethod
    def open(folder: Path, places: Sequence[Callable[[int], str]], fingerprint: str) -> "Encoded":
        """Memory-map `folder`; `places[s](r)` says where row r of source s stands.

        Raises: DataError if the folder is damaged.
        """
        try:
            with (
                pa.memory_map(str(folder / "rows.arrow")) as file,
                pa.ipc.open_stream(file) as reader,
            ):
                table = reader.read_all()
            report = Report.load(folder / "report.json")
            if len(table) != report.kept:  # Arrow takes the end of the file for the end of the rows
                raise ValueError(f"found {_rows(len(table))}, wanted {report.kept:,}")
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(
                f"the encoded data in {folder} is damaged ({error}). Remove the folder: it is made "
                "again"
            ) from error
        return Encoded(table, places, fingerprint, report)

    @staticmethod
    def of(rows: Iterable[tuple[Sequence[int], Sequence[bool]]], name: str = "memory") -> "Encoded":
        """Rows (ids, target mask) given in code: for tests, and for data that is no file."""
        kept = [
            (np.asarray(ids, np.int32), np.asarray(target, np.uint8), 0, i)
            for i, (ids, target) in enumerate(rows)
        ]
        table = pa.Table.from_batches([record_batch(kept)], SCHEMA)
        report = Report(
            len(kept),
            len(kept),
            sum(len(ids) for ids, *_ in kept),
            sum(int(t.sum()) for _, t, *_ in kept),
        )
        return Encoded(table, [lambda row: f"{name}, row {row + 1}"], name, report)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, i: int) -> np.ndarray:
        """(lengths[i],) int32, read-only."""
        return self._ids[i]

    def target(self, i: int) -> np.ndarray:
        """(lengths[i],) bool, read-only: token j is predicted (from position j - 1) and trained.
        Element 0 is False.
        """
        return self._target[i]

    def where(self, i: int) -> str:
        """The place of row i in its source: `file:line`, or `source, row n`."""
        source, row = (self._table.column(name)[i].as_py() for name in ("source", "row"))
        return self._places[source](row)

    def problems(self) -> list[str]:
        """The report as lines, with places."""
        return self.report.lines(lambda source, row: self._places[source](row))


@dataclass(frozen=True)
class TaskData:
    """One task: its name and its two splits, encoded."""

    name: str
    train: Encoded
    validation: Encoded


def record_batch(rows: Sequence[tuple[np.ndarray, np.ndarray, int, int]]) -> pa.RecordBatch:
    """Rows (ids, target mask, source, row in the source) as Arrow."""
    ids, target, source, row = zip(*rows, strict=True) if rows else ((), (), (), ())
    offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    flat = pa.array(np.concatenate([np.empty(0, np.int32), *ids]).astype(np.int32))
    mask = pa.array(np.concatenate([np.empty(0, np.uint8), *target]).astype(np.uint8))
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, flat),
            pa.ListArray.from_arrays(offsets, mask),
            pa.array([int(np.sum(t)) for t in target], pa.int32()),
            pa.array(
                [_answer(i[t.astype(bool)]) for i, t in zip(ids, target, strict=True)], pa.int64()
            ),
            pa.array(source, pa.int32()),
            pa.array(row, pa.int64()),
        ],
        schema=SCHEMA,
    )


def _answer(targets: np.ndarray) -> int:
    """The first three of some ids, 21 bits each, in the order of the ids."""
    padded = [*targets[:3].tolist(), 0, 0, 0]
    return padded[0] << 42 | padded[1] << 21 | padded[2]


def _rows(n: int) -> str:
    return f"{n:,} row{'s' * (n != 1)}"


class _Ragged:
    """An Arrow column of lists as numpy views: element i without a copy, in about a microsecond."""

    def __init__(self, column: pa.ChunkedArray, dtype: type):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy().view(dtype) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self._offsets)]).astype(
            np.int64
        )

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"row {i} of {self._starts[-1]}")
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        local = i - self._starts[chunk]
        return self._values[chunk][self._offsets[chunk][local] : self._offsets[chunk][local + 1]]
