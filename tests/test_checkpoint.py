"""What `latest` names: the newest complete checkpoint, or a clear error where somebody removed it."""

import pytest

from mtl.output.checkpoint import CheckpointError, Checkpoints


def test_latest_names_a_complete_checkpoint_or_says_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, {}, None, {"processes": 1, "zero": 2})
    assert checkpoints.latest() is None
    folder = tmp_path / "checkpoints"
    for name in ("step-00000005", "step-00000010"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    (folder / "latest").write_text("step-00000010\n")
    assert checkpoints.latest() == folder / "step-00000010"
    (folder / "step-00000010" / "state.json").unlink()
    with pytest.raises(CheckpointError) as found:
        checkpoints.latest()
    assert str(found.value) == (
        f"{folder}/latest: found step-00000010, wanted the name of a complete checkpoint: {folder}/step-00000010/state.json does "
        "not exist. Write one of ['step-00000005'] into it."
    )
    (folder / "step-00000005" / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match="There is none: start a new run in another `output:` folder.$"
    ):
        checkpoints.latest()
