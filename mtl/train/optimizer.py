"""The torch optimizer of a model, as `optimizer:` of the YAML says."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mtl.config import Config, ConfigError
from mtl.distributed.engine import shape


def parameter_groups(
    model: nn.Module, weight_decay: float, scale: Mapping[str, float] | None = None
) -> list[dict]:
    """Groups of the trainable parameters. As usual, matrices decay and vectors (norms, biases) do
    not.

    Args:
        scale: factors on the learning rate by a regular expression, which is searched for in the
            names. The first that matches counts.

    Raises:
        ValueError: an expression matches no trainable parameter.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    unmatched = [x for x in scale or () if not any(re.search(x, name) for name in trainable)]
    if unmatched:
        some = ", ".join(list(trainable)[-3:])
        raise ValueError(
            f"found {unmatched[0]!r}, which matches no trainable parameter, wanted an expression "
            f"for names such as {some}"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trainable.items():
        factor = next((f for x, f in (scale or {}).items() if re.search(x, name)), 1.0)
        # `shape`, as a parameter that ZeRO 3 partitions has no shape of its own here.
        decay = weight_decay if len(shape(p)) >= 2 else 0.0
        # Minus, so that sorting puts the decaying matrices first.
        groups.setdefault((-decay, factor), []).append(p)
    return [
        {"params": params, "weight_decay": -decay, "scale": factor}
        for (decay, factor), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def optimizer(config: Config) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """A function from a model to its torch optimizer. The learning rate is set at each step."""
    o = config.optimizer

    def build(model: nn.Module) -> torch.optim.Optimizer:
        try:
            groups = parameter_groups(model, o.weight_decay, o.scale)
        except ValueError as error:
            place = config.where("optimizer.scale")
            raise ConfigError([f"{place}: optimizer.scale: {error}"]) from error
        if o.name == "sgd":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
        # Fused: one pass over memory instead of a dozen with a temporary each.
        return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)

    return build
