"""Ranks that do not come, or fail before there is a process group: who, and soon."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import runs
from torch.distributed import TCPStore

from mtl import process
from mtl.distributed import rendezvous
from mtl.distributed.engine import init_process_group
from mtl.distributed.rendezvous import Meeting, RendezvousError


def meet(
    ranks: list[int], world: int, seconds: float, then=lambda meeting: None, port: int = 0
) -> tuple:
    """What each of some ranks, a thread each, said and raised."""
    said, raised, port = {rank: [] for rank in ranks}, {}, port or process.free_port()
    kept = []  # as a run keeps rank 0's store: it would end before a slow rank's last look

    def one(rank: int) -> None:
        try:
            meeting = Meeting(rank, world, "127.0.0.1", port, seconds, said[rank].append)
            kept.append(meeting)
            then(meeting)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said, raised


@pytest.fixture(autouse=True)
def sooner(monkeypatch):
    monkeypatch.setattr(rendezvous, "NEWS", 0.3)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_the_ranks_that_do_not_come_are_named():
    said, raised = meet([0, 2], 4, 1.5)
    assert set(said[0]) == {"waiting for ranks 1, 3 of 4 to come"} and not said[2]
    assert "ranks 1, 3 of 4 did not come within 2 s (engine.rendezvous_minutes)" in str(raised[0])
    assert isinstance(raised[2], RendezvousError)


def test_nobody_answers():
    said, raised = meet([1], 2, 1.0)
    assert "rank 1 of 2 found nobody at 127.0.0.1:" in str(raised[1])
    assert "Rank 0 has not started or has failed" in str(raised[1])
    assert said[1] and said[1][0].startswith("waiting for rank 0 at 127.0.0.1:")


def test_all_come_and_a_slow_one_is_waited_for():
    slow = threading.Event()

    def then(meeting: Meeting) -> None:
        if meeting.rank == 1:
            slow.wait(1.0)
        meeting.ready(60)

    said, raised = meet([0, 1, 2], 3, 60, then)
    late = [text for text in said[0] if "to come" not in text]  # a slow machine's ranks may be
    assert not raised and set(late) == {"waiting for rank 1 of 3 to read their data"}


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_is_heard_by_all(failing):
    def then(meeting: Meeting) -> None:
        with meeting.telling():
            if meeting.rank == failing:
                raise ValueError("no such file")
        meeting.ready(60)

    _, raised = meet([0, 1, 2], 3, 60, then)
    assert str(raised.pop(failing)) == "no such file" and len(raised) == 2
    assert {str(error) for error in raised.values()} == {f"rank {failing} failed: no such file"}


def test_a_restart_does_not_read_what_an_attempt_before_has_said(monkeypatch):
    """torchrun's agent keeps the store while it starts the ranks again. Agents of several hosts count their own
    restarts, so that these do not name an attempt."""
    port = process.free_port()
    limit = timedelta(seconds=30)
    agent = TCPStore("127.0.0.1", port, None, True, limit, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "FAREWELL", 0.1)

    def fail(meeting: Meeting) -> None:
        if meeting.rank == 1:  # torchrun ends the other one while it reads its data
            with meeting.telling():
                raise ValueError("no such file")

    _, raised = meet([0, 1], 2, 60, fail, port)
    assert str(raised.pop(1)) == "no such file" and not raised
    agent.add("asked", 1)  # one that was ended before it could ask
    _, raised = meet([1], 2, 0.5, port=port)  # and one before rank 0 came
    assert "rank 0 of 2 did not come to 127.0.0.1:" in str(raised[1])
    stores = []

    def well(meeting: Meeting) -> None:
        meeting.ready(60)
        stores.append(meeting.store)

    _, raised = meet([0, 1], 2, 60, well, port)
    assert not raised and not any(store.check(["failed"]) for store in stores)
    stores[0].set("common", "")
    stores[1].wait(["common"], limit)  # raises after that; a `set` does not wait for the store
    del agent


def test_several_ranks_need_a_port_that_all_know(monkeypatch):
    """Else each would invent its own and wait there."""
    monkeypatch.setattr(rendezvous, "_meeting", None)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_PORT: found nothing beside WORLD_SIZE=2, wanted"):
        rendezvous.meet(1)
    with pytest.raises(ValueError, match="MASTER_PORT: found nothing"):
        init_process_group(1)


def test_a_run_one_of_whose_ranks_lacks_a_file_ends_on_all(tmp_path):
    yaml: Path = runs.write(tmp_path)
    missing = ["--set", "tasks.copy.train=elsewhere.jsonl"]
    ended = runs.train(yaml, world=2, last=missing)
    assert ended.codes == [1, 1] and "Traceback" not in ended.err
    (told,) = [line for line in ended.err.splitlines() if "error: rank 1 failed: " in line]
    assert "tasks.copy.train" in told and not (tmp_path / "run").exists()
