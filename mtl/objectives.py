"""Objectives: from a model and a micro-batch to per-task terms.

An objective is one callable, `objective(forward, batch, k) -> Terms`. It calls `forward(**inputs)` itself (once or more),
because which inputs a model needs and which logits are worth computing belong to the objective. `forward` is the engine's
in training and the bare module's in evaluation.
"""

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F

from mtl.data.collate import MicroBatch
from mtl.terms import Terms

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
    losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
    return Terms.by_task(losses, batch.task, k)
