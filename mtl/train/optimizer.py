"""The torch optimizer of a model, as `optimizer:` of the YAML says."""

from collections.abc import Callable

import torch
from torch import nn

from mtl.config import Config
from mtl.distributed.engine import shape


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices decay; vectors (norms, biases) do not, as is usual."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(shape(p)) < 2], "weight_decay": 0.0},
    ]
    return (
        [group for group in groups if group["params"]]
        if weight_decay
        else [{"params": trainable, "weight_decay": 0.0}]
    )


def optimizer(config: Config) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """A function from a model to its torch optimizer, as `optimizer:` says. The learning rate is
    set at each step.
    """
    o = config.optimizer

    def build(model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, o.weight_decay)
        if o.name == "sgd":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
        # Fused: one pass over memory instead of a dozen with a temporary each.
        return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)

    return build
