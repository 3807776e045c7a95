"""A folder's `coba-mtl.json`: the mark that it is ours, and what it must hold to be whole.

The mark is the first file written into a folder, so half a folder is known as ours too. The folder
is sealed when everything else is on the disk: then the file lists every other file's size and
CRC-32. That finds damage by accident, any flipped bit among it; it is no defence against a forger.
Only folders with the mark are ever removed.

Cost, measured on 2 cores: CRC-32 reads 2.4 GB/s (Adler-32 2.8, SHA-256 1.8, BLAKE2b 0.8). With
reading the files again it was a tenth of a save of 1.35 GB by one process; ranks share the files.
"""

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl import process
from mtl.distributed import comm
from mtl.output.files import flush, write_json

NAME = "coba-mtl.json"
BLOCK = 1 << 22  # bytes read at once

Measured = dict[str, tuple[int, int]]  # a file's path in the folder -> its size, its CRC-32


def mark(folder: Path, kind: str) -> None:
    """Say that a folder is ours, and not (or no longer) whole. It is made if it is missing.

    Args:
        kind: what it holds: "run", "checkpoint", "export" ...
    """
    write_json(folder / NAME, {"made by": "coba-mtl", "kind": kind, "files": None})


def is_ours(folder: Path, kind: str) -> bool:
    """Whether we made the folder, whole or not."""
    return _read(folder).get("kind") == kind


def is_whole(folder: Path, kind: str) -> bool:
    """Whether the folder was sealed. `damage` says whether it still is what it was then."""
    found = _read(folder)
    return found.get("kind") == kind and isinstance(found.get("files"), dict)


def is_free(folder: Path) -> bool:
    """Whether nothing stands at this path, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def seal(folder: Path) -> None:
    """Put a marked folder's files on the disk, then write down their sizes and checksums."""
    _write(folder, measure(folder, names(folder)))


def seal_together(folder: Path) -> None:
    """`seal` with the files divided among the ranks. A collective.

    Raises:
        OSError: a rank does not see a file of another one: `output` is not the same folder there.
    """
    # The union: a network file system may show a rank's new file to the others later.
    found = comm.gather(comm.together(lambda: names(folder)))
    every = sorted({name for each in found for name in each})
    mine = comm.together(lambda: measure(folder, every[comm.rank() :: comm.world()]))
    parts = comm.gather(mine)
    comm.together(
        lambda: (
            _write(folder, {k: v for part in parts for k, v in part.items()})
            if comm.rank() == 0
            else None
        )
    )


def names(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, by its path in it."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(name for name in found if name not in (NAME, f".{NAME}.tmp"))


def measure(folder: Path, which: Sequence[str], *, to_disk: bool = True) -> Measured:
    """Size and CRC-32 of files; with `to_disk` they are also put on the disk."""
    measured = {}
    whole = sum((folder / name).stat().st_size for name in which)
    with process.bar(f"check {folder.name}", whole, "B", scale=True) as bar:
        for name in which:
            if to_disk:
                flush(folder / name)
            size = crc = 0
            with (folder / name).open("rb") as file:
                while block := file.read(BLOCK):
                    size, crc = size + len(block), zlib.crc32(block, crc)
                    bar.update(len(block))
            measured[name] = size, crc
    return measured


def damage(folder: Path, under: str = "", part: tuple[int, int] = (0, 1)) -> list[str]:
    """What is not as it was when the folder was sealed, a line a file; empty where all is well.

    Args:
        under: only files whose path starts so.
        part: (i, n): only the i-th of n parts of the files, so that n ranks share the reading.
    """
    wanted = _read(folder).get("files")
    if not isinstance(wanted, dict):
        return [f"{folder / NAME}: does not say that the folder is complete"]
    lines = []
    for name in sorted(name for name in wanted if name.startswith(under))[part[0] :: part[1]]:
        path, (size, crc) = folder / name, wanted[name]
        if not path.is_file():
            lines.append(f"{path}: is missing")
        elif path.stat().st_size != size:
            lines.append(f"{path}: found {path.stat().st_size} bytes, wanted {size}")
        elif measure(folder, [name], to_disk=False)[name][1] != crc:
            lines.append(f"{path}: its content is not what was written (CRC-32)")
    return lines


def size(folder: Path) -> int:
    """Bytes of a sealed folder's files."""
    return sum(size for size, _ in (_read(folder).get("files") or {}).values())


def strangers(folder: Path) -> list[str]:
    """Files in a sealed folder that were not there when it was sealed: somebody else's.
    None in one that was not sealed.
    """
    sealed = _read(folder).get("files")
    return [] if sealed is None else sorted(set(names(folder)) - set(sealed))


def discard(folder: Path, kind: str) -> None:
    """Remove a folder of ours. Killed at any moment, it leaves one that is ours and not whole.

    An empty folder goes too, a missing one is fine; a sealed one must have no `strangers`.
    """
    if is_free(folder):
        if folder.exists():
            folder.rmdir()
        return
    assert is_ours(folder, kind) and not strangers(folder), folder
    if is_whole(folder, kind):  # else on a full disk the rest of a checkpoint could not go
        mark(folder, kind)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != NAME:
            path.unlink()
    (folder / NAME).unlink()
    folder.rmdir()


def _write(folder: Path, files: Measured) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            flush(path)
    write_json(folder / NAME, _read(folder) | {"files": dict(sorted(files.items()))})
    flush(folder.parent)


def _read(folder: Path) -> dict[str, Any]:
    """The manifest; empty where there is none. A damaged one is none: what it stood for is not
    known, and the folder is not touched.
    """
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = isinstance(found, dict) and found.get("made by") == "coba-mtl"
    return found if ours else {}
