"""One process builds a folder; all others that want it wait, on any host of the file system.

The lock spares work. It does not guard the data: every writer builds in a folder of its own and
renames that when it is whole. A wrongly judged lock would only do the work twice, and the first
rename would win.

Why not `filelock`: its `SoftFileLease` (tried: 4.2.11) notices dead and silent owners as we do. But
a thread of its own keeps an owner's lock alive, so one that hangs is waited for without end. Here
the lock tells of progress: it is what the waiting show, and what ends the wait. Nor does the lease
say since when it is held.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from mtl.data.encoded import DataError

POLL = 0.2  # seconds between looks at another process's lock
REMIND = 30.0  # seconds before a message about it, and between two
# Seconds without a change after which another host's lock counts as left behind: we cannot see its
# processes.
SILENT = 600.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """Who builds: the content of the lock file."""

    host: str
    pid: int
    # the process's start in the kernel's ticks, which tells a pid that is used again; "" where
    # unknown
    started: str
    since: str  # when the lock was taken, for people
    progress: str = (
        ""  # grows while the owner works; a lock that does not change for SILENT seconds is dead
    )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @property
    def who(self) -> tuple[str, int, str, str]:
        return self.host, self.pid, self.started, self.since

    @property
    def is_here(self) -> bool:
        """It runs, or ran, on this host."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """It ran on this host and does not any more."""
        return self.is_here and _ticks(self.pid) != self.started


def myself() -> Owner:
    """This process, from now on."""
    return Owner(
        socket.gethostname(),
        os.getpid(),
        _ticks(os.getpid()),
        datetime.now().isoformat(" ", "milliseconds"),
    )


def build_once(folder: Path, build: Callable[[Path, Say], None], say: Say) -> None:
    """Make sure that `folder` exists: build it, or wait for the process that does.

    Args:
        folder: made whole or not at all.
        build: fills the empty folder it is given. Every few seconds it calls its second argument
            with its progress, in a few words, which the waiting processes show.
        say: takes messages for people.

    Raises:
        what `build` raises; in a process that waited, a DataError with the same text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    me = myself()
    while not folder.exists():
        if take(lock, me):
            try:
                # Again: another owner may have finished between the two looks.
                if not folder.exists():
                    _build(folder, build, lock, me)
            finally:
                # Others may have judged us dead and taken over: then it is their lock.
                held = read(lock)
                if held and held.who == me.who:
                    lock.unlink(missing_ok=True)
        else:
            _wait(folder, lock, say)


def _build(folder: Path, build: Callable[[Path, Say], None], lock: Path, me: Owner) -> None:
    failure, partial = _failure(folder), _partial(folder, me)
    failure.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial, lambda progress: write(lock, replace(me, progress=progress)))
        partial.rename(folder)
    except BaseException as error:
        if folder.exists() and isinstance(error, OSError):
            return  # somebody else's rename came first
        failure.write_text(json.dumps({"who": me.who, "error": str(error) or type(error).__name__}))
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _wait(folder: Path, lock: Path, say: Say) -> None:
    """Wait until the lock is free: then the folder is there, or the work is ours. Raises DataError
    if the owner failed.
    """
    seen: Owner | None = None
    start = changed = said = time.monotonic()
    while (owner := read(lock)) is not None:
        now = time.monotonic()
        if owner != seen:
            seen, changed = owner, now
        if owner.gone or now - changed > SILENT:
            why = "no longer runs" if owner.gone else f"has given no sign for {SILENT:.0f} s"
            say(f"{owner} was encoding {folder} and {why}: this process does it now")
            shutil.rmtree(_partial(folder, owner), ignore_errors=True)
            lock.unlink(missing_ok=True)
            return
        if now - said > REMIND:  # not at once: it may be a rank of the same run
            say(
                f"waiting {now - start:.0f} s for {owner}, which is encoding "
                f"{owner.progress or folder}"
            )
            said = now
        time.sleep(POLL)
    failure = _failure(folder)
    if seen is not None and not folder.exists() and failure.exists():
        found = json.loads(failure.read_text())
        if tuple(found["who"]) == seen.who:
            raise DataError(f"{seen} failed: {found['error']}")


def take(lock: Path, me: Owner) -> bool:
    """Create the lock with its content in one step: a link, which is atomic on network file systems
    too.
    """
    ready = lock.with_name(f"{lock.name}.{me.host}.{me.pid}")
    ready.write_text(json.dumps(asdict(me)))
    try:
        os.link(ready, lock)
    except FileExistsError:
        return False
    finally:
        ready.unlink()
    return True


def write(lock: Path, me: Owner) -> None:
    ready = lock.with_name(f"{lock.name}.{me.host}.{me.pid}")
    ready.write_text(json.dumps(asdict(me)))
    ready.replace(lock)


def read(lock: Path) -> Owner | None:
    try:
        return Owner(**json.loads(lock.read_text()))
    except FileNotFoundError:
        return None


def _partial(folder: Path, owner: Owner) -> Path:
    return folder.with_name(f"{folder.name}.{owner.host}.{owner.pid}.partial")


def _failure(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.failed.json")


def _ticks(pid: int) -> str:
    """When a process of this host started; "gone" if there is none, "" where the system does not
    tell.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass  # another user's, and alive
    try:
        # Field 22. We count from the end of the command's name, which may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "gone" if state == "Z" else fields[18]  # Z: dead, and its parent has not noticed
    except FileNotFoundError:
        return "" if not Path("/proc/self/stat").exists() else "gone"
