"""One run a folder: `run.lock` in the output says who writes there, from the first look to the end.

Made by a hard link, which is atomic on local disks and NFS; a file system without links is refused
with a word. Tested on local disks only. A lock whose process is gone from this host is taken over
at once. On another host a process cannot be seen: its lock counts as left behind when it shows no
sign of life for SILENT seconds.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mtl import process
from mtl.data import lock
from mtl.data.lock import Owner
from mtl.distributed import comm
from mtl.output.checkpoint import UNTOUCHED, CheckpointError, no_folder

NAME = "run.lock"
BEAT = 10.0  # seconds between signs of life
SILENT = 120.0  # longer than network file systems remember a file's old content

Say = Callable[[str], None]


@contextmanager
def alone(output: Path, say: Say) -> Iterator[None]:
    """Hold the lock of a run's folder, on rank 0. A collective.

    Raises:
        CheckpointError: another run holds it, or the file system cannot lock.
    """
    path, done = output / NAME, threading.Event()
    mine = comm.on_first(lambda: acquire(path, say))
    if comm.rank() != 0:
        yield
        return
    beat = threading.Thread(target=_beat, args=(path, mine, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        held = lock.read(path)
        if held and held.who == mine.who:
            path.unlink()


def acquire(path: Path, say: Say) -> Owner:
    """Take the lock for this process. Raises as `alone`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in process.STORAGE:
            raise
        raise no_folder(path.parent, error) from error
    mine, seen, since = lock.myself(), None, time.monotonic()
    while True:
        try:
            if lock.take(path, mine):
                return mine
            owner = lock.read(path)
        except (OSError, ValueError, TypeError) as error:
            if getattr(error, "errno", None) in process.STORAGE:
                raise
            raise CheckpointError(
                f"{path}: cannot be taken ({error}). It needs a file system with hard links; a "
                "damaged lock may be removed once no run uses the folder."
            ) from error
        if owner is None:
            continue
        if owner.gone:
            _put_aside(path, owner, say, "does not run any more")
        elif owner.is_here or (seen and owner != seen):
            raise CheckpointError(
                f"output: {path.parent} is in use by {owner}. Wait for that run's end, or choose "
                f"another `output:`. {UNTOUCHED}"
            )
        elif time.monotonic() - since > SILENT:
            _put_aside(path, owner, say, f"gave no sign of life for {SILENT:.0f} s")
        else:
            if seen is None:
                say(f"{path}: held by {owner}; looking for a sign of life, {SILENT:.0f} s at most")
            seen = owner
            time.sleep(min(1.0, SILENT / 10))


def _put_aside(path: Path, owner: Owner, say: Say, why: str) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.left")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    moved = lock.read(aside)
    if moved and moved.who != owner.who:  # another process was quicker, and this is its lock
        os.link(aside, path)
    else:
        say(f"{path}: {owner} {why}; its lock is taken over")
    aside.unlink()


def _beat(path: Path, mine: Owner, done: threading.Event) -> None:
    beats = 0
    while not done.wait(BEAT):
        try:
            held = lock.read(path)
            if held and held.who == mine.who:
                beats += 1
                lock.write(path, replace(mine, progress=str(beats)))
                continue
        except (OSError, ValueError, TypeError):
            continue  # the file system's trouble: the others wait longer than one beat
        print(f"{path}: taken by {held}; this run ends, to write nothing more", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
