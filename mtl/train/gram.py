"""The Gramian of the tasks' gradients: each task's own backward over its own rows, all-reduced,
then multiplied.

    gram[i, j] = <grad L_i, grad L_j>    L_i: task i's loss over the global batch, nats per token

Gradients are taken by `torch.autograd.grad` through the bare module. Through the engine's output it
raises at ZeRO 0, 2 and 3. At ZeRO 1 it silently spoils both the Gramian and the update. We sum over
ranks first: one rank's gradients alone belong to other losses.

Memory: every rank's device holds K whole fp32 gradients of the chosen parameters (`valid_gram`: 2
K), and the one being computed. ZeRO 3 does not partition them.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from balancers import Signal
from mtl.config import Config, ConfigError
from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.distributed.engine import Engine, shape
from mtl.losses.objective import Objective
from mtl.models.structure import blocks

MEASURED = (
    Signal.TOKENS
    | Signal.TRAIN_LOSS
    | Signal.VALID_LOSS
    | Signal.GRAM
    | Signal.REPLAY_LOSS
    | Signal.VALID_GRAM
)  # by the trainer, for a balancer that declares it
CHUNK = 2**20  # gradient entries converted at a time: products are summed in fp64


def select(module: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The trainable parameters a Gramian covers, by name.

    Args:
        which: "all"; "last_layer": those of the last block of the model's longest list of blocks;
            "adapter": LoRA's; else a regular expression that is searched for in the names.

    Raises:
        ValueError: there are none.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    match which:
        case "all":
            chosen = trainable
        case "last_layer":
            name, layers = blocks(module)
            prefix = f"{name}.{len(layers) - 1}."
            chosen = {n: p for n, p in trainable.items() if len(layers) and n.startswith(prefix)}
        case "adapter":
            chosen = {n: p for n, p in trainable.items() if "lora_" in n}
        case _:
            chosen = {n: p for n, p in trainable.items() if re.search(which, n)}
    if not chosen:
        some = ", ".join(list(trainable)[-3:])
        raise ValueError(
            f"found {which!r}, which no trainable parameter matches, wanted all, last_layer, "
            "adapter (with model.lora) "
            f"or a regular expression for names such as {some}"
        )
    return chosen


def supply(needs: Signal, module: nn.Module, config: Config) -> list[nn.Parameter]:
    """The parameters to differentiate by for a balancer with these needs. None where it reads no
    Gramian.

    Raises:
        ConfigError: `gram.params` matches no trainable parameter, or the balancer needs what this
            trainer does not measure.
    """
    unknown = needs & ~MEASURED
    if unknown:
        found = f"{config.balancer.name}, which needs {unknown}"
        raise ConfigError(
            [config.error("balancer", found, f"one that needs nothing but {MEASURED}")]
        )
    if not needs & (Signal.GRAM | Signal.VALID_GRAM):
        return []
    try:
        return list(select(module, config.gram.params).values())
    except ValueError as error:
        place = config.where("gram.params")
        raise ConfigError([f"{place}: gram.params: {error}"]) from error


def gradients(
    engine: Engine,
    objective: Objective,
    tasks: Sequence[Sequence[Batch]],
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Each task's gradient over all ranks, (K, N) fp32 on the engine's device; zeros for a task
    without targets. A collective.

    The module runs in the mode it is in (`engine.train()`, `engine.eval()`). No parameter's `.grad`
    is touched.

    Args:
        tasks: K lists of this rank's micro-batches, the k-th with targets of task k only, as long
            on every rank.
        parameters: those to differentiate by; N is their elements' number.
    """
    k = len(tasks)
    count = torch.stack(
        [
            sum((micro.counts(k) for micro in mine), torch.zeros(k, dtype=torch.int64))
            for mine in tasks
        ]
    )
    # List i has targets of task i only, so the diagonal is all there is.
    tokens = comm.sum_(count.diagonal().clone())
    sizes = [shape(p).numel() for p in parameters]
    found = torch.zeros(k, sum(sizes), dtype=torch.float32, device=engine.device)
    # The counts are global, so every rank leaves out the same tasks: a collective follows.
    for i, mine in enumerate(tasks):
        if not tokens[i]:
            continue
        # Views of the row: what is added to a part stands in `found`.
        parts = found[i].split(sizes)
        for micro in mine:
            loss = objective(engine.evaluate, micro.to(engine.device), k).sums[i] / tokens[i].to(
                engine.device
            )
            for part, gradient in zip(parts, engine.gradients(loss, parameters), strict=True):
                if gradient is not None:  # None: this micro-batch did not use the parameter
                    part += gradient.reshape(-1)
        comm.sum_(found[i])
    return found


def products(rows: Tensor, columns: Tensor) -> np.ndarray:
    """(K, K) float64: inner products of two sets of gradients, (K, N) each."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows.device)
    for one, other in zip(rows.split(CHUNK, dim=1), columns.split(CHUNK, dim=1), strict=True):
        total += one.double() @ other.double().T
    return total.cpu().numpy()
