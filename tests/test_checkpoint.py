"""What `latest` names, and what --resume=STEP takes: a complete checkpoint, or a clear error."""

import os
from pathlib import Path

import pytest

from mtl.output import manifest
from mtl.output.checkpoint import CHECKPOINT, CheckpointError, Checkpoints


def complete(folder: Path) -> Path:
    manifest.mark(folder, CHECKPOINT)
    (folder / "state.json").write_text("{}")
    manifest.seal(folder)
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    said: list[str] = []
    made = Checkpoints(tmp_path, 2, {}, None, {"processes": 1, "zero": 2}, say=said.append)
    made.said = said
    assert made.find() is None
    for step in (5, 10, 15):
        complete(made.folder / f"step-{step:08d}")
    (made.folder / "latest").write_text("step-00000010\n")
    return made


def test_latest_names_a_complete_checkpoint_or_says_what_to_do(checkpoints):
    folder = checkpoints.folder
    assert checkpoints.find() == folder / "step-00000010"
    manifest.mark(folder / "step-00000010", CHECKPOINT)  # no longer sealed
    with pytest.raises(CheckpointError) as found:
        checkpoints.find()
    assert str(found.value) == (
        f"{folder}/latest: names '{folder}/step-00000010', wanted a complete checkpoint. "
        "There are those of steps 5, 15: go on from one with --resume=STEP."
    )
    for name in ("step-00000005", "step-00000015"):
        manifest.discard(folder / name, CHECKPOINT)
    with pytest.raises(
        CheckpointError, match="There is none: start a new run in another `output:` folder.$"
    ):
        checkpoints.find()


@pytest.mark.parametrize("text", ["", "\x00\xff", "../../etc", "step-00000099"])
def test_a_torn_pointer_is_an_error(checkpoints, text):
    (checkpoints.folder / "latest").write_text(text)
    with pytest.raises(
        CheckpointError, match="latest: names .* There are those of steps 5, 10, 15"
    ):
        checkpoints.find()


def test_a_missing_pointer_is_repaired_with_a_word(checkpoints):
    (checkpoints.folder / "latest").unlink()
    assert checkpoints.find() == checkpoints.folder / "step-00000015"
    assert "latest is missing" in checkpoints.said[0]


def test_a_step_that_is_asked_for(checkpoints):
    assert checkpoints.find(5) == checkpoints.folder / "step-00000005"
    with pytest.raises(CheckpointError, match="--resume=7: found no complete checkpoint"):
        checkpoints.find(7)


def test_all_is_on_the_disk_before_the_pointer_moves(checkpoints, monkeypatch):
    """A power cut loses what was not flushed: SIGKILL loses nothing of the kind."""
    folder, done = checkpoints.folder / "step-00000020", []
    manifest.mark(folder, CHECKPOINT)
    (folder / "engine").mkdir()
    (folder / "engine" / "shard").write_text("x")
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def move(path: Path, target: Path) -> None:
        done.append(f"to {target}")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", move)
    manifest.seal_together(folder)
    checkpoints._point_and_prune(folder.name)
    sealed, pointed = f"to {folder}/{manifest.NAME}", f"to {checkpoints.folder}/latest"
    before, after = done[: done.index(sealed)], done[done.index(sealed) : done.index(pointed)]
    assert {f"{folder}/engine/shard", f"{folder}/engine"} < set(before)
    assert before[-1] == f"{folder}/.{manifest.NAME}.tmp", "content before name"
    assert after[1:] == [str(folder), str(checkpoints.folder), f"{checkpoints.folder}/.latest.tmp"]


def test_pruning_takes_ours_only(checkpoints):
    """Also what half a prune and half a save left; never a folder of the user's, nor one with a file of theirs."""
    folder = checkpoints.folder
    (folder / "step-notes").mkdir()
    (folder / "step-notes" / "thesis.tex").touch()
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "theirs").touch()
    (complete(folder / "step-00000002") / "theirs").touch()
    manifest.mark(folder / "step-00000003", CHECKPOINT)  # half
    checkpoints._point_and_prune("step-00000010")
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    assert left == {
        "step-00000005", "step-00000010", "step-notes", "step-00000001", "step-00000002",
    }  # fmt: skip
    assert checkpoints.said == [
        f"{folder}/step-00000002 stays: it holds theirs, which we did not write"
    ]
