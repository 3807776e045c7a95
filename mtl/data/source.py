"""Where rows come from: JSON, CSV and Parquet files, and through `datasets` saved folders and the
hub.

An unreadable row is handed on as a problem with its place, and the reading goes on. A source that
cannot be read at all raises DataError.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from mtl.data.encoded import DataError

WHOLE = 2**26  # bytes up to which a file's fingerprint reads all of it: a tenth of a second
BLOCKS, BLOCK = 64, 2**16  # beyond: so many blocks of so many bytes, evenly spaced
# name:config:split, the split as `datasets` takes it: train[:10%], train+test
HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]*)(:(?P<split>[\w.+:%\[\]-]*))?)?"
)
# gzip raises EOFError where a file ends too early, and zlib.error where bytes are damaged.
UNREADABLE = (OSError, EOFError, zlib.error)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
READ = (
    ".jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, a folder written by "
    "datasets.save_to_disk, or a hub name"
)


class SourceRow(NamedTuple):
    """One row: its number in the source, and what it holds or why it cannot be read. Numbers start
    at 0; in JSONL they are the lines'.
    """

    number: int
    value: Mapping[str, Any] | None
    problem: str = ""
    note: str = ""  # what is worth saying of a row that can be read
    size: int = 0  # bytes, where that is known
    columnar: bool = False  # whether null stands where an object lacks a key that others have


class Source(ABC):
    """Rows in a fixed order.

    Attributes:
        name: as the user wrote it.
        size: bytes, about.
    """

    name: str
    size: int

    @property
    def count(self) -> int | None:
        """How many rows it has, where that is known without reading them."""
        return None

    @abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """All rows, from the first. Raises DataError where the reading cannot go on."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal hash of the content, for this class of source: the same wherever it lies.
        Large files are sampled, so it is cheap (`WHOLE`).
        """

    def where(self, number: int) -> str:
        """The place of a row, for people."""
        return f"{self.name}, row {number + 1}"


def open_sources(name: str, split: str = "train") -> list[Source]:
    """The sources that `name` stands for: see `open_source`. A pattern (`data/*.jsonl`, `**` for
    folders within) stands for every file that it matches, sorted.
    """
    path = Path(name).expanduser()
    # `[` may stand in an existing file's name, and in a hub name's split (train[:10%]).
    if path.exists() or not glob.has_magic(name) or HUB_NAME.fullmatch(name):
        return [open_source(name, split)]
    found = sorted(one for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
    if not found:
        raise DataError(f"found no file that matches {path.absolute()}, wanted a {READ}")
    return [open_source(one, split) for one in found]


def open_source(name: str, split: str = "train") -> Source:
    """Find out what `name` is: a file, a folder, or `dataset[:config[:split]]` on the hub, by
    default its `split`.

    Raises:
        DataError: nothing is found; the text says what was looked for.
    """
    path = Path(name).expanduser()
    # A named pipe exists and is neither file nor folder: it can be read once only.
    if "://" in name or path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"found the stream {name}, wanted a {READ}: streaming is not supported, since the "
            "order of rows is "
            "computed from their number. Download it first"
        )
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        # The last suffix before .gz decides; none leaves an empty list, which no case takes.
        match [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]:
            case [".jsonl" | ".ndjson"]:
                return JsonLines(name, path)
            case [".json"]:
                # A .json file often holds one object a line, which is JSON Lines by another name.
                return JsonArray(name, path) if _begins(path, b"[") else JsonLines(name, path)
            case [".csv" | ".tsv" as suffix]:
                return Delimited(name, path, DELIMITERS[suffix])
            # ParquetFile opens the path itself, so a .gz around it would not be unpacked.
            case [".parquet"] if path.suffix.lower() != ".gz":
                return Parquet(name, path)
        raise DataError(f"found the file {name}, wanted a {READ}")
    tried = [f"the file or folder {path.absolute()}"]
    # A name that looks like a file is a mistyped path: the hub is not asked.
    if HUB_NAME.fullmatch(name) and not re.search(
        r"\.(jsonl?|ndjson|parquet|gz|csv|tsv|txt)$", name
    ):
        try:
            return _hub(name, split)
        except Exception as error:
            # Whatever `datasets` or the network raises, the error lists the hub among what was
            # tried.
            tried.append(f"the hub ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
    raise DataError(f"nothing found under {name!r}, tried {' and '.join(tried)}. Wanted a {READ}")


class JsonLines(Source):
    """A file with one JSON object a line, UTF-8. Empty lines are skipped. A row's number is its
    line's.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path, self.size = name, path, path.stat().st_size

    def rows(self) -> Iterator[SourceRow]:
        number = 0  # of the line that is read next
        try:
            with _open(self.path) as file:
                for line in file:
                    if line.strip():
                        yield _parsed(number, line)
                    number += 1
        except UNREADABLE as error:
            raise DataError(f"{self.where(number)}: {error}") from error

    def where(self, number: int) -> str:
        return f"{self.name}:{number + 1}"

    def fingerprint(self) -> str:
        return _file_fingerprint(self.path)


class JsonArray(Source):
    """A file that is one JSON array of objects, such as alpaca's and sharegpt's. It is read into
    memory whole.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path, self.size = name, path, path.stat().st_size

    def rows(self) -> Iterator[SourceRow]:
        try:
            with _open(self.path) as file:
                # utf-8-sig: Windows programs begin UTF-8 files with a byte order mark.
                values, twice = _load(file.read().decode("utf-8-sig"))
        except (*UNREADABLE, ValueError, RecursionError) as error:
            raise DataError(f"{self.name}: not a JSON array: {error}") from error
        for number, value in enumerate(values):
            # We do not know here which row has a key twice. The first row reports it for the file.
            yield _checked(number, value, twice if number == 0 else "")

    def fingerprint(self) -> str:
        return _file_fingerprint(self.path)


class Delimited(Source):
    """A CSV or TSV file with a line of column names, UTF-8. Every value is text, unchanged. A text
    in double quotes may span several lines.
    """

    def __init__(self, name: str, path: Path, delimiter: str):
        self.name, self.path, self.size = name, path, path.stat().st_size
        self._delimiter = delimiter

    def rows(self) -> Iterator[SourceRow]:
        csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
        number = 0
        try:
            with (
                _open(self.path) as file,
                # newline="": csv finds the ends of lines, since a quoted text may hold some.
                io.TextIOWrapper(file, "utf-8-sig", newline="") as lines,
            ):
                reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
                names = next(reader, [])
                if len(set(names)) < len(names):
                    raise DataError(f"{self.name}:1: found a column twice in {', '.join(names)}")
                for values in reader:
                    if len(values) == len(names):
                        yield SourceRow(number, dict(zip(names, values, strict=True)))
                    # csv gives [] for an empty line: skipped, and counted like JSON Lines' own.
                    elif values:
                        yield SourceRow(
                            number,
                            None,
                            f"found {len(values)} values up to line {reader.line_num}, wanted "
                            f"{len(names)}: {', '.join(names)}",
                        )
                    number += 1
        except (*UNREADABLE, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.where(number)}: not readable as CSV: {error}") from error

    def fingerprint(self) -> str:
        return _hash(self._delimiter, _file_fingerprint(self.path))


class Parquet(Source):
    """A Parquet file, read batch by batch."""

    def __init__(self, name: str, path: Path):
        self.name, self.path, self.size = name, path, path.stat().st_size

    def rows(self) -> Iterator[SourceRow]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        yield SourceRow(number, value, columnar=True)
                        number += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.where(number)}: not readable as Parquet: {error}") from error

    @property
    def count(self) -> int | None:
        try:
            return pyarrow.parquet.read_metadata(self.path).num_rows
        except (OSError, pa.ArrowException):  # reading the rows will say why
            return None

    def fingerprint(self) -> str:
        return _file_fingerprint(self.path)


class Table(Source):
    """A `datasets.Dataset`: a saved folder, or a split from the hub."""

    def __init__(self, name: str, dataset: Any, fingerprint: str):
        self.name, self._dataset, self._fingerprint = name, dataset, fingerprint
        self.size = dataset.data.nbytes

    def rows(self) -> Iterator[SourceRow]:
        for number, value in enumerate(self._dataset):
            yield SourceRow(number, value, columnar=True)

    @property
    def count(self) -> int:
        return len(self._dataset)

    def fingerprint(self) -> str:
        return self._fingerprint


def _folder(name: str, path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise DataError(
            "found a folder of splits, wanted one of them: "
            f"{' or '.join(str(path / s) for s in splits)}"
        )
    # save_to_disk writes state.json beside the rows.
    if not (path / "state.json").is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"found the folder {name} with {inside} in it, wanted a {READ}. Name its files, as a "
            "list"
        )
    from datasets import (
        load_from_disk,
    )  # here: importing it takes a second, and most sources are files

    # Not the fingerprint in state.json: that one stays the same when an .arrow file changes.
    parts = [_file_fingerprint(part) for part in sorted(path.glob("*.arrow"))]
    try:
        return Table(name, load_from_disk(str(path)), _hash(*parts))
    except Exception as error:  # `datasets` and Arrow have no common class of error
        raise DataError(
            f"the folder {name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _hub(name: str, split: str) -> Source:
    from datasets import load_dataset

    dataset, config, named = HUB_NAME.fullmatch(name).group("name", "config", "split")
    config, named = config or "", named or split
    found = load_dataset(dataset, config or None, split=named)
    # Private, but cheap: a hash of name, config, version and split. No rows are read.
    return Table(f"{dataset}:{config}:{named}".replace("::", ":"), found, found._fingerprint)


def _parsed(number: int, line: bytes) -> SourceRow:
    try:
        # A byte order mark can stand at the start of the file only.
        value, twice = _load(line.decode("utf-8-sig" if number == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        return SourceRow(
            number,
            None,
            f"not UTF-8: {error.reason} {line[error.start : error.start + 1]!r} at byte "
            f"{error.start + 1}",
        )
    except (ValueError, RecursionError) as error:
        return SourceRow(number, None, f"not JSON: {error}")
    return _checked(number, value, twice)._replace(size=len(line))


def _load(text: str) -> tuple[Any, str]:
    """The JSON value, and a note on keys that are there twice. The last of them counts."""
    twice: set[str] = set()

    # json keeps the last of equal keys silently; this hook sees every pair.
    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.update(key for key in value if keys.count(key) > 1)
        return value

    value = json.loads(text, object_pairs_hook=made)
    if not twice:
        return value, ""
    return value, f"rows with the key {', '.join(sorted(twice))} twice; the last one counts"


def _checked(number: int, value: Any, note: str = "") -> SourceRow:
    if not isinstance(value, dict):
        return SourceRow(number, None, f"found a JSON {type(value).__name__}, wanted an object")
    try:
        # json.loads takes a lone surrogate, and UTF-8 cannot hold one: so encoding is the test.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return SourceRow(number, None, r"not Unicode: half of a surrogate pair (\ud800 ... \udfff)")
    return SourceRow(number, value, note=note)


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _begins(path: Path, byte: bytes) -> bool:
    try:
        with _open(path) as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == byte
    except UNREADABLE as error:
        raise DataError(f"{path}: {error}") from error


def _file_fingerprint(path: Path) -> str:
    """A hash of all bytes of a file up to WHOLE. Of a larger file it covers the size, the time of
    change, and blocks spread over it.
    """
    status = path.stat()
    size = status.st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        # The time stands in for the bytes between the blocks, which are not read.
        digest = hashlib.blake2b(f"{size} {status.st_mtime_ns}".encode(), digest_size=16)
        for i in range(BLOCKS):
            # The first block is the file's start, the last one its end.
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
