"""A model's tensors on disk: read one at a time, written one at a time in the same layout."""

import errno
import json
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtl.merging.piece import MergeError
from mtl.output import manifest

INDEX, WHOLE, ADAPTER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
)
NOT_CARRIED = ("README.md", manifest.NAME)  # both are about the sub-model alone
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Entry(NamedTuple):
    """Where a tensor stands: its file, its type by safetensors' name, its shape, its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


class Stored:
    """A model's folder of safetensors.

    Attributes:
        folder: where it is.
        entries: name -> Entry, in the order of the files and of the bytes in them.

    Raises:
        MergeError: there are no safetensors, or a file of them is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = {}
        for file in self._files():
            try:
                with safe_open(folder / file, "pt"):
                    pass  # checks that header and size fit
            except (SafetensorError, OSError) as e:
                raise MergeError(f"{folder / file}: cannot be read as safetensors: {e}") from e
            begin, header = _header(folder / file)
            for name, entry in header.items():
                start, stop = (begin + offset for offset in entry["data_offsets"])
                found[name] = Entry(file, entry["dtype"], tuple(entry["shape"]), start, stop)
        self.entries = dict(sorted(found.items(), key=lambda each: (each[1].file, each[1].start)))

    @property
    def files(self) -> list[str]:
        # Not a set: files keep their order.
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file: what is read of it leaves memory with it."""
        with safe_open(self.folder / self.entries[name].file, "pt") as file:
            return file.get_tensor(name)

    def json(self, name: str) -> dict:
        """A JSON file of the folder; {} where there is none."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _files(self) -> Sequence[str]:
        if (self.folder / INDEX).is_file():
            return sorted(set(self.json(INDEX)["weight_map"].values()))
        for name in (WHOLE, ADAPTER):
            if (self.folder / name).is_file():
                return [name]
        others = sorted(path.name for path in self.folder.glob("*") if path.suffix in WEIGHTS)
        raise MergeError(
            f"{self.folder}: found {others or 'no weights'}, wanted {WHOLE} or {INDEX}. "
            "Load the model with transformers and save it again, or name another folder."
        )


class Copy:
    """Files in the layout of a model's, whose tensors come in any order and from any thread.

    Use it as a context; nothing but what `write` got is to be relied on.
    """

    def __init__(self, like: Stored, folder: Path):
        self._like, self._folder, self._open = like, folder, {}
        self._stack = ExitStack()

    def __enter__(self) -> "Copy":
        for name in self._like.files:
            source = self._like.folder / name
            begin, _ = _header(source)
            file = self._stack.enter_context((self._folder / name).open("wb"))
            # The same header: types, shapes and places are the first sub-model's.
            with source.open("rb") as head:
                file.write(head.read(begin))
            file.flush()
            os.posix_fallocate(file.fileno(), 0, source.stat().st_size)  # a full disk says so now
            self._open[name] = file.fileno()
        return self

    def __exit__(self, *error: object) -> None:
        # After an error the files go away, so there is nothing to make safe.
        if not any(error):
            for file in self._open.values():
                os.fsync(file)
        self._stack.close()

    def write(self, name: str, tensor: Tensor) -> None:
        entry = self._like.entries[name]
        left = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert len(left) == entry.stop - entry.start, name
        at = entry.start
        # pwrite has its own position, which threads can share; it may write a part only.
        while left:
            done = os.pwrite(self._open[entry.file], left, at)
            left, at = left[done:], at + done


def carry(source: Path, target: Path) -> None:
    """Copy what stands beside a model's weights: config, tokenizer, template, index, code."""
    for path in source.iterdir():
        is_text = path.is_file() and path.suffix not in WEIGHTS and path.stat().st_size < 2**26
        if is_text and path.name not in NOT_CARRIED and not path.name.startswith("."):
            (target / path.name).write_bytes(path.read_bytes())


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _header(path: Path) -> tuple[int, dict]:
    """Where the tensors' bytes begin, and name -> dtype, shape, data_offsets (safetensors'
    format).
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
