"""A disk that is full, or closed to us: the error says what is wanted, all ranks end, and nothing is lost."""

import errno
import os
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import attack
import pytest
import runs

from mtl import process
from mtl.output import manifest

OURS = ["objective=outside:causal_lm", "checkpoint={every: 4, keep: 3}", "evaluate.every=100"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def whole(yaml) -> Path:
    output = yaml.parent / "whole"
    runs.train(yaml, *OURS, f"output={output}", world=2).well()
    return output


@pytest.fixture
def small(tmp_path):
    """A file system of 24 MB, which only root can make."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(attack.small_disk(tmp_path / "small"))
        except PermissionError as error:
            pytest.skip(str(error))


def assert_ended_in_words(ended: runs.Ended, output: Path, path: str, why: str) -> None:
    """Both ranks; with path, room, and what to go on from."""
    assert ended.codes == [1, 1] and "Traceback" not in ended.err, ended.err
    told = f"error: .*{re.escape(str(output))}/{path}: cannot be written: .*{why}.* Free there: "
    last = "A checkpoint takes .* MB, as step-00000004 did: that is the last good one"
    assert re.search(f"{told}[0-9.,]+ MB. {last}", ended.err.replace(" [rank 1]", "")), ended.err
    assert re.search(r"error \[rank \d\]: rank \d failed: ", ended.err) or ended.err.count(why) > 1
    assert "Connection closed" not in ended.err
    assert (output / "checkpoints/latest").read_text() == "step-00000004"


CASES = {
    "shard of rank 0": ("shards 8 0", "engine.zero=2", "checkpoints/step-00000008/engine/.*"),
    "shard of rank 1": ("shards 8 1", "engine.zero=2", "checkpoints/.*zero_pp_rank_1_.*"),
    "shard at ZeRO 3": ("shards 8 1", "engine.zero=3", "checkpoints/.*zero_pp_rank_1_.*"),
    "model": ("model 8 0", "engine.zero=2", "checkpoints/step-00000008/model"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_too_large_ends_all_ranks(yaml, whole, case):
    """The limit stands for a quota: it is one process's own."""
    where, zero, path = CASES[case]
    output = yaml.parent / case
    settings = [*OURS, zero, f"output={output}"]
    strange = {"MISFORTUNE": f"limit {where}", "LIMIT": "100000"}
    ended = runs.train(yaml, *settings, world=2, **strange)
    assert_ended_in_words(ended, output, path, "File too large")
    if case == "shard of rank 1":  # half a checkpoint lies there
        runs.train(yaml, *settings, world=2, resume=True).well()
        assert runs.untimed(output) == runs.untimed(whole)


def test_a_full_disk(yaml, whole, small):
    output = small / "run"
    strange = {"MISFORTUNE": "fill step 5 0", "FILL": str(small)}
    ended = runs.train(yaml, *OURS, f"output={output}", world=2, **strange)
    assert_ended_in_words(ended, output, ".*", "No space left on device")
    # Still full, but for half a checkpoint at most: nothing is lost by trying.
    runs.train(yaml, *OURS, f"output={output}", world=2, resume=True)
    (small / "ballast").unlink()
    runs.train(yaml, *OURS, f"output={output}", world=2, resume=True).well()
    assert runs.untimed(output) == runs.untimed(whole)


def test_a_read_only_folder(yaml, small):
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    ended = runs.train(yaml, *OURS, f"output={small}/run", world=2)
    assert ended.codes == [1, 1] and "Traceback" not in ended.err
    told = f"{small}/run: cannot be written: Read-only file system. Free there: "
    assert f"error: {told}" in ended.err and "rank 0 failed: OSError: " in ended.err


def test_a_place_where_no_folder_can_be_made(yaml):
    ended = runs.train(yaml, *OURS, "output=/proc/x", world=2)
    assert ended.codes == [1, 1] and "Traceback" not in ended.err
    assert "error: output: found /proc/x, where nothing can be written (" in ended.err


def test_half_a_checkpoint_goes_without_a_byte_to_spare(tmp_path, monkeypatch):
    half, done = tmp_path / "half", tmp_path / "done"
    for folder in (half, done):
        manifest.mark(folder, "checkpoint")
        (folder / "shard").write_bytes(b"x")
    manifest.seal(done)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(manifest, "write_json", full)
    manifest.discard(half, "checkpoint")
    assert not half.exists()
    with pytest.raises(OSError, match="No space left"):  # a whole one is not left half unmarked
        manifest.discard(done, "checkpoint")
    assert manifest.is_whole(done, "checkpoint") and not manifest.damage(done)


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "written"), (errno.EROFS, "written"), (errno.EACCES, "read or written"),
     (errno.ECONNRESET, None)],
)  # fmt: skip
def test_an_error_of_the_disk_is_words_and_another_a_traceback(tmp_path, capsys, number, told):
    def fail() -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "no" / "file"))

    assert process.exit_code(fail) == 1
    err = capsys.readouterr().err
    assert ("Traceback" not in err) == bool(told)
    said = f"error: {tmp_path}/no/file: cannot be {told}: {os.strerror(number)}"
    assert (said in err) == bool(told)
