"""docs/guarantees.md on whole runs: each test breaks a run for real, and says what must be left of it."""

import os
import shutil
from pathlib import Path

import pytest
import runs
from safetensors.numpy import load_file

from mtl.output import manifest
from mtl.output.checkpoint import CheckpointError, check_output

OURS = "objective=outside:causal_lm"  # the usual one, from a module that can kill
SAVING = ["engine.zero=2", "checkpoint.every=4", "checkpoint.keep=3", "evaluate.every=100"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def whole(yaml) -> Path:
    """A run with the checkpoints of steps 4, 8 and 12."""
    output = yaml.parent / "whole"
    runs.train(yaml, OURS, *SAVING, f"output={output}", world=2).well()
    return output


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


# No user file is ever deleted or overwritten


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "run.json",
        "checkpoints/notes.txt",
        "checkpoints/step-00000004/notes.txt",
        "checkpoints/.resharded/notes.txt",
        "model/config.json",
    ],
)
def test_a_folder_with_files_of_others_is_refused(tmp_path, name, resume):
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("{}")
    with pytest.raises(CheckpointError, match=r"Nothing was changed\."):
        check_output(tmp_path, resume)
    assert theirs.read_text() == "{}"


def test_a_base_model_in_the_output_stays(yaml):
    """`model.name: proj/model` with `output: proj`: the export would take the base model's place."""
    project = yaml.parent / "project"
    copy(yaml.parent / "model", project / "model")
    before = runs.contents(project)
    ended = runs.train(yaml, f"model.name={project}/model", f"output={project}")
    assert ended.codes == [1] and f"{project}/model: found something without our mark" in ended.err
    assert runs.contents(project) == before


def test_an_export_somebody_worked_on_is_not_replaced(yaml, whole, tmp_path):
    for change in ("added", "changed"):
        output = copy(whole, tmp_path / change)
        theirs = output / "model" / ("notes.txt" if change == "added" else "README.md")
        theirs.write_text("mine")
        ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
        assert ended.codes == [1, 1] and str(theirs) in ended.err and theirs.read_text() == "mine"


# A checkpoint is whole or is not there


def test_a_flipped_bit_is_found_and_the_run_goes_on_from_the_step_before(yaml, whole, tmp_path):
    names = manifest.names(whole / "checkpoints" / "step-00000012")
    shard = next(n for n in names if "zero_pp_rank_1" in n)
    for i, name in enumerate((shard, "model/model.safetensors", "state.json")):
        output = copy(whole, tmp_path / str(i))
        folder = output / "checkpoints" / "step-00000012"
        flip(folder / name)
        before = runs.contents(output)
        ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
        assert ended.codes == [1, 1]
        assert f"{folder / name}: its content is not what was written" in ended.err
        assert f"{folder} is damaged." in ended.err and "--resume=8" in ended.err
        assert runs.contents(output) == before
    runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=8).well()
    assert runs.untimed(output) == runs.untimed(whole)
    there = [load_file(one / "model" / "model.safetensors") for one in (output, whole)]
    assert all((there[0][name] == tensor).all() for name, tensor in there[1].items())


def test_the_newest_good_checkpoint_is_named(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    for step, name in (12, "state.safetensors"), (8, "model/config.json"):
        os.truncate(output / "checkpoints" / f"step-{step:08d}" / name, 7)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
    assert ended.codes == [1, 1] and "--resume=4" in ended.err and "found 7 bytes" in ended.err


def test_a_truncated_model_is_not_exported(yaml, whole, tmp_path):
    from mtl.output.export import ExportError, export

    output = copy(whole, tmp_path / "run")
    folder = output / "checkpoints" / "step-00000012"
    os.truncate(folder / "model" / "model.safetensors", 1000)
    with pytest.raises(ExportError, match=r"model\.safetensors: found 1000 bytes"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()


# Small files too


def test_the_export_does_not_depend_on_log_and_record(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    with (output / "metrics.jsonl").open("r+") as log:
        log.write("{torn")
    os.truncate(output / "run.json", 20)
    shutil.rmtree(output / "model")
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert f"no table of the run: {output}/metrics.jsonl:1: found " in ended.err
    assert (output / "model/model.safetensors").is_file()


def test_a_missing_pointer_does_not_begin_again(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    (output / "checkpoints" / "latest").unlink()
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert "latest is missing" in ended.err and f"resuming from {output}" in ended.err
    assert runs.untimed(output) == runs.untimed(whole)


def test_a_torn_record_before_the_first_checkpoint(yaml, tmp_path):
    output = tmp_path / "run"
    runs.train(yaml, OURS, *SAVING, f"output={output}", MISFORTUNE="kill step 2 0")
    os.truncate(output / "run.json", 20)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", resume=True)
    assert ended.codes == [1] and f"{output}/run.json: is damaged" in ended.err


def test_a_step_beyond_the_last_one(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    folder = output / "checkpoints" / "step-00000012"
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"step": 12,', '"step": 13,', 1))
    manifest.seal(folder)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
    assert ended.codes == [1, 1] and "is of step 13, and the run has only 12 steps" in ended.err
