"""Parameter selection: every coordinate from one sub-model, drawn by lot."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.merging.piece import MergeError, TensorPiece, shares

UNITS = ("element", "row", "tensor", "module", "layer")
_LAYER = re.compile(r"(.*?\.\d+)\.")


def select(
    piece: TensorPiece,
    *,
    weights: Sequence[float] | None = None,
    granularity: str = "element",
    resample: str | int = "none",
) -> Tensor:
    """(...) `theta_d = theta_{i,d}` for one sub-model i, drawn for each unit with probability p_i.

    Args:
        weights: the p_i, K, brought to sum 1; None: equal.
        granularity: what is drawn for: element; row (of the first dimension); tensor; module (its
            weight, bias and adapters together); layer (a block of the model).
        resample: what happens to a unit that is still the base's in the drawn sub-model. none: it
            stays. A number: so many draws more, with replacement. exhaustive: drawn among the
            sub-models that changed it.

    Source: Ju et al., EMNLP 2024 (arXiv 2410.03743); rows and larger units are ours. Zero deltas
    come from storage in bf16: in fp32 there are hardly any, and resampling does nothing.
    """
    if granularity not in UNITS:
        raise MergeError(f"granularity: found {granularity!r}, wanted one of {', '.join(UNITS)}.")
    is_count = isinstance(resample, int) and not isinstance(resample, bool) and resample >= 0
    if resample not in ("none", "exhaustive") and not is_count:
        raise MergeError(
            f"resample: found {resample!r}, wanted none, exhaustive, or a number of rounds."
        )
    rounds, p = resample if is_count else 0, shares(weights, piece.k)
    if granularity in ("module", "layer") and resample not in ("none", 0):
        raise MergeError(
            f"resample: found {resample!r}, wanted none: granularity {granularity} draws for "
            "several tensors at once, and which of them changed is not known together."
        )
    random = piece.generator(unit_of(piece.name, granularity))
    # Comparing costs K passes over the tensor: only where something is drawn again.
    changed = None
    if rounds or resample == "exhaustive":
        changed = [_by_unit(model != piece.base, granularity) for model in piece.models]
    draw = _draw(piece, granularity, random)
    index = _choice(draw, p, changed if resample == "exhaustive" else None)
    for _ in range(rounds):
        # Drawn for all units, though few need it: the numbers do not depend on the data.
        again = _choice(_draw(piece, granularity, random), p)
        index = torch.where(_pick(changed, index), index, again)
    return _pick(piece.models, index)


def unit_of(name: str, granularity: str) -> str:
    """What draws together with a tensor: itself, its module or its block."""
    if granularity == "module":
        return re.split(r"\.lora_|\.[^.]*$", name, maxsplit=1)[0]
    found = _LAYER.match(name) if granularity == "layer" else None
    return found[1] if found else name


def _draw(piece: TensorPiece, granularity: str, random: torch.Generator) -> Tensor:
    """Uniform numbers in a shape that broadcasts to the tensor's: one for each unit."""
    shape, dims = piece.base.shape, piece.base.dim()
    if granularity == "row" and dims:
        shape = (shape[0], *[1] * (dims - 1))
    elif granularity != "element":
        shape = (1,) * dims
    return torch.rand(shape, generator=random)


def _choice(u: Tensor, p: Sequence[float], among: Sequence[Tensor] | None = None) -> Tensor:
    """uint8 like u: which sub-model each number in [0, 1) means, by the cumulated p."""
    # One number, or one for each unit: float32 in both cases, so that they round alike.
    share = [torch.tensor(each, dtype=u.dtype) for each in p]
    zero = u.new_zeros(u.shape if among is not None else ())
    total, below, index = zero, zero, torch.zeros_like(u, dtype=torch.uint8)
    for i, each in enumerate(share):
        total = total + (each if among is None else among[i] * each)
    scaled = u * total
    # The last share ends at the total, so nothing lies above it.
    for i, each in enumerate(share[:-1]):
        below = below + (each if among is None else among[i] * each)
        index += scaled >= below
    if among is not None:  # rounding at the upper end must not choose one that is not among them
        for i, allowed in enumerate(among):
            index = torch.where(_pick(among, index) | ~allowed, index, i).to(torch.uint8)
    return index


def _pick(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """Elements of the tensor that `index` names."""
    found = tensors[0]
    for i, tensor in enumerate(tensors[1:], start=1):
        found = torch.where(index == i, tensor, found)
    return found.broadcast_to(torch.broadcast_shapes(found.shape, index.shape))


def _by_unit(changed: Tensor, granularity: str) -> Tensor:
    """Whether anything in a unit changed, in the shape of `_draw`."""
    if granularity == "row" and changed.dim() > 1:
        return changed.flatten(1).any(1).view(-1, *[1] * (changed.dim() - 1))
    return changed.any().view((1,) * changed.dim()) if granularity == "tensor" else changed
