"""Small files, written whole or not at all, and on the disk when the call returns."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def run_records(output: Path) -> dict[int, Path]:
    """Step -> what a start of the run from there wrote down, ascending."""
    resumed = {int(one.stem.rpartition("-")[2]): one for one in output.glob("run.resumed-*.json")}
    return dict(sorted({0: output / "run.json", **resumed}.items()))


def run_record(output: Path, before: int | None = None) -> Path:
    """Where the newest start of a run wrote down what it was.

    Args:
        before: the newest from before this step, whose checkpoint it made.
    """
    starts = reversed(run_records(output).items())
    return next(path for step, path in starts if not step or before is None or step < before)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)
