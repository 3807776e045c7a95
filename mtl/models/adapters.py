"""LoRA adapters (PEFT), added to a model and merged into its weights. Only this file knows PEFT."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from mtl.config import Config
from mtl.config.schema import LoraSection, adapter_folder, model_folder
from mtl.config.words import did_you_mean
from mtl.distributed.engine import device, gathered
from mtl.models import quantize as quantization
from mtl.models.errors import ModelError
from mtl.models.files import same_model
from mtl.models.structure import dtype_of


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is one with adapters."""
    return isinstance(model, peft.PeftModel)


def add(model: nn.Module, config: Config, task_type: str = "CAUSAL_LM") -> nn.Module:
    """The model with new adapters, or with those of `Config.adapter` and their weights.

    Raises:
        ModelError: an entry of `target_modules` or `modules_to_save` matches no module; only one of
            two tied tables is named; the trained adapter is of another kind, model or settings.
    """
    lora, start = config.model.lora, config.adapter
    trained = start and _of_this_base(settings_of(start.path, config), config)
    if lora is None:
        wanted = trained
        # Exported adapters say true, with which PEFT would freeze them.
        wanted.inference_mode = False
    else:
        if trained is not None:
            _same(lora, trained, config)
        target = lora.target_modules
        wanted = peft.LoraConfig(
            task_type=task_type,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=target if isinstance(target, str) else list(target),
            modules_to_save=list(lora.modules_to_save) or None,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
        )
        _check_names(model, config)
    # What the exported folder will name as its base, wherever the adapter came from.
    wanted.base_model_name_or_path, wanted.revision = base_of(config)
    named, ties = saves_tables(model, wanted), is_tied(model)
    if ties and any(named) and not all(named):
        tables_ = " and ".join(map(last, tables(model)))
        hint = "This model ties them: they are one table."
        found = str(sorted(wanted.modules_to_save))
        raise ModelError(
            config.error("model.lora.modules_to_save", found, f"both or none of {tables_}", hint)
        )
    # Otherwise PEFT trains two copies, and a merged model that ties them has room for one.
    wanted.ensure_weight_tying = ties and all(named)
    modules = list(wanted.modules_to_save or ()) or None
    try:
        adapted = peft.get_peft_model(
            # The engine decides the dtype: adapters follow the base model.
            model,
            wanted,
            autocast_adapter_dtype=False,
        )
    except ValueError as e:
        raise ModelError(
            f"{config.where('model.lora')}: model.lora: {e} Linear modules of this model: "
            f"{_linear(model)}."
        ) from e
    wanted.modules_to_save = modules  # PEFT writes other names of tied tables into it
    for parameter in adapted.parameters() if config.model.quantize else ():
        if parameter.requires_grad:
            # quantized weights are integers: PEFT chooses varying dtypes beside them
            parameter.data = parameter.data.to(dtype_of(config.model.precision))
    # A skeleton has no values to fill.
    if start is not None and not next(model.parameters()).is_meta:
        _fill(adapted, start.path, config)
    return adapted


def base_of(config: Config) -> tuple[str, str | None]:
    """Folder or hub name of the whole model that weights are read from, and its revision.

    Raises:
        ModelError: `train.from` holds no model.
    """
    origin = getattr(config.train, "from")
    if origin is not None and not adapter_folder(origin):
        folder = model_folder(origin)
        if not (folder / "config.json").is_file():
            raise ModelError(
                config.error(
                    "train.from",
                    repr(origin),
                    "a checkpoint of a run, an exported model or an adapter",
                    "For instance RUN/checkpoints/step-00000120.",
                )
            )
        return str(folder), None
    folder = adapter_folder(config.model.name)
    if folder is None:
        return os.path.expanduser(config.model.name), config.model.revision
    settings = settings_of(str(folder), config)
    return settings.base_model_name_or_path, settings.revision


def settings_of(path: str, config: Config) -> peft.LoraConfig:
    """The settings of a trained adapter.

    Raises:
        ModelError: there is none, or it is no LoRA.
    """
    key = adapter_key(config)
    try:
        settings = peft.PeftConfig.from_pretrained(source(path))
    except (OSError, ValueError, TypeError, KeyError) as e:
        text = " ".join(str(e).split())[:300]
        raise ModelError(
            config.error(key, repr(path), "a folder with adapter_config.json", text)
        ) from e
    if not isinstance(settings, peft.LoraConfig):
        found = f"an adapter of type {settings.peft_type.value}"
        raise ModelError(config.error(key, found, "one of type LORA"))
    return settings


def _of_this_base(settings: peft.LoraConfig, config: Config) -> peft.LoraConfig:
    """The adapter's settings. Shapes say too little: those of many models are alike.

    Raises:
        ModelError: the adapter names another base model, and `other_base` is not set.
    """
    theirs, mine = settings.base_model_name_or_path, base_of(config)[0]
    if theirs and not config.adapter.other_base and not same_model(theirs, mine):
        hint = "The same model elsewhere? Set model.adapter: {path: ..., other_base: true}."
        found = f"an adapter of {theirs!r}"
        raise ModelError(
            config.error(adapter_key(config), found, f"one of model.name = {mine!r}", hint)
        )
    return settings


def source(path: str) -> str:
    """An adapter's folder, in a checkpoint of a run too, or a hub name as it is."""
    return str(adapter_folder(path) or path)


def adapter_key(config: Config) -> str:
    """The key that names the adapter that training starts from."""
    if config.model.adapter:
        return "model.adapter.path"
    return "train.from" if getattr(config.train, "from") else "model.name"


def tables(model: nn.Module) -> list[str]:
    """The full names of the embedding and of the head over tokens, where there is one."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    # By identity: a module does not know its own name.
    known = {id(part): name for name, part in model.named_modules()}
    return [known[id(part)] for part in parts if part is not None]


def is_tied(model: nn.Module) -> bool:
    """Whether embedding and head are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def saved(config: Config) -> LoraSection | peft.LoraConfig:
    """The settings with `modules_to_save`: `model.lora`, or those of the adapter that goes on."""
    return config.model.lora or settings_of(config.adapter.path, config)


def saves_tables(model: nn.Module, settings: LoraSection | peft.LoraConfig) -> list[bool]:
    """Whether `modules_to_save` names each of `tables`: the embedding, and the head."""
    named = [names(settings.modules_to_save or (), table) for table in tables(model)]
    if any(named) and getattr(settings, "ensure_weight_tying", False):
        return [True] * len(named)  # PEFT adds the other one
    return named


def names(entries: Iterable[str], module: str) -> bool:
    """Whether one of the entries is a module's full name, or the end of it."""
    return any(_matches(entry, module) for entry in entries)


def last(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]


def _matches(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _linear(model: nn.Module) -> list[str]:
    return sorted({last(n) for n, part in model.named_modules() if isinstance(part, nn.Linear)})


def _check_names(model: nn.Module, config: Config) -> None:
    """Check that each entry matches. PEFT is content if one does, and takes any ending, such as
    `head`.
    """
    lora, known = config.model.lora, [n for n, _ in model.named_modules() if n]
    lines = []
    for key in ("target_modules", "modules_to_save"):
        entries = getattr(lora, key)
        for i, entry in enumerate(() if isinstance(entries, str) else entries):
            path, found = ("model", "lora", key, i), repr(entry)
            if not any(_matches(entry, name) for name in known):
                hint = did_you_mean(entry, sorted({*map(last, known), *known}))
                wanted = f"the name of a module, or its end; linear ones are {_linear(model)}"
                lines.append(config.error(path, found, wanted, hint))
            elif key == "target_modules" and is_tied(model):
                if any(_matches(entry, table) for table in tables(model)):
                    both = f"[{', '.join(map(last, tables(model)))}]"
                    hint = (
                        "This model ties embedding and head: an adapter of one of them cannot be "
                        f"merged. Train the table whole: modules_to_save: {both}."
                    )
                    lines.append(config.error(path, found, "another module", hint))
    if lines:
        raise ModelError("\n".join(lines))


def _same(lora: LoraSection, trained: peft.LoraConfig, config: Config) -> None:
    """Raise ModelError where `model.lora` contradicts the adapter that training goes on with."""
    theirs = {
        "r": trained.r,
        "alpha": float(trained.lora_alpha),
        "rslora": trained.use_rslora,
        "dora": trained.use_dora,
        "modules_to_save": set(trained.modules_to_save or ()),
    }
    mine = {
        k: v if isinstance(v := getattr(lora, k), bool | int | float) else set(v) for k in theirs
    }
    lines = [
        config.error(
            f"model.lora.{k}",
            str(mine[k]),
            f"{theirs[k]}, as in the adapter that training goes on with",
            "Leave model.lora out to take its settings.",
        )
        for k in theirs
        if mine[k] != theirs[k]
    ]
    # Scale and rank of single modules: model.lora has no keys for them, and would drop the scales.
    for key in ("alpha_pattern", "rank_pattern"):
        if getattr(trained, key):
            found = f"settings beside an adapter with {key}"
            hint = "Leave model.lora out: training goes on with the adapter's settings."
            lines.append(config.error("model.lora", found, "null", hint))
    if lines:
        raise ModelError("\n".join(lines))


def _fill(adapted: nn.Module, path: str, config: Config) -> None:
    """Copy a trained adapter's weights into the model's. A collective at ZeRO 3."""
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    tensors = peft.utils.load_peft_weights(source(path), device="cpu")
    # At ZeRO 3 values must be whole to be written into: `gathered` with modify.
    try:
        with gathered(list(trained.values()), modify=True):
            found = peft.set_peft_model_state_dict(adapted, tensors)
    except RuntimeError as e:  # of load_state_dict: unlike shapes
        text = " ".join(str(e).split())[:500]
        wanted = "an adapter of this model with these settings"
        raise ModelError(config.error(adapter_key(config), repr(path), wanted, text)) from e
    mine = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # Whole modules that are saved beside adapters are looked at through missing_keys.
    ours, theirs = ({n for n in names if ".lora_" in n} for names in (mine, tensors))
    missing = sorted((ours - theirs) | (trained.keys() & set(found.missing_keys)))
    unknown = sorted(theirs - ours)
    if missing or unknown:
        what = (
            f"{path!r} without {missing[:3]} ({len(missing)}), with {unknown[:3]} ({len(unknown)})"
        )
        wanted = "an adapter of this model with these settings"
        raise ModelError(config.error(adapter_key(config), what, wanted))


def opened(folder: Path) -> nn.Module:
    """An exported adapter on its base model."""
    settings = peft.PeftConfig.from_pretrained(str(folder))
    family, options = _family(settings, folder)
    base = family.from_pretrained(
        settings.base_model_name_or_path, revision=settings.revision, **options
    )
    return peft.PeftModel.from_pretrained(_with_rows(base, str(folder)), str(folder))


def _with_rows(base: nn.Module, path: str) -> nn.Module:
    """The base model with as many rows for tokens as the adapter's own tables have."""
    tensors = peft.utils.load_peft_weights(path, device="cpu")
    ends = [f"{table}.{kind}weight" for table in tables(base) for kind in ("", "modules_to_save.")]
    rows = max((t.shape[0] for n, t in tensors.items() if n.endswith(tuple(ends))), default=0)
    if rows > base.get_input_embeddings().weight.shape[0]:  # the adapter overwrites the new rows
        base.resize_token_embeddings(rows, mean_resizing=False)
    return base


def is_classifier(folder: Path) -> bool:
    """Whether the folder's adapter belongs to a classifier of texts."""
    return peft.PeftConfig.from_pretrained(str(folder)).task_type == "SEQ_CLS"


def _family(settings: peft.PeftConfig, folder: Path) -> tuple[Any, dict[str, Any]]:
    """What loads an adapter's base model, and with which keywords beside name and revision."""
    if settings.task_type != "SEQ_CLS":
        return AutoModelForCausalLM, {}
    # Its labels differ from the base model's, so the head's shape may, too: the adapter brings it.
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForSequenceClassification, {"config": config, "ignore_mismatched_sizes": True}


def add_up(model: nn.Module, config: Config) -> nn.Module:
    """The model with the adapter of `model.adapter` merged into its weights.

    Args:
        model: in fp32; the parameters of the result have the dtype of training.

    Raises:
        ModelError: the adapter is of another kind or base model.
    """
    path = config.adapter.path
    _of_this_base(settings_of(path, config), config)
    model = _with_rows(model, source(path))
    try:
        adapted = peft.PeftModel.from_pretrained(model, source(path), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as e:
        text = " ".join(str(e).split())[:500]
        wanted = "an adapter of this model"
        raise ModelError(config.error("model.adapter.path", repr(path), wanted, text)) from e
    merged = adapted.merge_and_unload()
    for parameter in merged.parameters():  # buffers (rotary frequencies) keep their dtype
        parameter.data = parameter.data.to(dtype_of(config.model.precision))
        # PEFT froze the base model when it added the adapter.
        parameter.requires_grad_(True)
    return merged


def merge(
    folder: Path,
    allow_remote_code: bool = False,
    quantize: str | None = None,
    precision: str = "fp32",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An adapter's base model, in fp32, with the adapter merged into its weights. Also the
    tokenizer beside the adapter.

    Args:
        quantize, precision: `model.quantize` and `model.precision` of the run. An adapter that was
            trained on quantized weights is added to the quantized values, not to the original ones.
            That is the model whose loss was measured.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    settings = peft.PeftConfig.from_pretrained(str(folder))
    name = settings.base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_remote_code)
    dtype = dtype_of(precision) if quantize else torch.float32
    family, options = _family(settings, folder)
    try:
        base = family.from_pretrained(
            name,
            **options,
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
    return peft.PeftModel.from_pretrained(
        _with_rows(base, str(folder)), str(folder), autocast_adapter_dtype=False
    ).merge_and_unload(), tokenizer
