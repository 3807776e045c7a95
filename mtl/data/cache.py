"""The encoded cache: every split of every task as token ids on disk, made once and memory-mapped.

A hash of everything that decides a split's content names its folder. It covers the sources' bytes,
the tokenizer with its chat template, and the format with its keywords. It also covers the length
policy, the cap and the code that encodes; of code from outside, what it imports of its package too.
The folder holds `rows.arrow` (Arrow's stream format, a
row an example; `datasets.Dataset.from_file` reads it too), `report.json` and `checksums.json`. What
a starting model says of the rows comes beside them (`mtl/train/reference.py`).
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import socket
import sys
import threading
import tokenize
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtl import process
from mtl.config import Config
from mtl.config.schema import TaskSection
from mtl.data.blocks import Summing
from mtl.data.encode import Encoder, hash_of
from mtl.data.encoded import (
    ANSWERS,
    REPORT,
    ROWS,
    SUMS,
    DataError,
    Encoded,
    Report,
    TaskData,
    damage,
    record_batch,
    save_sums,
    schema,
)
from mtl.data.examples import LOSS, Examples, Row
from mtl.data.formats import Format, RowProblem, Watched, without_nulls
from mtl.data.lock import Say, build_once
from mtl.data.source import JsonLines, Source, SourceRow, open_source, open_sources
from mtl.data.special import Note, Specials
from mtl.data.turns import find_turns

CHUNK = 256  # rows that are encoded at once, and written as one Arrow batch
LONG = 2**22  # bytes of rows above which a chunk has no more
PARALLEL = 2**25  # bytes of source above which starting processes, seconds each, is worth it
NEWS = 10.0  # seconds between two signs of progress

Notes = dict[str, int]  # what is worth saying of a row, and how often
# a row's number, and what became of it
Outcome = tuple[int, Row | RowProblem | None, Notes]  # None: it is on the other side
Side = tuple[float, bool]
"""A side of a held-out split: the fraction that is validation, and whether this side is it."""


def prepare(
    config: Config,
    examples: Mapping[str, Examples],
    formats: Mapping[str, Format],
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
    rebuild: bool = False,
) -> list[TaskData]:
    """Both splits of every task, encoded: read from `config.cache` if they are there, else made.

    Every process calls this. One of them encodes a split, the others wait. Call it before a process
    group exists: its collectives would time out meanwhile.

    Args:
        examples: how each stream's rows are encoded.
        formats: each stream's format, its keywords bound.
        say: takes messages for people: what is encoded, and whom this process waits for.
        rebuild: compare all that the cache has with its checksums, and encode anew what is damaged.

    Returns:
        the streams in the order of `config.tasks`.

    Raises:
        DataError: every problem of every task.
    """
    root, problems, tasks = Path(config.cache).expanduser(), [], []
    for name, task in config.streams.items():
        splits = []
        for split, cap in (("train", task.cap), ("validation", task.validation_cap)):
            try:
                side = None
                if not isinstance(task.validation, tuple):
                    side = (task.validation, split == "validation")
                sources = sources_of(task, split)
                if side and isinstance(side[0], int):
                    side = (_nearest(sources, formats[name], side[0]), side[1])
                label = f"{name} ({split})"
                splits.append(
                    encode_split(
                        root, sources, formats[name], examples[name], cap, label, say, side, rebuild
                    )
                )
            except DataError as error:
                problems.append(
                    f"{config.where(('tasks', name, split))}: tasks.{name}.{split}: {error}"
                )
        tasks.append((name, splits))
    if problems:
        raise DataError("\n".join(problems))
    return [TaskData(name, *splits, shared_rows(*splits)) for name, splits in tasks]


def sources_of(task: TaskSection, split: Literal["train", "validation", "test"]) -> list[Source]:
    """Where a split's rows come from: the training rows, where a part of them is held out.

    Raises:
        DataError: there is no such source.
    """
    named = getattr(task, split)
    if not isinstance(named, tuple):
        split, named = "train", task.train
    return [one for each in named for one in open_sources(each, split)]


def encode_split(
    root: Path,
    sources: Sequence[Source],
    to_example: Format,
    examples: Examples,
    cap: int | None,
    label: str,
    say: Say,
    side: Side | None = None,
    rebuild: bool = False,
) -> Encoded:
    """The encoded rows of `sources`, one source after the other. Rows already cached under `root`
    are read from there.

    Args:
        cap: how many usable rows to keep, in the order of the sources; reading stops there. None =
            all.
        label: what to call it in messages.
        side: keep only the rows whose content falls on this side of a split; None = all.
        rebuild: encode anew where what is cached is damaged.

    Raises:
        DataError: a source cannot be read, no row is left, or a row is too long and `too_long:
            error` holds.
    """
    key = _key(sources, to_example, examples, cap, side)
    folder = root / key
    if rebuild and folder.exists() and (found := damage(folder)):
        say(f"{label}: the encoded data in {folder} is damaged ({found}): encoding it anew")
        _remove(folder)
    if not folder.exists():

        def build(partial: Path, progress: Say) -> None:
            say(f"encoding {label}: {', '.join(one.name for one in sources)}")
            _write(
                partial,
                sources,
                to_example,
                examples,
                cap,
                lambda text: progress(f"{label}: {text}"),
                side,
                label,
            )

        build_once(folder, build, say)
    split = Encoded.open(
        folder, [one.where for one in sources], key, examples.columns, examples.positions, label
    )
    long = split.report.dropped.get("too long", 0)
    if len(split) == 0 or getattr(examples, "too_long", "drop") == "error" and long:
        found = (
            "no usable row"
            if len(split) == 0
            else f"{long:,} rows above batch.max_length, with too_long: error"
        )
        if len(split) == 0 and side and side[1]:
            found += (
                f" among the {side[0]:.2g} of the training rows that are held out (by what they "
                "hold: of few rows it may be none), wanted one at least. Give validation rows of "
                "their own, or how many to hold out, such as 20"
            )
        raise DataError("\n  ".join([f"found {found}", *split.problems()]))
    return split


def _write(
    folder: Path,
    sources: Sequence[Source],
    to_example: Format,
    examples: Examples,
    cap: int | None,
    progress: Say,
    side: Side | None = None,
    label: str = "",
) -> None:
    """Encode into a folder's files, with a few chunks of rows in memory at a time."""
    report, pending = Report(unit=getattr(examples, "unit", Report.unit)), []
    columns, losses = examples.columns, len(getattr(examples, "losses", (LOSS,)))

    def batch() -> pa.RecordBatch:
        return record_batch(pending, columns, losses)

    # A thread reports progress, because a single row may take longer than NEWS.
    total, unit, step = _work(sources, cap)
    with (
        _signs(lambda: progress(f"{report.read:,} rows")),
        process.bar(f"encode {label}", total, unit, scale=True) as bar,
        Summing(folder / ROWS) as file,
        pa.ipc.new_stream(file, schema(columns, losses)) as writer,
    ):
        for s, number, result, notes in _outcomes(
            sources, to_example, examples, cap, side, lambda row: bar.update(step(row))
        ):
            if report.kept == cap:
                break
            if result is None:
                continue
            report.read += 1
            for text, times in notes.items():
                report.notes[text] = report.notes.get(text, 0) + times
            if isinstance(result, RowProblem):
                report.drop(s, number, result.reason, str(result))
            else:
                report.kept += 1
                report.tokens += len(result.columns[next(iter(columns))])
                report.targets += result.counts[0]
                report.truncated += result.truncated
                pending.append((result, s, number))
            if len(pending) == CHUNK:
                writer.write_batch(batch())
                pending.clear()
        writer.write_batch(batch())
    report.save(folder / REPORT)
    save_sums(folder, file.blocks)


def _remove(folder: Path) -> None:
    """Take a folder of the cache away in one step. Processes that read it go on with what it had;
    a file of somebody else stays.
    """
    gone = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.damaged")
    with suppress(FileNotFoundError):  # another process came first
        folder.rename(gone)
        answers = [path.name for path in gone.glob(ANSWERS.format("*"))]
        for name in (ROWS, REPORT, SUMS, *answers):
            (gone / name).unlink(missing_ok=True)
        gone.rmdir()


def _work(
    sources: Sequence[Source], cap: int | None
) -> tuple[int | None, str, Callable[[SourceRow], int]]:
    """How much there is to encode, where that is known; its unit; and how much of it a row is."""
    counts = [one.count for one in sources]
    if cap is not None or None not in counts:
        return cap if cap is not None else sum(counts), "row", lambda row: 1
    if all(isinstance(one, JsonLines) and one.path.suffix == ".jsonl" for one in sources):
        return sum(one.size for one in sources), "B", lambda row: row.size
    return None, "row", lambda row: 1


@contextmanager
def _signs(give: Callable[[], None]) -> Iterator[None]:
    """Calls `give` every NEWS seconds until the block ends."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(NEWS):
            give()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _outcomes(
    sources: Sequence[Source],
    to_example: Format,
    examples: Examples,
    cap: int | None,
    side: Side | None,
    taken: Callable[[SourceRow], object],
) -> Iterator[tuple[int, int, Row | RowProblem | None, Notes]]:
    """(source, row number, what became of it, notes), in the order of the rows. The number of
    processes does not change the order.

    Args:
        taken: is told each row that is read.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    alone = (
        cores == 1
        or sum(one.size for one in sources) < PARALLEL
        or cap is not None
        and cap <= 16 * CHUNK
    )
    # Fresh processes: forking one that has threads (torch, tokenizers) can deadlock.
    spawn = multiprocessing.get_context("spawn")
    end = process.end_with_parent, (os.getpid(),)
    pool = None if alone else ProcessPoolExecutor(cores, spawn, *end)
    try:
        for s, one in enumerate(sources):
            rows = _told(one.rows(), taken)
            if pool is None:
                results = ([_outcome(row, to_example, examples, side)] for row in rows)
            else:
                results = _ahead(pool, _chunks(rows), to_example, examples, side, 2 * cores)
            for outcomes in results:
                yield from ((s, *outcome) for outcome in outcomes)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _told(rows: Iterator[SourceRow], taken: Callable[[SourceRow], object]) -> Iterator[SourceRow]:
    for row in rows:
        taken(row)
        yield row


def _chunks(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    """Up to CHUNK rows, fewer of long ones."""
    chunk: list[SourceRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK or sum(one.size for one in chunk) > LONG:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ahead(
    pool: ProcessPoolExecutor,
    chunks: Iterator[list[SourceRow]],
    to_example: Format,
    examples: Examples,
    side: Side | None,
    many: int,
) -> Iterator[list[Outcome]]:
    """Results in order, with `many` chunks under way. Executor.map would read the whole source
    first.
    """
    coming = deque(
        pool.submit(_encode, chunk, to_example, examples, side) for chunk in islice(chunks, many)
    )
    while coming:
        yield coming.popleft().result()
        coming.extend(
            pool.submit(_encode, chunk, to_example, examples, side) for chunk in islice(chunks, 1)
        )


def _encode(
    rows: Iterable[SourceRow], to_example: Format, examples: Examples, side: Side | None
) -> list[Outcome]:
    return [_outcome(row, to_example, examples, side) for row in rows]


def _outcome(row: SourceRow, to_example: Format, examples: Examples, side: Side | None) -> Outcome:
    notes: Notes = {}

    def note(text: str, times: int = 1) -> None:
        notes[text] = notes.get(text, 0) + times

    example = None
    try:
        example = example_of(row, to_example, note)
        other = side is not None and (_fraction(example) < side[0]) != side[1]
        if other:
            return row.number, None, {}
        # Notes are optional: the plainest `Examples` says nothing of rows that it keeps.
        told = {"note": note} if getattr(examples, "notes", False) else {}
        return row.number, examples.encode(example, **told), notes
    except RowProblem as problem:
        # A row that no format can read has no side. The training split reports it.
        lost = side is not None and side[1] and example is None
        return row.number, None if lost else problem, {}


def example_of(row: SourceRow, to_example: Format, note: Note = lambda text, times: None) -> Any:
    """What the format makes of a source's row. Raises RowProblem."""
    if row.value is None:
        raise RowProblem("unreadable", row.problem)
    value = row.value
    if row.columnar:
        renamed = getattr(to_example, "keywords", {}).get("tools")
        value = without_nulls(value, {"tools", "tool_calls", renamed})
    watched = Watched(value)
    try:
        example = to_example(watched)
    except RowProblem:
        raise
    except (
        Exception
    ) as error:  # a format of the user's own: one row it cannot take must not end the run
        raise RowProblem(
            "bad value", f"the format raises {type(error).__name__}: {error}"
        ) from error
    if row.note:
        note(row.note, 1)
    for key in sorted(watched.unread()):
        note(f"rows with the key {key}, which nothing reads", 1)
    return example


def _fraction(example: Any) -> float:
    """A number in [0, 1) that depends on an example's content alone.

    So copies stand on the same side of a split, and appended rows move no other row.
    """
    if type(example).__repr__ is object.__repr__:  # which names its place in memory
        raise DataError(
            f"found {type(example).__name__} from the format, whose repr does not show what it "
            "holds; wanted a dataclass, to hold out a part of the rows. Or name validation rows"
        )
    digest = hashlib.blake2b(repr(example).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _nearest(sources: Sequence[Source], to_example: Format, rows: int) -> float:
    """A fraction below which at least `rows` of these numbers lie."""
    found = []
    for row in (row for one in sources for row in one.rows()):
        with suppress(RowProblem):
            found.append(_fraction(example_of(row, to_example)))
    if len(found) <= rows:
        raise DataError(f"found {len(found):,} usable rows, wanted more than validation: {rows:,}")
    return sorted(found)[rows - 1] + 2**-53


def shared_rows(train: Encoded, validation: Encoded) -> int:
    """How many rows of `validation` equal a training row in all columns (tokens and targets)."""

    def content(split: Encoded, i: int) -> bytes:
        parts = [column.tobytes() for column in split.columns(i).values()]
        digest = hashlib.blake2b(repr([len(part) for part in parts]).encode())
        digest.update(b"".join(parts))
        return digest.digest()

    def looks(split: Encoded) -> np.ndarray:
        return np.rec.fromarrays([split.lengths, split.targets, split.answers])

    # Lengths and counts are at hand. Only rows that agree in these are read.
    maybe = np.flatnonzero(np.isin(looks(train), looks(validation)))
    seen = {content(train, i) for i in maybe.tolist()}
    return sum(bool(seen) and content(validation, i) in seen for i in range(len(validation)))


def _key(
    sources: Sequence[Source],
    to_example: Format,
    examples: Examples,
    cap: int | None,
    side: Side | None,
) -> str:
    function = getattr(
        to_example, "func", getattr(to_example, "target", to_example)
    )  # of a partial, a spec.Maker
    used = (function, type(examples))
    identity = {
        # The same bytes under another suffix are read in another way.
        "sources": [[type(one).__name__, one.fingerprint()] for one in sources],
        "format": [function.__module__, function.__qualname__, getattr(to_example, "keywords", {})],
        "examples": [type(examples).__qualname__, examples.identity],
        "cap": cap,
        "side": side,
        # We hash the code itself. Nobody needs to remember to raise a version number.
        "code": [
            module_hash(thing)
            for thing in (
                *used,
                *(_outcome, open_source, RowProblem, Encoder, Specials),
                *(find_turns, Report, Summing),
            )
        ],
        "imports": [_imports_hash(one.__module__) for one in used if not _is_ours(one)],
    }
    return hash_of(json.dumps(identity, sort_keys=True, default=repr))


def module_hash(thing: Callable[..., object]) -> str:
    """Equal for equal source of the module that has this function or class, comments aside."""
    try:
        return hash_of(_without_comments(inspect.getsource(sys.modules[thing.__module__])))
    except (OSError, TypeError, KeyError):  # typed in at a prompt, or compiled
        return ""


def _is_ours(thing: Callable[..., object]) -> bool:
    return thing.__module__.partition(".")[0] == __name__.partition(".")[0]


def _imports_hash(name: str) -> str:
    """Equal for equal source, comments aside, of a module and of what it imports of its package."""
    package, sources, ahead = name.partition(".")[0], {}, [name]
    while ahead:
        name = ahead.pop()
        if name in sources or name.partition(".")[0] != package:
            continue
        sources[name] = ""
        # Other errors than OSError: no module has this name, or it has no source.
        with suppress(OSError, ImportError, ValueError, AttributeError, TypeError, SyntaxError):
            path, parent = _file_of(name)
            source = path.read_text(encoding="utf-8")
            ahead += _imported(source, parent)
            sources[name] = _without_comments(source)
    return hash_of(json.dumps(sources, sort_keys=True))


def _file_of(name: str) -> tuple[Path, str]:
    """A module's file, and the package that its relative imports begin at. Looked for among files:
    to find a module by its spec would run the code of those above it.

    Raises:
        FileNotFoundError: no module, but an attribute of one.
    """
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # of a name without dots: runs nothing
    if not rest:
        return Path(spec.origin), spec.parent
    for root in spec.submodule_search_locations or ():
        base = Path(root, *rest)
        for path, parent in (
            (base / "__init__.py", name),
            (base.with_name(f"{base.name}.py"), name.rpartition(".")[0]),
        ):
            if path.is_file():
                return path, parent
    raise FileNotFoundError(name)


@functools.cache
def _imported(source: str, package: str) -> tuple[str, ...]:
    """The full names of what a module of the package imports, its attributes among them."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{each.name}" for each in node.names)]
    return tuple(names)


@functools.cache  # every split of a run asks it of the same few modules
def _without_comments(source: str) -> str:
    """Lines with something else than a comment, without the comments at their ends."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())
