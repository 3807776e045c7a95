"""A part of a sample set: built whole under a lock, or found whole."""

import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl.samples.archives import say, sha256


def whole(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest's note if `folder` was built by `key` and every file is as it was then; None if
    not.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["key"] != key:
            return None
        for name, (size, modified, digest) in manifest["files"].items():
            stat = (folder / name).stat()
            # Like git: an untouched time stamp spares the hash (half a second for the weights).
            if stat.st_size != size or (
                stat.st_mtime_ns != modified and sha256(folder / name) != digest
            ):
                return None
        return manifest["note"]
    except (OSError, ValueError, KeyError):
        return None


Build = Callable[[Path, Path], dict[str, Any]]
"""From the folder of archives to the files in an empty folder; it returns the note for the
manifest.
"""


def parts(folder: Path, builds: Mapping[str, Build]) -> list[dict[str, Any]]:
    """Build the parts of `folder` that are not whole, by name, under its lock. Returns their notes.

    Raises:
        BuildError: what the user has to do first.
    """
    with locked(folder):
        key = recipe()
        return [part(folder / name, build, key) for name, build in builds.items()]


def part(folder: Path, build: Build, key: str) -> dict[str, Any]:
    """The note of the part at `folder`, built in a temporary folder and renamed if it is not
    whole.
    """
    if (note := whole(folder, key)) is not None:
        return note
    say(
        f"{folder} is {'broken or of another version' if folder.exists() else 'not there'}: "
        "building it"
    )
    started = time.monotonic()
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # half made: its builder died, for the lock is ours
    fresh.mkdir()
    note = build(folder.parent / "archives", fresh)
    files = {}
    for path in sorted(fresh.iterdir()):
        files[path.name] = (path.stat().st_size, path.stat().st_mtime_ns, sha256(path))
    (fresh / "manifest.json").write_text(
        json.dumps({"key": key, "note": note, "files": files}, indent=1)
    )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    say(f"{folder} built in {time.monotonic() - started:.0f} s")
    return note


def recipe() -> str:
    """What decides the content of every part: this package's files, and the Python that is read."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    sums = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    digest = hashlib.sha256(sums.encode()).hexdigest()
    return f"{digest} Python {sys.version_info.major}.{sys.version_info.minor}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, and let one process at a time build in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system when we end, however we end
        yield
