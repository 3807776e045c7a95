"""Objectives: from a model and a micro-batch to per-task terms.

An objective is one callable, `objective(forward, batch, k) -> Terms`. It calls `forward(**inputs)` itself (once or more),
because which inputs a model needs and which logits are worth computing belong to the objective. `forward` is the engine's
in training and the bare module's in evaluation.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtl.data.collate import MicroBatch
from mtl.terms import Terms

SLICE = 2**25  # logits in fp32 at once: 128 MiB

OBJECTIVES = {"causal_lm": "mtl.objectives:causal_lm"}


class Objective(Protocol):
    def __call__(self, forward: Callable, batch: MicroBatch, k: int) -> Terms: ...


def causal_lm(forward: Callable, batch: MicroBatch, k: int) -> Terms:
    """Next-token cross-entropy, in fp32, on target tokens only.

    The head runs on the positions that predict a target and on no other (`logits_to_keep`), so the logits are (T, V), not
    (R, L, V). It also runs when T = 0: at ZeRO 3 every rank must gather the head's weights.
    """
    logits = forward(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.keep,
        use_cache=False,
    ).logits
    return Terms.by_task(token_losses(logits, batch.labels), batch.task, k)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, (T,) float32, nats, from logits (T, V) of any float dtype and labels (T,) int64.

    In slices of rows that are computed again in the backward pass: beside the logits and their gradient no (T, V) tensor is
    ever held, where plain cross-entropy holds a copy in fp32, its log-softmax and the gradients of both.
    """
    rows = max(1, SLICE // logits.shape[-1])
    slices = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(_token_losses, *part, use_reentrant=False, preserve_rng_state=False) for part in slices])


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
