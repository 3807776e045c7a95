"""Meeting the other ranks before there is a process group, by keys in torch's TCPStore.

A process group is made when all ranks have come, and says nothing until then. Here each rank writes
its own key first. So who is missing has a name, and a rank that fails while it reads its data tells
the others, which would wait for it otherwise.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from mtl import process

NEWS = 10.0  # seconds between two signs of waiting
POLL = 0.1  # seconds between two looks
FAREWELL = 5.0  # seconds that a rank which fails waits until the others know


class RendezvousError(ValueError):
    """Ranks have not come, or one has failed before there was a group; the text names them."""


class Meeting:
    """One rank's view of who is there.

    Args:
        rank, world: this rank, and how many there are.
        host, port: where rank 0 (or torchrun's agent) keeps the store.
        seconds: how long to wait for all ranks to come.
        say: takes messages for people, on the lowest rank that is there.

    Raises:
        RendezvousError: not all ranks came within `seconds`; those missing are named.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        host: str,
        port: int,
        seconds: float,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.rank, self.world, self.where, self._say = rank, world, f"{host}:{port}", say
        deadline = time.monotonic() + seconds
        # torchrun's agent serves the store already.
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            self._find(host, port, deadline, seconds)
        try:
            store = TCPStore(
                host,
                port,
                world,
                serves,
                timedelta(seconds=max(30.0, NEWS)),
                wait_for_workers=False,
                multi_tenant=True,  # the process group's own store takes the same port later
            )
        except DistError as error:
            move = "Choose another MASTER_PORT (--master_port)." if serves else ""
            raise RendezvousError(
                f"rank {rank} cannot {'listen' if serves else 'speak'} at {self.where}: "
                f"{str(error).splitlines()[0]} {move}"
            ) from error
        limit = f"{seconds:.0f} s (engine.rendezvous_minutes)"
        # torchrun's agent keeps its store when it starts the ranks again: what they said before
        # stands under another name. Its count of restarts is none, as each host has its own.
        self._asked, self._unnamed = 0, set[int]()
        with self._connected():
            self._name = uuid.uuid4().hex if rank == 0 else self._ask(store, deadline, limit)
        self._common, self.store = store, PrefixStore(self._name, store)
        self._wait("come", deadline, limit)

    def ready(self, seconds: float) -> None:
        """Say that this rank is ready for a process group, and wait until all are.

        Raises:
            RendezvousError: a rank has failed, with its text; or not all were ready in time.
        """
        limit = f"{seconds:.0f} s (engine.timeout_minutes)"
        self._wait("read its data", time.monotonic() + seconds, limit)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Within, an error of this rank is told to the others, and ends their `ready`."""
        try:
            yield
        except Exception as error:
            try:
                self.store.set("failed", f"rank {self.rank} failed: {error}"[:2000])
                end = time.monotonic() + FAREWELL
                while self.store.add("heard", 0) < self.world - 1 and time.monotonic() < end:
                    time.sleep(POLL)  # the store may end with this process
            except (DistError, RuntimeError):
                pass  # the others have gone
            raise

    def _find(self, host: str, port: int, deadline: float, seconds: float) -> None:
        """Wait until the store answers: torch's own client warns at each try."""
        news = time.monotonic() + NEWS
        while True:
            try:
                socket.create_connection((host, port), timeout=NEWS).close()
                return
            except OSError as error:
                now = time.monotonic()
                if now > deadline:
                    raise RendezvousError(
                        f"rank {self.rank} of {self.world} found nobody at {self.where} in "
                        f"{seconds:.0f} s (engine.rendezvous_minutes): {error}. Rank 0 has not "
                        "started or has failed: look at its output. Or MASTER_ADDR and "
                        "MASTER_PORT are wrong, or a firewall stands between the hosts."
                    ) from error
                if now > news:
                    if process.is_first_on_host():
                        self._say(f"waiting for rank 0 at {self.where} ({error})")
                    news += NEWS
                time.sleep(POLL)

    def _ask(self, store: Store, deadline: float, limit: str) -> str:
        """The name of this start of all ranks, which rank 0 gives."""
        mine = uuid.uuid4().hex
        store.set(f"ask/{store.add('asked', 1)}", mine)
        news = time.monotonic() + NEWS
        while not store.check([f"name/{mine}"]):
            now = time.monotonic()
            if now > deadline:
                raise RendezvousError(
                    f"rank 0 of {self.world} did not come to {self.where} within {limit}. Look at "
                    "its output, and start all again."
                )
            if now > news:
                if process.is_first_on_host():
                    self._say(f"waiting for rank 0 of {self.world} to come")
                news = now + NEWS
            time.sleep(POLL)
        return store.get(f"name/{mine}").decode()

    def _answer(self) -> None:
        """Give this start's name to the ranks that ask for it, of an earlier start too."""
        asked = self._common.add("asked", 0)
        self._unnamed |= set(range(self._asked + 1, asked + 1))
        self._asked = asked
        # One that has counted itself writes its key a moment later, or has ended before.
        for n in [n for n in self._unnamed if self._common.check([f"ask/{n}"])]:
            self._common.set(f"name/{self._common.get(f'ask/{n}').decode()}", self._name)
            self._unnamed.remove(n)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise RendezvousError(
                f"rank {self.rank} of {self.world} lost the connection to {self.where}: rank 0 "
                "has ended, its output says why."
            ) from error

    def _wait(self, what: str, deadline: float, limit: str) -> None:
        """Write this rank's key for `what`, and wait for those of all."""
        with self._connected():
            self.store.set(f"{what}/{self.rank}", socket.gethostname())
            self.store.add(what, 1)
            news = time.monotonic() + NEWS
            while self.store.add(what, 0) < self.world:
                if self.rank == 0:
                    self._answer()
                # Another rank has failed: it waits a moment for those who hear it.
                if self.store.check(["failed"]):
                    self.store.add("heard", 1)
                    raise RendezvousError(self.store.get("failed").decode())
                now = time.monotonic()
                # Looking for every rank's key is slow, so only now and then.
                if now > min(news, deadline):
                    missing = [r for r in range(self.world) if not self._has(what, r)]
                    if now > deadline and missing:
                        raise RendezvousError(
                            f"{_ranks(missing)} of {self.world} did not {_base(what)} within "
                            f"{limit}; the others met at {self.where}. Look at the missing ranks' "
                            "output, and start all again."
                        )
                    if missing and self.rank == min(set(range(self.world)) - set(missing)):
                        self._say(f"waiting for {_ranks(missing)} of {self.world} to {_base(what)}")
                    news = now + NEWS
                time.sleep(POLL)

    def _has(self, what: str, rank: int) -> bool:
        return self.store.check([f"{what}/{rank}"])


def _base(what: str) -> str:
    return what.replace("its", "their")


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 20} more" if len(ranks) > 20 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:20]))}{more}"


_meeting: Meeting | None = None


def meet(minutes: float, say: Callable[[str], None] = lambda text: None) -> Meeting | None:
    """Meet the ranks that the launcher's variables announce, once in a process; None alone.

    Raises:
        RendezvousError: as `Meeting`; or no MASTER_PORT tells where.
    """
    global _meeting
    e = os.environ
    world = int(e.get("WORLD_SIZE", "1"))
    if _meeting is None and world > 1:
        if "MASTER_PORT" not in e:
            raise RendezvousError(
                f"MASTER_PORT: found nothing beside WORLD_SIZE={world}, wanted a free port of "
                "rank 0's host, alike on all ranks, such as 29500. Set it, or start with torchrun, "
                "deepspeed, accelerate, srun or mpirun, which do."
            )
        host, port = e.get("MASTER_ADDR", "127.0.0.1"), int(e["MASTER_PORT"])
        _meeting = Meeting(int(e["RANK"]), world, host, port, minutes * 60, say)
    return _meeting


@contextmanager
def telling() -> Iterator[None]:
    """`Meeting.telling` of this process's meeting; alone, nothing."""
    if _meeting is None:
        yield
        return
    with _meeting.telling():
        yield
