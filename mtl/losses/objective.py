"""Objectives: from a model and a micro-batch to per-task terms.

An objective is one callable, `objective(forward, batch, k) -> Terms`. It calls `forward(**inputs)`
itself (once or more), because which inputs a model needs and which logits are worth computing
belong to the objective. `forward` is the engine's in training and the bare module's in evaluation.
"""

from collections.abc import Callable
from typing import Protocol

from mtl.data.collate import MicroBatch
from mtl.losses.terms import Terms

OBJECTIVES = {"causal_lm": "mtl.losses.causal_lm:causal_lm"}


class Objective(Protocol):
    def __call__(self, forward: Callable, batch: MicroBatch, k: int) -> Terms: ...
