"""A run that waits says for whom, and goes on."""

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
        self.counts, self.values = {}, {}

    def add(self, key, n):
        self.counts[key] = self.counts.get(key, 0) + n
        return self.counts[key]

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


def test_one_wait_is_one_alarm_and_a_rank_may_give_no_answer():
    store, said = Store(), []
    first, second = (Watchdog(store, r, 3, 0.3, said.append) for r in (0, 1))
    watched = [first, second]

    def stand() -> None:  # the looks come from one place, as if the thread made them
        for _ in range(16):
            for one in watched:
                one.look()
            time.sleep(0.05)

    frames = watchdog._main_frames()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_main_frames", lambda: frames)
        second_answers = Store.check
        patch.setattr(Store, "check", lambda s, keys: second.look() or second_answers(s, keys))
        stand()
        assert len(said) == 3, said  # two stacks and a summary, though the wait went on
        assert "[rank 0] watchdog: at the same place" in said[0] and "[rank 1]" in said[1]
        assert "rank 2 gives no answer" in said[2] and "is missing" not in said[2]
        watchdog.tick()
        stand()
        assert len(said) == 6, "another wait, another alarm"


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
