"""The model: loaded, checked, fitted to the tokenizer. Anything `AutoModelForCausalLM` loads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from mtl.config import Config, ConfigError
from mtl.distributed import comm, engine
from mtl.losses import head
from mtl.models import accelerate, adapters, quantize
from mtl.models.errors import MissingKernel, ModelError
from mtl.models.structure import dtype_of


class Family(NamedTuple):
    """A kind of model of transformers.

    Attributes:
        auto: the class that loads it.
        causal: whether it predicts next tokens. If so, its head runs on target positions only.
        settings: entries to set in its configuration.
        options: further keywords of `from_pretrained`.
    """

    auto: Any
    causal: bool
    settings: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


CAUSAL = Family(AutoModelForCausalLM, True)


def load(config: Config, tokenizer: PreTrainedTokenizerBase, family: Family = CAUSAL) -> nn.Module:
    """Load the base model in the training dtype. Add the LoRA adapter and activation checkpointing
    where the config asks.

    At ZeRO 3 it is a collective, and no rank holds the whole model.

    Raises:
        ModelError: the model cannot be loaded, or cannot be trained on target positions only.
    """
    # One bar a run, not one a rank.
    if comm.rank() > 0:
        transformers_logging.disable_progress_bar()
    with engine.loading(config, comm.world()):
        with _refusals(config):
            settings = _configuration(config, family)
            quantization = quantize.settings(
                config.model.quantize, config.model.precision, engine.device()
            )
            name, origin = _origin(config)
            merges = config.adapter is not None and config.adapter.merge
            # fp32: the adapter is added before anything is rounded to the training dtype.
            how = _settings(config) | ({"dtype": torch.float32} if merges else {})
            model = family.auto.from_pretrained(
                name, config=settings, **origin, **how, **quantization, **family.options
            )
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers adds what it finds
            found, hint = repr(name), f"It is an adapter: set model.adapter: {name}."
            raise ModelError(config.error("model.name", found, "its base model", hint))
        if merges:
            model = adapters.add_up(model, config)
        if config.model.quantize:
            quantize.settle(model)
        # We are still within `loading`. PEFT and transformers gather what they read (DoRA's norms,
        # rows of an embedding) only if they know of ZeRO 3.
        adapted = _adapt(model, config, tokenizer, family)
        if family.causal:
            head.install(adapted, config.model.loss_kernel)
        return adapted


def skeleton(
    config: Config, tokenizer: PreTrainedTokenizerBase, family: Family = CAUSAL
) -> nn.Module:
    """The result of `load` on the meta device: every parameter's name, shape and dtype. No weight
    is read.

    Raises:
        ModelError: as `load`.
    """
    with _refusals(config):
        settings = _configuration(config, family)
        quantization = quantize.settings(
            config.model.quantize, config.model.precision, torch.device("meta")
        )
        with torch.device("meta"):
            model = family.auto.from_config(settings, **_settings(config))
            if quantization:
                AutoHfQuantizer.from_config(**quantization, pre_quantized=False).preprocess_model(
                    model, device_map=None
                )
            # PEFT gives adapters the base model's dtype, but not on the meta device.
            return _adapt(model, config, tokenizer, family).to(dtype_of(config.model.precision))


def _configuration(config: Config, family: Family) -> PretrainedConfig:
    """The model's own configuration, with the family's settings."""
    name, origin = _origin(config)
    settings = AutoConfig.from_pretrained(name, **origin)
    kinds = getattr(settings, "architectures", None) or []
    if family.causal and kinds and all(k.endswith("ForSequenceClassification") for k in kinds):
        raise ModelError(
            f"{config.where('model.name')}: model.name: found {kinds[0]}, a classifier, wanted a "
            "causal language model: its classifier would run on token positions. For a classifier: "
            "model.loader: sequence_classification, objective: classification."
        )
    for key, value in family.settings.items():
        setattr(settings, key, value)
    return settings


def _origin(config: Config) -> tuple[str, dict[str, Any]]:
    name, revision = adapters.base_of(config)
    return name, {"revision": revision, "trust_remote_code": config.model.allow_remote_code}


def _settings(config: Config) -> dict[str, Any]:
    # Always give the dtype: otherwise transformers takes the checkpoint's.
    return {
        "dtype": dtype_of(config.model.precision),
        "attn_implementation": config.model.attention,
    }


@contextmanager
def _refusals(config: Config) -> Iterator[None]:
    """Turn transformers' refusals into ModelErrors that name the switch that helps."""
    m = config.model
    try:
        yield
    except (ModelError, ConfigError):
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as e:
        text, hint = " ".join(str(e).split()), ""
        if isinstance(e, RuntimeError):
            if "ignore_mismatched_sizes" not in text:
                raise  # memory, a collective: not what lies in the folder
            text = "its weights have other shapes than its config.json says; see the report above."
            hint = "Take both from one model."
        elif isinstance(e, SafetensorError):
            hint = "A file of its weights is not whole: download it again."
        elif "trust_remote_code" in text:
            text, hint = (
                "it needs code that comes with it.",
                "If you trust that code: model.allow_remote_code: true.",
            )
        elif "gated" in text:
            hint = "Ask its owner for access, then log in with `hf auth login` or set HF_TOKEN."
        if m.attention and ("attn_implementation" in text or "FlashAttention" in text):
            missing = isinstance(e, ImportError)
            wanted = "a kernel that is installed" if missing else "one that this model has"
            kind = MissingKernel if missing else ModelError
            raise kind(config.error("model.attention", m.attention, wanted, text)) from e
        raise ModelError(
            f"{config.where('model.name')}: model.name: {m.name!r} could not be loaded as a causal "
            f"language model: {text} {hint}"
        ) from e


def _adapt(
    model: nn.Module, config: Config, tokenizer: PreTrainedTokenizerBase, family: Family
) -> nn.Module:
    """The loaded model, ready to train: checked, fitted to the tokenizer, with adapters and
    checkpointing.
    """
    try:
        if family.causal:
            head.decoder_of(model)
    except TypeError as e:
        raise ModelError(
            f"{config.where('model.name')}: model.name: {e}, so the head cannot run on target "
            "positions only. Use another model."
        ) from e
    _fit_embeddings(model, config, len(tokenizer))
    if config.trains_adapter:
        model = adapters.add(model, config, "CAUSAL_LM" if family.causal else "SEQ_CLS")
    if config.model.loss_kernel:
        accelerate.look_for_kernel(model, config)
    if config.model.activation_checkpointing:
        # Reentrant checkpointing cannot give per-task gradients, and needs inputs that require
        # gradients.
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )  # its name before
        enable({"use_reentrant": False})
    # A skeleton is never run.
    if config.model.compile and not next(model.parameters()).is_meta:
        accelerate.compile_blocks(model, config)
    return model


def _fit_embeddings(model: nn.Module, config: Config, tokens: int) -> None:
    """Add rows for tokens that the model does not know. Rows beyond the tokenizer's stay: they pad
    to a round number.
    """
    table = model.get_input_embeddings().weight
    rows = engine.shape(table)[0]
    if tokens <= rows:
        return
    names = list(dict.fromkeys(map(adapters.last, adapters.tables(model))))
    if config.trains_adapter:
        settings = adapters.saved(config)
        if not all(adapters.saves_tables(model, settings)):
            raise ModelError(
                config.error(
                    "model.lora.modules_to_save",
                    str(sorted(settings.modules_to_save or ())),
                    f"{' and '.join(names)} in it, tied or not",
                    f"The tokenizer has {tokens:,} tokens, the model {rows:,}: new rows that are "
                    "neither trained nor saved with the adapter would be noise.",
                )
            )
    # New rows are drawn around the mean of the old ones; without weights there is none.
    model.resize_token_embeddings(tokens, mean_resizing=not table.is_meta)
