"""Files with flipped bits: what a bad disk, cable or memory leaves."""

import random
from collections.abc import Iterator
from pathlib import Path


def flips(path: Path, tries: int, seed: int = 0) -> Iterator[bytes]:
    """The file's content with one bit flipped, each time another one at random."""
    rng, whole = random.Random(f"{seed} {path.name}"), path.read_bytes()
    for _ in range(tries):
        yield flip(whole, rng)


def flip(whole: bytes, rng: random.Random) -> bytes:
    """The same bytes with one bit flipped."""
    content = bytearray(whole)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)
