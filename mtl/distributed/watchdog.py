"""Says what a run waits for. Where one process has stood at the same place for long, all of them
print where they are, and the first names those that have not come. A process in a collective for
longer than that may take is ended: gloo does not always end a sum whose other side is away.

A thread looks at the main thread's stack now and then. It has not moved where the same calls stand
at the same instructions and no collective of ours has ended since. Ranks hear of each other through
the store in which they met at the start, which needs none of their main threads.
"""

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

LOOKS, SELDOM = 6, 5.0  # looks in the time that a wait may take; at most so many seconds apart
ANSWERS = 12.0  # seconds in which the others say where they are
COLLECTIVES = "torch/distributed/distributed_c10d.py"
ASIDE = (
    "/site-packages/",
    "mtl/distributed/comm.py",
)  # whose lines say little about where a rank is

GRACE = 30.0  # seconds beyond a collective's own limit
_ended, _doing = 0, "before the first step"


def doing(what: str) -> None:
    """Note where the run is, for what is said when it ends here."""
    global _doing
    _doing = what


def where() -> str:
    """Where the run is, as `doing` was told."""
    return _doing


def tick() -> None:
    """A collective has ended: the main thread has moved."""
    global _ended
    _ended += 1


class Stood:
    """How long the main thread has been where it is."""

    def __init__(self) -> None:
        self._where: object = None
        self._since = time.monotonic()

    def look(self) -> tuple[list[FrameType], float, bool]:
        """Its stack, the seconds since it was first seen there, and whether it has moved since the
        last look.
        """
        frames = _main_frames()
        where = _ended, *((id(frame.f_code), frame.f_lasti) for frame in frames)
        has_moved = where != self._where
        if has_moved:
            self._where, self._since = where, time.monotonic()
        return frames, time.monotonic() - self._since, has_moved


class Watchdog:
    """One rank's watch.

    Args:
        store: what the ranks of this start share (`Meeting.store`); None: this process is alone.
        seconds: how long the main thread may stand still.
        say: takes messages for people.
        limit: seconds after which a collective should have failed by itself.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        seconds: float,
        say: Callable[[str], None],
        limit: float = float("inf"),
    ):
        self.store, self.rank, self.world, self.seconds, self._say = (
            store,
            rank,
            world,
            seconds,
            say,
        )
        self.alarms = 0  # of all ranks, as far as known here
        self._every = min(seconds / LOOKS, SELDOM)
        self._stood, self._told, self._limit = Stood(), False, limit
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._end = threading.Thread(target=self._end_late, name="watchdog's end", daemon=True)

    def start(self) -> None:
        atexit.register(self.stop)  # a thread within the store may not outlive the interpreter
        self._thread.start()
        self._end.start()

    def stop(self) -> None:
        self._over.set()
        for thread in (self._thread, self._end):
            thread.join(SELDOM)

    def _end_late(self) -> None:
        """In a thread of its own, which asks nothing of a store: its host may be away."""
        stood = Stood()
        while not self._over.wait(self._every):
            frames, seconds, _ = stood.look()
            waits_in = place(frames).get("collective")
            if waits_in and seconds > self._limit + GRACE:
                self._say(
                    f"rank {self.rank} of {self.world} ends, {_doing}: it has waited {seconds:.0f} "
                    f"s in {waits_in} (engine.timeout_minutes). Another rank or its host is away; "
                    "--resume goes on with what is left."
                )
                os._exit(1)  # the main thread cannot be woken

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            try:
                self.look()
            except RuntimeError:  # DistError among them: rank 0 has ended, and the store with it
                self.store = None

    def look(self) -> None:
        """Raise the alarm where the main thread stands still; answer where another rank has."""
        frames, stood, has_moved = self._stood.look()
        self._told = self._told and not has_moved
        is_stuck = stood > self.seconds and not self._told
        if not is_stuck and not self._is_raised():
            return
        # Ranks that wait for each other find it at the same time: one of them raises the alarm.
        me = str(self.rank)
        raiser = self.store.compare_set(self._alarm(), "", me).decode() if self.store else me
        self._answer(frames, stood)
        if raiser == me:
            self._say(summary(self._answers(place(frames)), self.world, self.seconds))

    def _alarm(self) -> str:
        """The key of the next alarm: who raised it."""
        return f"watchdog/{self.alarms + 1}"

    def _is_raised(self) -> bool:
        return self.store is not None and self.store.check([self._alarm()])

    def _answer(self, frames: list[FrameType], stood: float) -> None:
        """Print where this rank is, and let the others know."""
        self.alarms, self._told = self.alarms + 1, True
        lines = "".join(traceback.StackSummary.extract((f, f.f_lineno) for f in frames).format())
        text = f"[rank {self.rank}] watchdog: at the same place for {stood:.0f} s:\n{lines}"
        self._say(text.replace("\n", f"\n[rank {self.rank}] ").removesuffix(f"[rank {self.rank}] "))
        if self.store:
            self.store.set(f"watchdog/{self.alarms}/{self.rank}", json.dumps(place(frames)))

    def _answers(self, mine: dict[str, str]) -> dict[int, dict[str, str]]:
        """The `place` of each rank that answers before long."""
        found, deadline = {self.rank: mine}, time.monotonic() + ANSWERS
        while self.store and len(found) < self.world and time.monotonic() < deadline:
            for rank in set(range(self.world)) - set(found):
                key = f"watchdog/{self.alarms}/{rank}"
                if self.store.check([key]):
                    found[rank] = json.loads(self.store.get(key))
            time.sleep(0.05)
        return found


def place(frames: list[FrameType]) -> dict[str, str]:
    """Where a stack, outermost first, stands; and in which collective, if it waits in one."""
    known = [f for f in frames if COLLECTIVES in f.f_code.co_filename]
    names = [f.f_code.co_name for f in known if f.f_code.co_name != "wrapper"]
    telling = [f for f in frames if not any(part in f.f_code.co_filename for part in ASIDE)]
    inner = (telling if names and telling else frames)[-1]
    at = f"{inner.f_code.co_filename}:{inner.f_lineno} in {inner.f_code.co_name}"
    return {"at": at} | ({"collective": names[0]} if names else {})


def summary(found: dict[int, dict[str, str]], world: int, seconds: float) -> str:
    """Who waits and who is missing, from each rank's `place`; a rank without one gave no answer."""
    waits = [r for r in sorted(found) if "collective" in found[r]]
    lines = [f"watchdog: a process has stood at the same place for more than {seconds:.0f} s."]
    for rank in range(world):
        if rank not in found:
            text = "gives no answer: its process has ended or is stopped, or its host is away"
        elif rank in waits:
            text = f"waits in {found[rank]['collective']}, from {found[rank]['at']}"
        else:
            text = f"{'is missing: it ' * bool(waits)}is at {found[rank]['at']}"
        lines.append(f"rank {rank} {text}")
    lines.append("Each rank's stack stands in its own output. The run waits on.")
    return "\n  ".join(lines)


def _main_frames() -> list[FrameType]:
    """The main thread's stack, outermost first."""
    frame, frames = sys._current_frames()[threading.main_thread().ident], []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


_dog: Watchdog | None = None


def start(
    store: Any,
    rank: int,
    world: int,
    minutes: float | None,
    say: Callable[[str], None],
    limit_minutes: float = float("inf"),
) -> None:
    """Watch this process from now on, until `stop`; None: not at all."""
    global _dog
    stop()
    if minutes is not None:
        _dog = Watchdog(store, rank, world, minutes * 60, say, limit_minutes * 60)
        _dog.start()


def stop() -> None:
    """Watch no more."""
    global _dog
    if _dog is not None:
        _dog.stop()
        _dog = None
