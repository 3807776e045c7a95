"""What the trainer must compute, in plain PyTorch: one process, one example at a time, no padding, no packing.

Written from the formula alone; nothing here comes from `mtl`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Example = tuple[np.ndarray, np.ndarray, int]  # token ids (n,), target mask (n,) bool, task


@dataclass
class Trajectory:
    """What a run of updates leaves."""

    losses: np.ndarray  # (steps, K), nats per target token; nan = absent
    norms: np.ndarray  # (steps,), of the gradient before clipping
    parameters: dict[str, np.ndarray]  # at the end


def example_loss(model: nn.Module, ids: np.ndarray, target: np.ndarray) -> Tensor:
    """Minus the summed log-probability of the target tokens, each given all tokens before it."""
    logits = model(torch.as_tensor(ids.astype(np.int64))[None]).logits[0].float()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return -sum(log_p[j - 1, int(ids[j])] for j in np.flatnonzero(target))


def task_losses(
    model: nn.Module, examples: Sequence[Example], k: int
) -> tuple[list[Tensor | None], np.ndarray]:
    """Each task's loss (None = absent) and its number of target tokens."""
    tokens = np.array(
        [sum(int(target.sum()) for _, target, task in examples if task == i) for i in range(k)]
    )
    sums = [
        sum(example_loss(model, ids, target) for ids, target, task in examples if task == i)
        for i in range(k)
    ]
    return [s / int(n) if n else None for s, n in zip(sums, tokens, strict=True)], tokens


def weighted(losses: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """sum_k w_k loss_k over the tasks that are present."""
    return sum(float(w) * loss for w, loss in zip(weights, losses, strict=True) if loss is not None)


def gradient(
    model: nn.Module, examples: Sequence[Example], weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """Of the weighted loss over all examples, by parameter name."""
    model.zero_grad()
    weighted(task_losses(model, examples, len(weights))[0], weights).backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.requires_grad}


def train(
    model: nn.Module,
    batches: Sequence[Sequence[Example]],
    weights: Sequence[Sequence[float]],
    rates: Sequence[float],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    clip: float | None = None,
) -> Trajectory:
    """One optimizer update a batch, each with its own weights and learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(parameters)
    losses, norms = [], []
    for examples, w, rate in zip(batches, weights, rates, strict=True):
        optimizer.zero_grad()
        found, _ = task_losses(model, examples, len(w))
        weighted(found, w).backward()
        norms.append(
            float(
                torch.nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
            )
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append([np.nan if loss is None else loss.item() for loss in found])
    return Trajectory(np.array(losses), np.array(norms), state(model))


def transformers_loss_curve(
    model: nn.Module,
    batches: Sequence[Sequence[Example]],
    rates: Sequence[float],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The plain fine-tuning loop: `model(labels=...)` on right-padded batches, -100 where nothing is trained.

    Returns losses (steps,) and the parameters at the end.
    """
    optimizer = make(list(model.parameters()))
    curve = []
    for examples, rate in zip(batches, rates, strict=True):
        width = max(len(ids) for ids, _, _ in examples)
        ids, labels = (
            torch.zeros(len(examples), width, dtype=torch.long),
            torch.full((len(examples), width), -100),
        )
        mask = torch.zeros_like(ids)
        for row, (tokens, target, _) in enumerate(examples):
            n = len(tokens)
            ids[row, :n], mask[row, :n] = torch.as_tensor(tokens.astype(np.int64)), 1
            labels[row, :n] = torch.where(torch.as_tensor(target), ids[row, :n], -100)
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        curve.append(loss.item())
    return np.array(curve), state(model)


def state(model: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter by name."""
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
