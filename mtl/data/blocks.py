"""Checksums of a file's blocks: taken while it is written, compared when a block is first read.

A big file is memory-mapped, and most of a run reads little of it at a time. So blocks that hold
rows are compared as they come up; all else, which the start reads anyway, when the file is opened.
CRC-32 finds accidents, any flipped bit among them; it is no defence against a forger.
"""

import io
import mmap
import os
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

BLOCK = 2**16  # bytes of a block at most
SMALL = 2**12  # bytes of a piece below which it is compared when the file is opened

Block = tuple[int, int, int]
"""Bytes, CRC-32, and whether it is compared only when it is read (1)."""


class BlockError(ValueError):
    """A file's content is not what was written, or it has changed since it was opened."""


class Summing(io.RawIOBase):
    """A new file, for a writer that writes one buffer after the other.

    Attributes:
        blocks: of what was written so far; all of it once the file is closed.
    """

    def __init__(self, path: Path):
        self.blocks: list[Block] = []
        self._file, self._pending = path.open("wb"), b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        with memoryview(data) as view:
            self._file.write(view)
            if len(view) < SMALL:
                self._pending += view
            else:
                self._close_pending()
                for start in range(0, len(view), BLOCK):
                    part = view[start : start + BLOCK]
                    self.blocks.append((len(part), zlib.crc32(part), 1))
            if len(self._pending) >= BLOCK:
                self._close_pending()
            return len(view)

    def close(self) -> None:
        if not self.closed:
            self._close_pending()
            self._file.close()
        super().close()

    def _close_pending(self) -> None:
        if self._pending:
            self.blocks.append((len(self._pending), zlib.crc32(self._pending), 0))
            self._pending = b""


class Mapped:
    """A memory-mapped file. `check` its bytes before each use.

    A file that is cut while it is mapped ends the process that reads behind its end (SIGBUS). So
    `check` looks at its size and its time of change too. What is cut between that and the use a
    moment later is not found.

    Attributes:
        buffer: the whole file, for Arrow.

    Raises:
        BlockError: it has another size, or a block that the start reads has another content.
    """

    def __init__(self, path: Path, blocks: Sequence[Block]):
        self.path, self._blocks, self._starts = path, blocks, [0]
        for length, *_ in blocks:
            self._starts.append(self._starts[-1] + length)
        self._descriptor = os.open(path, os.O_RDONLY)
        # Open as long as rows are read; closed also where a line below raises.
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = self._look()
        if self._opened[0] != self._starts[-1]:
            raise BlockError(f"found {self._opened[0]:,} bytes, wanted {self._starts[-1]:,}")
        # One handle: a file that another one replaces stays readable here as it was.
        self._map = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        self.buffer = pa.py_buffer(self._map)
        self._is_new = bytearray(b"\1" * len(blocks))
        for i, (_, _, is_later) in enumerate(blocks):
            if not is_later:
                self._compare(i)

    def check(self, start: int, stop: int) -> None:
        """Compare the blocks of the bytes [start, stop), if nobody has yet. Raises BlockError."""
        self.check_unchanged()
        for i in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
            if self._is_new[i]:
                self._compare(i)

    def check_unchanged(self) -> None:
        """Raise BlockError where the file was written to since it was opened."""
        if self._look() != self._opened:
            raise BlockError("it was changed while it was in use")

    def check_all(self) -> None:
        """Raise BlockError where any block is not what was written."""
        self.check(0, self._starts[-1])

    def _compare(self, i: int) -> None:
        start, stop = self._starts[i : i + 2]
        # Released at once: a map with open views cannot be closed.
        with memoryview(self._map) as view:
            found = zlib.crc32(view[start:stop])
        if found != self._blocks[i][1]:
            raise BlockError(
                f"the {stop - start:,} bytes from {start:,} on are not what was written"
            )
        self._is_new[i] = 0

    def _look(self) -> tuple[int, int]:
        # Of the open file: another file at the same path is none of ours.
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns
