"""The model: loaded, adapted, exported. Anything `AutoModelForCausalLM` loads."""

import inspect
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mtl import comm, engine
from mtl.config import Config


class ModelError(ValueError):
    """The model cannot be loaded or trained as the configuration asks."""


def load(config: Config, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load the base model in the training dtype, add the LoRA adapter and activation checkpointing where asked.

    At ZeRO 3 no rank holds the whole model. A collective there.

    Raises:
        ModelError: the model cannot be had, or cannot be trained on target positions only.
    """
    m = config.model
    if comm.rank() > 0:
        transformers_logging.disable_progress_bar()
    try:
        with engine.loading(config, comm.world()):
            model = AutoModelForCausalLM.from_pretrained(
                m.name,
                revision=m.revision,
                # Always passed: transformers takes the checkpoint's dtype otherwise.
                dtype=torch.bfloat16 if m.precision == "bf16" else torch.float32,
                attn_implementation=m.attention,
                trust_remote_code=m.allow_remote_code,
            )
    except (OSError, ValueError, ImportError) as e:
        hint = "Set model.allow_remote_code: true if you trust its code." if "trust_remote_code" in str(e) else ""
        raise ModelError(
            f"{config.where('model.name')}: model.name: {m.name!r} could not be loaded as a causal language model: {e} {hint}"
        ) from e
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{config.where('model.name')}: model.name: {type(model).__name__} does not take `logits_to_keep`, which the loss "
            "needs to run the head on target positions only. Use a model that does, or a newer transformers."
        )
    _fit_embeddings(model, len(tokenizer))
    if m.lora is not None:
        model = _add_lora(model, config)
    if m.activation_checkpointing:
        # Reentrant checkpointing cannot give per-task gradients, and needs inputs that require gradients.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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
            trained.module.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)

    comm.together(write)


def _fit_embeddings(model: nn.Module, tokens: int) -> None:
    rows = engine.shape(model.get_input_embeddings().weight)[0]
    if tokens > rows:
        model.resize_token_embeddings(tokens)


def _add_lora(model: nn.Module, config: Config) -> nn.Module:
    lora = config.model.lora
    target = lora.target_modules
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
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
    except ValueError as e:
        names = sorted({n.rsplit(".", 1)[-1] for n, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ModelError(f"{config.where('model.lora')}: model.lora: {e} Linear modules of this model: {names}.") from e
    if config.model.activation_checkpointing:
        adapted.enable_input_require_grads()
    return adapted
