"""A run that waits says for whom, and goes on."""

import re
import threading
import time
from pathlib import Path

import pytest
import runs

from mtl.distributed import watchdog
from mtl.distributed.watchdog import Watchdog, summary


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("watchdog"))


def test_a_rank_that_sleeps_is_named_with_everybodys_stack(yaml):
    settings = ["objective=outside:causal_lm", "train.steps=4", "engine.watchdog_minutes=0.05"]
    strange = {"MISFORTUNE": "sleep step 2 1", "SLEEP": "12"}
    ended = runs.train(yaml, *settings, world=2, **strange).well()
    # On a loaded machine the start may stand still for as long.
    alarms = ended.err.split("watchdog: a process has stood at the same place for more than 3 s.")
    (told,) = (one for one in alarms[1:] if " in strike" in "".join(one.splitlines()[:3]))
    waits, missing = told.splitlines()[1:3]
    assert waits.startswith("  rank 0 waits in all_") and "mtl/" in waits
    assert missing.startswith("  rank 1 is missing: it is at ")
    assert missing.endswith(" in strike") and "outside.py:" in missing
    mine, theirs = (
        [line for line in ended.err.splitlines() if line.startswith(f"[rank {r}] ")] for r in (0, 1)
    )
    assert any("in train_step" in line for line in mine)
    assert any("in strike" in line for line in theirs)


def test_a_run_that_moves_says_nothing(yaml):
    output = f"output={yaml.parent}/quiet"
    ended = runs.train(yaml, output, "train.steps=6", "engine.watchdog_minutes=0.1", world=2)
    assert "watchdog: " not in ended.well().err


class Store:
    """What ranks share, of which rank 2 sees nothing."""

    def __init__(self):
        self.values = {}

    def compare_set(self, key, expected, value):
        return self.values.setdefault(key, value).encode()

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


@pytest.mark.parametrize("world", [2, 3])
def test_one_wait_is_one_alarm_and_a_rank_may_give_no_answer(monkeypatch, world):
    """Also where two ranks find at the same moment that they stand still."""
    monkeypatch.setattr(watchdog, "ANSWERS", 1.0)
    frames, store, said = watchdog._main_frames(), Store(), []
    monkeypatch.setattr(watchdog, "_main_frames", lambda: frames)
    ranks = [Watchdog(store, r, world, 0.2, said.append) for r in (0, 1)]

    def stand() -> None:
        both = [threading.Thread(target=looks, args=(one,)) for one in ranks]
        [thread.start() for thread in both]
        [thread.join() for thread in both]

    def looks(one: Watchdog) -> None:
        for _ in range(12):
            one.look()
            time.sleep(0.05)

    for wait in (1, 2):
        stand()
        assert len(said) == 3 * wait, said  # two stacks and a summary, though the wait went on
        told = said[-1]
        assert sum("] watchdog: at the same place" in one for one in said) == 2 * wait
        assert ("rank 2 gives no answer" in told) == (world == 3) and "rank 1 is at " in told
        assert "is missing" not in told  # none of them waits for another
        watchdog.tick()  # a collective has ended


def test_who_is_missing():
    waits = {"at": "loop.py:7 in train", "collective": "all_reduce"}
    found = {0: waits, 1: {"at": "disk.py:3 in read"}, 2: waits}
    lines = [line.strip() for line in summary(found, 4, 60).splitlines()]
    assert lines[1:5] == [
        "rank 0 waits in all_reduce, from loop.py:7 in train",
        "rank 1 is missing: it is at disk.py:3 in read",
        "rank 2 waits in all_reduce, from loop.py:7 in train",
        "rank 3 gives no answer: its process has ended or is stopped, or its host is away",
    ]


def test_a_collective_beyond_its_limit_ends_the_process_with_rank_and_step(monkeypatch):
    """The rest is tests/test_hosts.py's, where a host goes away in the middle of a sum."""
    frames, said, codes = watchdog._main_frames(), [], []
    monkeypatch.setattr(watchdog, "_main_frames", lambda: frames)
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    monkeypatch.setattr(watchdog, "_doing", "at step 3 of 9")

    def watched() -> list[int]:
        dog = Watchdog(None, 1, 2, 0.1, said.append, limit=0.1)
        monkeypatch.setattr(
            watchdog.os, "_exit", lambda code: [codes.append(code), dog._over.set()]
        )
        thread = threading.Thread(target=dog._end_late)
        thread.start()
        thread.join(1)
        dog._over.set()
        thread.join()
        return codes

    assert watched() == [], "it is in no collective"
    monkeypatch.setattr(watchdog, "place", lambda frames: {"at": "x", "collective": "all_reduce"})
    assert watched() == [1]
    assert re.match(r"rank 1 of 2 ends, at step 3 of 9: it has waited \d s in all_reduce ", said[0])
