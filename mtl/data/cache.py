"""The encoded cache: every split of every task as token ids on disk, made once and memory-mapped.

A split's folder is named by a hash of everything that decides its content: the sources' bytes, the
tokenizer with its chat template, the format with its keywords, the length policy, the cap, and the
code that encodes. It holds `rows.arrow` (Arrow's stream format, a row an example;
`datasets.Dataset.from_file` reads it too) and `report.json`.
"""

import inspect
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mtl.config import Config
from mtl.data.encode import Encoder, hash_of
from mtl.data.encoded import DataError, Encoded, Report, TaskData, record_batch, schema
from mtl.data.examples import LOSS, Examples
from mtl.data.examples import Row as EncodedRow
from mtl.data.formats import Format, RowProblem
from mtl.data.lock import Say, build_once
from mtl.data.source import Row, Source, open_source

CHUNK = 256  # rows that are encoded at once, and written as one Arrow batch
PARALLEL = 2**25  # bytes of source above which starting processes, seconds each, is worth it
NEWS = 10.0  # seconds between two signs of progress

Outcome = tuple[int, EncodedRow | RowProblem]  # a row's number, and what became of it


def prepare(
    config: Config,
    examples: Mapping[str, Examples],
    formats: Mapping[str, Format],
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[TaskData]:
    """Both splits of every task, encoded: read from `config.cache` if they are there, else made.

    Every process calls this; one of them encodes a split, the others wait. No process group is
    needed, and none should exist yet: its collectives would time out meanwhile.

    Args:
        examples: how each stream's rows are encoded.
        formats: each stream's format, its keywords bound.
        say: takes messages for people: what is encoded, and what is waited for.

    Returns: the streams in the order of `config.tasks`.

    Raises: DataError with every problem of every task.
    """
    root, problems, tasks = Path(config.cache).expanduser(), [], []
    for name, task in config.streams.items():
        splits = []
        for split, names, cap in (
            ("train", task.train, task.cap),
            ("validation", task.validation, task.validation_cap),
        ):
            try:
                sources = [open_source(one, split) for one in names]
                splits.append(
                    encode_split(
                        root, sources, formats[name], examples[name], cap, f"{name} ({split})", say
                    )
                )
            except DataError as error:
                problems.append(
                    f"{config.where(('tasks', name, split))}: tasks.{name}.{split}: {error}"
                )
        tasks.append((name, splits))
    if problems:
        raise DataError("\n".join(problems))
    return [TaskData(name, *splits) for name, splits in tasks]


def encode_split(
    root: Path,
    sources: Sequence[Source],
    to_example: Format,
    examples: Examples,
    cap: int | None,
    label: str,
    say: Say,
) -> Encoded:
    """The rows of `sources`, one source after the other, encoded; from the cache under `root` if it
    has them.

    Args: cap: keep the first so many usable rows, in the order of the sources, and read no further;
        None = all. label: what to call it in messages.

    Raises: DataError if a source cannot be read, no row is left, or a row is too long and
    `too_long: error` holds.
    """
    key = _key(sources, to_example, examples, cap)
    folder = root / key
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
            )

        build_once(folder, build, say)
    split = Encoded.open(
        folder, [one.where for one in sources], key, examples.columns, examples.positions
    )
    long = split.report.dropped.get("too long", 0)
    if len(split) == 0 or getattr(examples, "too_long", "drop") == "error" and long:
        found = (
            "no usable row"
            if len(split) == 0
            else f"{long:,} rows above batch.max_length, with too_long: error"
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
) -> None:
    """Encode into `rows.arrow` and `report.json`; no more than a few chunks of rows are in memory
    at a time.
    """
    report, pending, told = Report(), [], time.monotonic()
    columns, losses = examples.columns, len(getattr(examples, "losses", (LOSS,)))

    def batch() -> pa.RecordBatch:
        return record_batch(pending, columns, losses)

    def writing(file: Any) -> Any:
        return pa.ipc.new_stream(file, schema(columns, losses))

    with (folder / "rows.arrow").open("wb") as file, writing(file) as writer:
        for s, number, result in _outcomes(sources, to_example, examples, cap):
            if report.kept == cap:
                break
            report.read += 1
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
            if time.monotonic() - told > NEWS:
                told = time.monotonic()
                progress(f"{report.read:,} rows")
        writer.write_batch(batch())
    report.save(folder / "report.json")


def _outcomes(
    sources: Sequence[Source], to_example: Format, examples: Examples, cap: int | None
) -> Iterator[tuple[int, int, EncodedRow | RowProblem]]:
    """(source, row number, what became of it), in the order of the rows however many processes
    work.
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
    pool = None if alone else ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    try:
        for s, one in enumerate(sources):
            rows = one.rows()
            chunks = iter(lambda rows=rows: list(islice(rows, CHUNK)), [])
            if pool is None:
                results = (_encode(chunk, to_example, examples) for chunk in chunks)
            else:
                results = _ahead(pool, chunks, to_example, examples, 2 * cores)
            for outcomes in results:
                yield from ((s, number, result) for number, result in outcomes)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ProcessPoolExecutor,
    chunks: Iterator[list[Row]],
    to_example: Format,
    examples: Examples,
    many: int,
) -> Iterator[list[Outcome]]:
    """Results in order, `many` chunks being under way: Executor.map would read the whole source
    first.
    """
    coming = deque(
        pool.submit(_encode, chunk, to_example, examples) for chunk in islice(chunks, many)
    )
    while coming:
        yield coming.popleft().result()
        coming.extend(
            pool.submit(_encode, chunk, to_example, examples) for chunk in islice(chunks, 1)
        )


def _encode(rows: Sequence[Row], to_example: Format, examples: Examples) -> list[Outcome]:
    return [(row.number, _encode_row(row, to_example, examples)) for row in rows]


def _encode_row(row: Row, to_example: Format, examples: Examples) -> EncodedRow | RowProblem:
    if row.value is None:
        return RowProblem("unreadable", row.problem)
    try:
        example = to_example(row.value)
    except RowProblem as problem:
        return problem
    except (
        Exception
    ) as error:  # a format of the user's own: one row it cannot take must not end the run
        return RowProblem("bad value", f"the format raises {type(error).__name__}: {error}")
    try:
        return examples.encode(example)
    except RowProblem as problem:
        return problem


def _key(sources: Sequence[Source], to_example: Format, examples: Examples, cap: int | None) -> str:
    function = getattr(
        to_example, "func", getattr(to_example, "target", to_example)
    )  # of a partial, a spec.Maker
    identity = {
        "sources": [one.fingerprint() for one in sources],
        "format": [function.__module__, function.__qualname__, getattr(to_example, "keywords", {})],
        "examples": [type(examples).__qualname__, examples.identity],
        "cap": cap,
        # The code itself instead of version numbers that someone would have to remember to raise.
        "code": [
            _module_hash(thing)
            for thing in (function, open_source, RowProblem, Encoder, Report, type(examples))
        ],
    }
    return hash_of(json.dumps(identity, sort_keys=True, default=repr))


def _module_hash(thing: Callable[..., object]) -> str:
    try:
        return hash_of(inspect.getsource(sys.modules[thing.__module__]))
    except (OSError, TypeError, KeyError):  # typed in at a prompt, or compiled
        return ""
