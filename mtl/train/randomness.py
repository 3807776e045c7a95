"""Randomness that has no state to save: a function of the run's seed, the step and the rank."""

import hashlib

import torch

from mtl.distributed import comm


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for dropout in step `step` on this rank."""
    # The rank too: every rank has other rows, and dropout should not repeat on them.
    digest = hashlib.blake2b(
        f"{seed}/dropout/{step}/{comm.rank()}".encode(), digest_size=8
    ).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
