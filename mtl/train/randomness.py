"""Randomness that has no state to save: a function of the run's seed, the step and the rank."""

import hashlib
import os

import torch

from mtl.distributed import comm


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for dropout in step `step` on this rank."""
    # The rank too: every rank has other rows, and dropout should not repeat on them.
    digest = hashlib.blake2b(
        f"{seed}/dropout/{step}/{comm.rank()}".encode(), digest_size=8
    ).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def only_deterministic() -> None:
    """Have torch refuse every operation that may give other bits at another run (RuntimeError)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    # Else torch writes NaN into all memory that it hands out, against errors that are not ours.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
