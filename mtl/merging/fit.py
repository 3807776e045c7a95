"""Whether models are of one base: what differs, in words, before a tensor is read."""

from collections.abc import Iterator
from typing import Any

from mtl.merging.files import Stored
from mtl.merging.piece import MergeError

SHOWN = 5
# What a fine-tuning run or another version of transformers writes anew.
FREE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path")
# Of an adapter: what may differ between runs of one setup.
# The base's name may differ: sources.base_of_adapters compares it.
FREE_OF_ADAPTERS = ("base_model_name_or_path", "revision", "inference_mode", "lora_dropout")


def check(base: Stored, models: list[Stored]) -> None:
    """Compare every sub-model with the base, and their types with each other's.

    The base may be stored in another type: training started from it in the sub-models' type.

    Raises:
        MergeError: what differs, of each kind and model the first five; quantized weights.
    """
    lines = []
    for model in [base, *models]:
        # Codes and scales of packed weights have no mean.
        if "quantization_config" in model.json("config.json"):
            raise MergeError(
                f"{model.folder}: found quantized weights, wanted fp32, bf16 or fp16. Load it "
                "dequantized (transformers: model.dequantize()), save it, and merge that."
            )
    for model in models:
        kinds = {
            "config": _values(_config(base), _config(model), "the base", here="it"),
            "tensor": _names(base, model),
            "shape": _entries(base, model, "shape", "the base"),
            "vocabulary": _vocabulary(base, model),
            "dtype": _entries(models[0], model, "dtype", str(models[0].folder)),
        }
        lines += [line for kind, found in kinds.items() for line in _first(model, kind, found)]
    if lines:
        raise MergeError(
            f"The sub-models are not of the base {base.folder}, or not alike:\n"
            + "\n".join(lines)
            + "\nWanted: models fine-tuned from this base, stored in one type. Nothing was written."
        )


def check_adapters(models: list[Stored]) -> None:
    """Compare adapters with the first of them.

    Raises:
        MergeError: what differs.
    """
    first, lines = models[0], []
    for model in models[1:]:
        settings = [_settings(each) for each in (first, model)]
        kinds = {
            "setting": _values(*settings, str(first.folder), here="it"),
            "tensor": _names(first, model),
            "shape": _entries(first, model, "shape", str(first.folder)),
            "dtype": _entries(first, model, "dtype", str(first.folder)),
        }
        lines += [line for kind, found in kinds.items() for line in _first(model, kind, found)]
    if lines:
        raise MergeError("The adapters are not alike:\n" + "\n".join(lines))


def _first(model: Stored, kind: str, found: Iterator[str]) -> list[str]:
    every = list(found)
    more = [f"  ... and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return [f"  {model.folder}: {kind} {line}" for line in every[:SHOWN]] + more


def _config(model: Stored) -> dict[str, Any]:
    return {
        key: value
        for key, value in model.json("config.json").items()
        if key not in FREE and not key.endswith("_token_id")
    }


def _settings(model: Stored) -> dict[str, Any]:
    every = model.json("adapter_config.json")
    every = {k: sorted(v) if isinstance(v, list) else v for k, v in every.items()}
    return {key: value for key, value in every.items() if key not in FREE_OF_ADAPTERS}


def _values(theirs: dict, ours: dict, owner: str, here: str) -> Iterator[str]:
    """Keys that only one side has are left alone: versions of transformers write more or fewer."""
    for key in theirs:
        if key in ours and theirs[key] != ours[key]:
            yield f"{key}: {here} has {ours[key]!r}, {owner} {theirs[key]!r}"


def _names(base: Stored, model: Stored) -> Iterator[str]:
    for name in base.entries.keys() - model.entries.keys():
        yield f"{name} is missing"
    for name in model.entries.keys() - base.entries.keys():
        yield f"{name} is not in {base.folder}"


def _entries(base: Stored, model: Stored, what: str, owner: str) -> Iterator[str]:
    for name, entry in model.entries.items():
        other = base.entries.get(name)
        if other and getattr(other, what) != getattr(entry, what):
            theirs, ours = (_plain(getattr(each, what)) for each in (other, entry))
            yield f"of {name}: it has {ours}, {owner} {theirs}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _vocabulary(base: Stored, model: Stored) -> Iterator[str]:
    theirs, ours = (_tokens(each.json("tokenizer.json")) for each in (base, model))
    if theirs and ours:  # a folder without a tokenizer says nothing
        for token in theirs.keys() | ours.keys():
            if theirs.get(token) != ours.get(token):
                yield f"of {token!r}: it has id {ours.get(token)}, the base {theirs.get(token)}"


def _tokens(tokenizer: dict) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens", [])}
    return {**vocabulary, **added}
