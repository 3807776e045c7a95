"""What the recipes have in common."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from mtl.config import Config


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(..., H): the mean of (..., T, H) where the (..., T) mask is not 0; zeros where all is."""
    weights = mask.to(states)[..., None]
    return (states * weights).sum(-2) / weights.sum(-2).clamp(min=1)


def exported(names: Iterable[str | None], file: str) -> Path | None:
    """The first folder, of these or its `model/`, that holds the file a recipe's export has."""
    for name in filter(None, names):
        for folder in (Path(name).expanduser(), Path(name).expanduser() / "model"):
            if (folder / file).is_file():
                return folder
    return None


def adapters(config: Config, recipe: str, why: str) -> Iterator[str]:
    """A problem for each section of the config that adapts a model, which a recipe does itself."""
    m = config.model
    for key, found in (
        ("model.lora", m.lora), ("model.adapter", m.adapter), ("model.quantize", m.quantize),
    ):  # fmt: skip
        if found is not None:
            yield config.error(key, "a value", f"null with model.loader: {recipe}", why)
