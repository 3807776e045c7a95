"""What makes a loaded model faster: its blocks compiled, a fused loss. And what bf16 costs."""

import importlib.util
import os
import shutil
import time

import torch
from torch import nn

from mtl.config import Config
from mtl.distributed.engine import device
from mtl.losses import head
from mtl.models.errors import ModelError
from mtl.models.structure import blocks


def compile_blocks(model: nn.Module, config: Config) -> None:
    """Compile each block at its first call. In place, so parameters keep the names that checkpoints
    and exports know.

    We compile blocks and not the whole model: one compilation serves all blocks. What differs
    between micro-batches (the head's number of targets, the mask's shape) stays outside of them.

    Raises:
        ModelError: there is no compiler, or nothing to compile.
    """
    place = f"{config.where('model.compile')}: model.compile: found true, wanted"
    if device().type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ModelError(
            f"{place} a C++ compiler as well. Install g++, name one in CXX, or leave the key out."
        )
    if device().type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ModelError(f"{place} Triton as well. Run: pip install triton; or leave the key out.")
    _, layers = blocks(model)
    if not len(layers):
        raise ModelError(
            f"{place} a model with a list of blocks; {type(model).__name__} has none. Leave the "
            "key out."
        )
    for layer in layers:
        layer.compile(dynamic=True)


def bf16_over_fp32() -> float:
    """How many times as long as in fp32 a matrix product takes in bf16 on this CPU: less than 1
    where it has instructions for bf16, tens of times where it has none.
    """

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(32, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        found = []
        for _ in range(4):  # the first one also sets up its kernel
            began = time.perf_counter()
            a @ b
            found.append(time.perf_counter() - began)
        return min(found)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def look_for_kernel(model: nn.Module, config: Config) -> None:
    """Raise ModelError where the fused loss of `model.loss_kernel` cannot run."""
    kernel = config.model.loss_kernel
    place = f"{config.where('model.loss_kernel')}: model.loss_kernel: {kernel}"
    if kernel == "liger":
        _look_for_liger(place)
    elif not hasattr(nn.functional, "linear_cross_entropy"):
        raise ModelError(
            f"{place} needs torch 2.13 or newer, found {torch.__version__}. Leave the key out."
        )
    causal, _ = head.decoder_of(model)
    try:
        head.linear_head(causal)
    except TypeError as e:
        found = type(causal.get_output_embeddings()).__name__
        raise ModelError(
            f"{place} needs a head that is one linear module without an adapter, found a {found}."
        ) from e


def _look_for_liger(place: str) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            f"{place} needs liger-kernel, which is not installed. Run: pip install liger-kernel."
        )
    # Triton's interpreter runs GPU kernels on a CPU, slowly: tests use it.
    if device().type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(
            f"{place} needs a GPU, found a CPU. Leave the key out: the head then runs in slices."
        )
