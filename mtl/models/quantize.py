"""Weights that bitsandbytes (extra `qlora`) holds in 4 or 8 bits, beside trained adapters."""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from mtl.models.errors import ModelError

# Bytes of a quantized weight. Besides the 4 bits, nf4 holds a byte for the scale of 64 weights, and
# 4 bytes for 256 scales.
STORED = {"nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def settings(
    kind: str | None, precision: str, device: torch.device
) -> dict[str, BitsAndBytesConfig]:
    """Keywords that make `from_pretrained` quantize. Other weights have the dtype of the precision.

    We do not need peft's `prepare_model_for_kbit_training`: LoRA freezes the weights, checkpointing
    is non-reentrant, and norms, embeddings and head are fp32 with `bf16_autocast`.

    Raises:
        ModelError: bitsandbytes is not installed, or does not work on this device.
    """
    if kind is None:
        return {}
    needs = f"model.quantize: {kind} needs bitsandbytes"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{needs}, which is not installed. Run: pip install bitsandbytes.")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    four = {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    # Otherwise every product warns that int8 takes its input in fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        import bitsandbytes

        if device.type != "meta":  # it looks for its kernels at their first call
            tried = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[kind](
                64, 64
            )
            tried.to(device)(torch.zeros(1, 64, dtype=dtype, device=device))
    except (
        Exception
    ) as e:  # any: what a broken library or a missing kernel raises is not documented
        text = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        raise ModelError(
            f"{needs}, which does not work on {device}: {text} Install one that does, or leave the "
            "key out."
        ) from e
    wanted = (
        BitsAndBytesConfig(load_in_4bit=True, **four)
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": wanted}


def quantized(model: nn.Module) -> list[nn.Module]:
    import bitsandbytes  # here: an extra

    return [
        part
        for part in model.modules()
        if isinstance(part, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
    ]


def settle(model: nn.Module) -> None:
    """Make bitsandbytes' modules train as the configuration says, and keep what they add out of
    checkpoints.

    - Their 4-bit module takes the dtype of its first input for computing, whatever it was told.
    - On CPUs with AVX512-BF16 its first evaluation rearranges the weights for a kernel without a
      gradient. From then on earlier layers silently get no gradient (bitsandbytes 0.50.2).
    - It saves scales beside the weights. Both belong to the base model, and scales take 100 MB for
      7B parameters.
    """

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith((f"{prefix}weight", f"{prefix}SCB"))]:
            del state[key]

    for module in quantized(model):
        module.register_state_dict_post_hook(drop)
        module.compute_type_is_set, module.support_avx512bf16_for_cpu = (
            True,
            False,
        )  # of the 4-bit one


def stored_bytes(model: nn.Module, kind: str | None) -> dict[str, float]:
    """Bytes of an element of each quantized weight, by the parameter's name. A skeleton keeps the
    original shapes.
    """
    if kind is None:
        return {}
    parts = {id(part) for part in quantized(model)}
    return {
        f"{name}.weight": STORED[kind] for name, part in model.named_modules() if id(part) in parts
    }
