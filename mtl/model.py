"""The model: loaded, adapted, exported. Anything `AutoModelForCausalLM` loads."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from mtl import comm, engine, head
from mtl.config import Config, ConfigError

SHARD = "5GB"  # the largest file of an exported model
# Bytes of a quantized weight: nf4 holds a byte for the scale of 64 weights, and 4 bytes for 256 scales, besides the 4 bits.
STORED = {"nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


class ModelError(ValueError):
    """The model cannot be loaded or trained as the configuration asks."""


def load(config: Config, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load the base model in the training dtype, add the LoRA adapter and activation checkpointing where asked.

    At ZeRO 3 no rank holds the whole model. A collective there.

    Raises:
        ModelError: the model cannot be had, or cannot be trained on target positions only.
    """
    if comm.rank() > 0:
        transformers_logging.disable_progress_bar()
    with engine.loading(config, comm.world()):
        with _refusals(config):
            quantization = _quantization(config.model.quantize, config.model.precision, engine.device())
            model = AutoModelForCausalLM.from_pretrained(_name(config), **_origin(config), **_settings(config), **quantization)
        if config.model.quantize:
            _settle_quantized(model)
        # Still within: PEFT and transformers gather what they read (DoRA's norms, rows of an embedding) only if they know of ZeRO 3.
        return _adapt(model, config, tokenizer)


def skeleton(config: Config, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """What `load` gives, on the meta device: every parameter's name, shape and dtype, and no weight is read.

    Raises:
        ModelError: as `load`.
    """
    with _refusals(config):
        settings = AutoConfig.from_pretrained(_name(config), **_origin(config))
        quantization = _quantization(config.model.quantize, config.model.precision, torch.device("meta"))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, **_settings(config))
            if quantization:
                AutoHfQuantizer.from_config(**quantization, pre_quantized=False).preprocess_model(model, device_map=None)
                for module in _quantized(model):
                    module.weight.stored_bytes = STORED[config.model.quantize]  # read by the estimate of memory
            # PEFT gives adapters the base model's dtype, but not on the meta device.
            return _adapt(model, config, tokenizer).to(_dtype(config.model.precision))


def _name(config: Config) -> str:
    return os.path.expanduser(config.model.name)


def _origin(config: Config) -> dict[str, Any]:
    return {"revision": config.model.revision, "trust_remote_code": config.model.allow_remote_code}


def _settings(config: Config) -> dict[str, Any]:
    # dtype always: transformers takes the checkpoint's otherwise.
    return {"dtype": _dtype(config.model.precision), "attn_implementation": config.model.attention}


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _quantization(kind: str | None, precision: str, device: torch.device) -> dict[str, BitsAndBytesConfig]:
    """How `from_pretrained` is told to quantize. What is not quantized has the dtype that the precision says.

    Beside the frozen weights nothing is left of peft's `prepare_model_for_kbit_training` to do: LoRA freezes, checkpointing is
    non-reentrant, and norms, embeddings and head are fp32 where the precision is `bf16_autocast`.

    Raises:
        ModelError: bitsandbytes is not installed, or cannot do it on this device.
    """
    if kind is None:
        return {}
    needs = f"model.quantize: {kind} needs bitsandbytes"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{needs}, which is not installed. Run: pip install 'coba-mtl[qlora]'.")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    # It says at every product that int8 takes its input in fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        import bitsandbytes

        if device.type != "meta":  # its kernels are found, or not, when they are first called
            tried = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[kind](64, 64)
            tried.to(device)(torch.zeros(1, 64, dtype=dtype, device=device))
    except Exception as e:  # of any kind: what a broken library or a missing kernel raises is not documented
        text = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        raise ModelError(
            f"{needs}, which does not work on {device}: {text} Install one that does, or leave the key out."
        ) from e
    wanted = BitsAndBytesConfig(load_in_4bit=True, **four) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": wanted}


def _quantized(model: nn.Module) -> list[nn.Module]:
    import bitsandbytes  # here: an extra

    return [part for part in model.modules() if isinstance(part, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)]


def _settle_quantized(model: nn.Module) -> None:
    """Have bitsandbytes' modules train as the configuration says, and keep what they add out of checkpoints.

    - Their 4-bit module takes the dtype of its first input for computing, whatever it was told.
    - On CPUs with AVX512-BF16 its first evaluation lays the weights out anew, for a kernel without a gradient: from then on
      what is trained before it gets none, in silence (bitsandbytes 0.50.2).
    - Scales are saved beside weights. They are the base model's as these are, and 100 MB for 7B parameters.
    """

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith((f"{prefix}weight", f"{prefix}SCB"))]:
            del state[key]

    for module in _quantized(model):
        module.register_state_dict_post_hook(drop)
        module.compute_type_is_set, module.support_avx512bf16_for_cpu = True, False  # of the 4-bit one


@contextmanager
def _refusals(config: Config) -> Iterator[None]:
    """Say in our words, with the switch that helps, why transformers does not give a model."""
    m = config.model
    try:
        yield
    except (ModelError, ConfigError):
        raise
    except (OSError, ValueError, ImportError) as e:
        text, hint = " ".join(str(e).split()), ""
        if "trust_remote_code" in text:
            text, hint = "it runs code that comes with it.", "If you trust that code: model.allow_remote_code: true."
        elif "gated" in text:
            hint = "Ask its owner for access, then log in with `hf auth login` or set HF_TOKEN."
        raise ModelError(
            f"{config.where('model.name')}: model.name: {m.name!r} could not be loaded as a causal language model: {text} {hint}"
        ) from e


def _adapt(model: nn.Module, config: Config, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The loaded model made ready to train: checked, fitted to the tokenizer, with adapters and checkpointing."""
    try:
        head.decoder_of(model)
    except TypeError as e:
        raise ModelError(
            f"{config.where('model.name')}: model.name: {e}, so the head cannot run on target positions only. Use another model."
        ) from e
    _fit_embeddings(model, config, len(tokenizer))
    if config.model.lora is not None:
        model = _add_lora(model, config)
    if config.model.loss_kernel:
        _look_for_liger(model, config)
    if config.model.activation_checkpointing:
        # Reentrant checkpointing cannot give per-task gradients, and needs inputs that require gradients.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )  # its name before
        enable({"use_reentrant": False})
    if config.model.compile and not next(model.parameters()).is_meta:
        _compile_blocks(model, config)
    return model


def _look_for_liger(model: nn.Module, config: Config) -> None:
    """Raise ModelError where Liger's fused loss cannot run."""
    place = f"{config.where('model.loss_kernel')}: model.loss_kernel: liger"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(f"{place} needs liger-kernel, which is not installed. Run: pip install 'coba-mtl[liger]'.")
    if engine.device().type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(f"{place} needs a GPU, found a CPU. Leave the key out: the head then runs in slices.")
    causal, _ = head.decoder_of(model)
    try:
        head.linear_head(causal)
    except TypeError as e:
        found = type(causal.get_output_embeddings()).__name__
        raise ModelError(f"{place} needs a head that is one linear module without an adapter, found a {found}.") from e


def _compile_blocks(model: nn.Module, config: Config) -> None:
    """Have each block compiled at its first call. In place: the names of parameters stay what checkpoints and exports know.

    Blocks, not the whole: one is compiled for all, and what differs between micro-batches, the number of targets that the head
    sees and the shape of the mask, is settled outside of them.

    Raises:
        ModelError: there is no compiler, or nothing to compile.
    """
    place = f"{config.where('model.compile')}: model.compile: found true, wanted"
    if engine.device().type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ModelError(f"{place} a C++ compiler to do it with. Install g++, name one in CXX, or leave the key out.")
    if engine.device().type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ModelError(f"{place} Triton to do it with. Run: pip install triton; or leave the key out.")
    _, layers = engine.blocks(model)
    if not len(layers):
        raise ModelError(f"{place} a model with a list of blocks, which {type(model).__name__} has not. Leave the key out.")
    for layer in layers:
        layer.compile(dynamic=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices decay; vectors (norms, biases) do not, as is usual."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(engine.shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(engine.shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] if weight_decay else [{"params": trainable, "weight_decay": 0.0}]


def optimizer(config: Config):
    """A function from a model to its torch optimizer, as `optimizer:` says. The learning rate is set at each step."""
    o = config.optimizer

    def build(model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, o.weight_decay)
        if o.name == "sgd":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
        # Fused: one pass over memory instead of a dozen with a temporary each.
        return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)

    return build


def export(trained: "engine.Engine", tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, or its adapter, as a Hugging Face folder of safetensors with its tokenizer. A collective.

    Rank 0 writes. Every tensor's shape is checked: parameters that ZeRO 3 holds in parts have shape (0,) unless gathered.
    """
    is_adapter = isinstance(trained.module, peft.PeftModel)
    state = trained.state_dict(trainable_only=is_adapter)

    def write() -> None:
        if comm.rank() == 0:
            if is_adapter:
                trained.module.save_pretrained(folder, state_dict=state)
                trained.module.generation_config.save_pretrained(folder)
            else:
                trained.module.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
            tokenizer.save_pretrained(folder)

    comm.together(write)


def merge(
    folder: Path, allow_remote_code: bool = False, quantize: str | None = None, precision: str = "fp32"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An adapter's base model, in fp32, with the adapter added to its weights; and the tokenizer beside the adapter.

    Args:
        quantize, precision: `model.quantize` and `model.precision` of the run. An adapter that was trained on quantized weights
            is added to their values, not to those before quantization: that is the model whose loss was measured.

    Raises:
        ModelError: the base model cannot be had.
    """
    settings = peft.PeftConfig.from_pretrained(str(folder))
    name = settings.base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_remote_code)
    dtype = _dtype(precision) if quantize else torch.float32
    try:
        base = AutoModelForCausalLM.from_pretrained(
            name,
            revision=settings.revision,
            dtype=dtype,
            trust_remote_code=allow_remote_code,
            **_quantization(quantize, precision, engine.device()),
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
        raise ModelError(f"the adapter's base model {name!r} could not be loaded: {text[:300]} {hint}") from e
    if quantize:
        base = base.dequantize(torch.float32).float()
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:  # the adapter holds the rows that are made here
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).merge_and_unload(), tokenizer


def _fit_embeddings(model: nn.Module, config: Config, tokens: int) -> None:
    """Add rows for tokens that the model does not know; rows beyond the tokenizer's (padding to a round number) stay."""
    table = model.get_input_embeddings().weight
    rows = engine.shape(table)[0]
    if tokens <= rows:
        return
    trained = config.model.lora.modules_to_save if config.model.lora else None
    name = next(name for name, part in model.named_modules() if part is model.get_input_embeddings()).rpartition(".")[2]
    if trained is not None and name not in trained:
        raise ModelError(
            f"{config.where('model.lora')}: model.lora.modules_to_save: found {list(trained)}, wanted {name} in it (and the head, "
            f"where it is not tied): the tokenizer has {tokens:,} tokens, the model {rows:,}, and new rows that are neither "
            "trained nor saved with the adapter would be noise."
        )
    # New rows are drawn around the mean of the old ones; without weights there is none.
    model.resize_token_embeddings(tokens, mean_resizing=not table.is_meta)


def _add_lora(model: nn.Module, config: Config) -> nn.Module:
    lora = config.model.lora
    target = lora.target_modules
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
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
            if parameter.requires_grad:  # they cannot follow integers, and PEFT takes another dtype each time
                parameter.data = parameter.data.to(_dtype(config.model.precision))
    except ValueError as e:
        names = sorted({n.rsplit(".", 1)[-1] for n, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ModelError(f"{config.where('model.lora')}: model.lora: {e} Linear modules of this model: {names}.") from e
    return adapted
