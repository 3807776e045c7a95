"""A folder of ours is known by its mark, and whole by its manifest: any change of any file shows."""

import os
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.output import manifest


def make(folder: Path) -> Path:
    manifest.mark(folder, "checkpoint")
    (folder / "engine").mkdir()
    (folder / "engine" / "shard.pt").write_bytes(bytes(range(256)) * 20)
    (folder / "state.json").write_text("{}")
    (folder / "empty").touch()
    manifest.seal(folder)
    return folder


def test_sealed_says_size_and_checksum_of_every_file(tmp_path):
    folder = tmp_path / "a"
    manifest.mark(folder, "checkpoint")
    assert manifest.is_ours(folder, "checkpoint") and not manifest.is_whole(folder, "checkpoint")
    assert "does not say that the folder is complete" in manifest.damage(folder)[0]
    shutil.rmtree(folder)
    make(folder)
    assert manifest.is_whole(folder, "checkpoint") and not manifest.is_ours(folder, "export")
    assert manifest.damage(folder) == [] and manifest.strangers(folder) == []
    assert manifest._read(folder)["files"] == {
        "empty": [0, 0],
        "engine/shard.pt": [5120, zlib.crc32(bytes(range(256)) * 20)],
        "state.json": [2, zlib.crc32(b"{}")],
    }


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 5119), bit=st.integers(0, 7))
def test_any_flipped_bit_shows(at, bit, tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("flip"))
    shard = folder / "engine" / "shard.pt"
    content = bytearray(shard.read_bytes())
    content[at] ^= 1 << bit
    shard.write_bytes(content)
    assert manifest.damage(folder) == [f"{shard}: its content is not what was written (CRC-32)"]


def test_what_is_missing_cut_or_added_shows(tmp_path):
    folder = make(tmp_path / "a")
    os.truncate(folder / "engine" / "shard.pt", 5119)
    (folder / "state.json").unlink()
    (folder / "engine" / "notes").touch()
    assert manifest.damage(folder) == [
        f"{folder}/engine/shard.pt: found 5119 bytes, wanted 5120",
        f"{folder}/state.json: is missing",
    ]
    assert manifest.strangers(folder) == ["engine/notes"]
    parts = [manifest.damage(folder, part=(i, 2)) for i in range(2)]
    assert sorted(map(len, parts)) == [1, 1] or sum(map(len, parts)) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {}}', "\x00\x00"])
def test_a_damaged_manifest_is_nobodys_mark(tmp_path, text):
    folder = make(tmp_path / "a")
    (folder / manifest.NAME).write_text(text)
    assert not manifest.is_ours(folder, "checkpoint")
    with pytest.raises(AssertionError):
        manifest.discard(folder, "checkpoint")
    assert (folder / "engine" / "shard.pt").is_file()


def test_half_a_removal_is_ours_and_not_whole(tmp_path, monkeypatch):
    folder = make(tmp_path / "a")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.discard(folder, "checkpoint")
    monkeypatch.undo()
    assert manifest.is_ours(folder, "checkpoint") and not manifest.is_whole(folder, "checkpoint")
    manifest.discard(folder, "checkpoint")
    assert not folder.exists()
    manifest.discard(folder, "checkpoint")  # nothing there is fine
