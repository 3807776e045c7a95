"""LoRA adapters (PEFT): added to a model, and added up with its weights. The one file that knows
PEFT.
"""

from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mtl.config import Config
from mtl.distributed.engine import device
from mtl.models import quantize as quantization
from mtl.models.errors import ModelError
from mtl.models.structure import dtype_of


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is one with adapters."""
    return isinstance(model, peft.PeftModel)


def add(model: nn.Module, config: Config, task_type: str = "CAUSAL_LM") -> nn.Module:
    lora = config.model.lora
    target = lora.target_modules
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type=task_type,
                revision=config.model.revision,
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=target if isinstance(target, str) else list(target),
                modules_to_save=list(lora.modules_to_save) or None,
                use_rslora=lora.rslora,
                use_dora=lora.dora,
            ),
            # The engine decides the dtype: adapters follow the base model.
            autocast_adapter_dtype=False,
        )
        for parameter in adapted.parameters() if config.model.quantize else ():
            if (
                parameter.requires_grad
            ):  # they cannot follow integers, and PEFT takes another dtype each time
                parameter.data = parameter.data.to(dtype_of(config.model.precision))
    except ValueError as e:
        names = sorted(
            {
                n.rsplit(".", 1)[-1]
                for n, part in model.named_modules()
                if isinstance(part, nn.Linear)
            }
        )
        raise ModelError(
            f"{config.where('model.lora')}: model.lora: {e} Linear modules of this model: {names}."
        ) from e
    return adapted


def merge(
    folder: Path,
    allow_remote_code: bool = False,
    quantize: str | None = None,
    precision: str = "fp32",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An adapter's base model, in fp32, with the adapter added to its weights; and the tokenizer
    beside the adapter.

    Args: quantize, precision: `model.quantize` and `model.precision` of the run. An adapter that
        was trained on quantized weights
            is added to their values, not to those before quantization: that is the model whose loss
            was measured.

    Raises:
        ModelError: the base model cannot be had.
    """
    settings = peft.PeftConfig.from_pretrained(str(folder))
    name = settings.base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_remote_code)
    dtype = dtype_of(precision) if quantize else torch.float32
    try:
        base = AutoModelForCausalLM.from_pretrained(
            name,
            revision=settings.revision,
            dtype=dtype,
            trust_remote_code=allow_remote_code,
            **quantization.settings(quantize, precision, device()),
        )
    except ModelError:
        raise
    except (OSError, ValueError, ImportError) as e:
        text = " ".join(str(e).split())
        hint = (
            "If you trust its code: --allow-remote-code."
            if "trust_remote_code" in text
            else "It must be where the run found it."
        )
        raise ModelError(
            f"the adapter's base model {name!r} could not be loaded: {text[:300]} {hint}"
        ) from e
    if quantize:
        base = base.dequantize(torch.float32).float()
    if (
        len(tokenizer) > base.get_input_embeddings().weight.shape[0]
    ):  # the adapter holds the rows that are made here
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return peft.PeftModel.from_pretrained(
        base, str(folder), autocast_adapter_dtype=False
    ).merge_and_unload(), tokenizer
