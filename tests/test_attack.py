"""A few of `make attack`'s tries. Of kills there are more in test_resume.py, of disks in test_disk.py."""

import random
from pathlib import Path

import attack
import pytest
import runs


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("attack"))


@pytest.fixture(scope="module")
def unharmed(yaml) -> Path:
    return attack.whole(yaml)


def test_every_file_of_a_checkpoint_is_found_however_it_is_harmed(unharmed):
    outcomes = attack.corrupt(unharmed / "checkpoints/step-00000012", random.Random(0))
    assert outcomes.keys() == {"found"} and outcomes["found"] > 60


def test_a_harmed_checkpoint_is_told_on_resume(yaml, unharmed):
    assert attack.resume_harmed(yaml, unharmed, random.Random(1)).endswith(": told")


@pytest.mark.slow  # a chain of runs
def test_a_chain_of_kills(yaml, unharmed):
    assert attack.kill(yaml, unharmed, random.Random(0)).endswith(" kills")


@pytest.mark.slow
def test_a_disk_that_fills_up(yaml, unharmed, tmp_path):
    try:
        with attack.small_disk(tmp_path / "small") as small:
            found = {attack.disk(yaml, unharmed, random.Random(seed), small) for seed in (0, 1)}
    except PermissionError as error:
        pytest.skip(str(error))
    assert found <= {"ended in words", "had room enough"} and "ended in words" in found
