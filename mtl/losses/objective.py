"""Objectives: from a model and a micro-batch to per-task terms.

An objective is one callable, `objective(forward, batch, k) -> Terms`. It calls `forward(**inputs)`
itself (once or more), because which inputs a model needs and which logits are worth computing
belong to the objective. `forward` is the engine's in training and the bare module's in evaluation.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mtl.data.collate import MicroBatch
from mtl.losses.terms import Terms

OBJECTIVES = {"causal_lm": "mtl.losses.causal_lm:causal_lm"}


class Objective(Protocol):
    def __call__(self, forward: Callable, batch: MicroBatch, k: int) -> Terms: ...


def checked(objective: Objective, name: str) -> Objective:
    """The objective, with what it returns checked: sums of shape (1,) would be added to every task
    in silence. Only shapes and dtypes are looked at, so no device waits.

    Raises:
        ValueError: at a call that returns anything but Terms of K tasks.
    """

    @functools.wraps(objective, updated=())
    def call(forward: Callable, batch: MicroBatch, k: int) -> Terms:
        terms = objective(forward, batch, k)
        if not isinstance(terms, Terms):
            raise ValueError(
                f"objective {name}: returned {type(terms).__name__}, wanted mtl.losses.terms.Terms"
            )
        _check(name, "sums", terms.sums, (k,), lambda dtype: dtype.is_floating_point)
        _check(name, "counts", terms.counts, (k,), lambda dtype: dtype == torch.int64)
        for which, penalty in terms.penalties.items():
            _check(
                name, f"penalties[{which!r}]", penalty, (), lambda dtype: dtype.is_floating_point
            )
        return terms

    return call


def _check(
    name: str, what: str, found: object, shape: tuple, fits: Callable[[torch.dtype], bool]
) -> None:
    if not isinstance(found, Tensor) or found.shape != shape or not fits(found.dtype):
        seen = (
            f"{found.dtype} {tuple(found.shape)}"
            if isinstance(found, Tensor)
            else type(found).__name__
        )
        kind = "int64" if what == "counts" else "floating-point"
        raise ValueError(
            f"objective {name}: Terms.{what} is {seen}, wanted a tensor ({kind}) of shape {shape}"
        )
