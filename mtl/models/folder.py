"""An exported folder as a module: `mtl.load`."""

import importlib
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mtl.models import adapters
from mtl.models.errors import ModelError

LOADER = "loader.json"  # for a module that no class of transformers or PEFT opens
RECIPES = "mtl.recipes."  # whose classes need no leave: they are a part of this package


def note(module: nn.Module, loader: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """What `loader.json` says: the loader of the run, and the class that opens the folder."""
    kind = type(module)
    return {
        "loader": loader,
        "keywords": keywords,
        "class": f"{kind.__module__}:{kind.__qualname__}",
    }


def load(folder: str | os.PathLike[str], allow_code: Collection[str] = ()) -> nn.Module:
    """The model of an exported folder, or of a checkpoint's `model/`, in the dtype of its weights.

    It is a causal language model, a classifier of texts or a PEFT adapter on its base model. If the
    folder has a `loader.json`, the class named there makes it: `Class.from_pretrained(folder)`.

    Args:
        folder: what a run or `launch/export.py` wrote.
        allow_code: packages whose code `loader.json` may name. One in the current directory is
            found too.

    Raises:
        ModelError: there is no model in the folder, or its class is not allowed or cannot be
            imported.
    """
    path = Path(folder).expanduser()
    if (path / LOADER).is_file():
        return _kind(path / LOADER, allow_code).from_pretrained(path)
    if (path / "adapter_config.json").is_file():
        return adapters.opened(path)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: found no model in it, wanted a folder that a run exported, such as RUN/model."
        )
    kinds = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures")
    is_classifier = any(kind.endswith("ForSequenceClassification") for kind in kinds or ())
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    return auto.from_pretrained(path)


def _kind(path: Path, allow_code: Collection[str]) -> Any:
    """The class that `loader.json` names."""
    name = json.loads(path.read_text(encoding="utf-8"))["class"]
    module, _, attribute = name.partition(":")
    package = module.partition(".")[0]
    if package not in allow_code and not module.startswith(RECIPES):
        raise ModelError(
            f"{path}: class: found {name}, wanted code that is allowed. To let it run: "
            f"mtl.load(..., allow_code=[{package!r}])."
        )
    if str(Path.cwd()) not in sys.path:
        # At the end, so that nothing here hides an installed package.
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        found.from_pretrained  # noqa: B018, asked for now, for a clear error where it lacks it
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{path}: class: found {name}, wanted a class with from_pretrained: {error}"
        ) from error
    return found
