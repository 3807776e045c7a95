"""Objectives: from a model and a micro-batch to per-task terms.

An objective is one callable, `objective(forward, batch, k) -> Terms`: a function with its keywords,
or an instance of a class. It calls `forward(**inputs)` itself, once. So it decides which inputs a
model gets and which logits are computed. `forward` is the engine's in training and the bare
module's in evaluation. An objective may have these attributes:

    losses      names of its losses; the first is that of a task with rows. Default: ("loss",)
    unit        what is counted: losses are nats for each of these. Default: "target token"
    examples    examples(book, tokenizer, config) -> Examples: how rows are encoded and collated.
                Default: next-token prediction
    measures    name -> Measure: what validation reports beside losses. Default: none
    reference   reference(forward, batch) -> (B, m): what the model says of each of a batch's B
                pieces. It is asked once, of the starting model, before step 1 (train/reference.py);
                from then on a piece has the answer as its column "reference". Default: none
    teacher     teacher(forward, batch) -> (ids, log_p): what is kept of the model's distributions
                at a batch's targets (losses/teacher.py). A piece that has it back as columns is
                then trained on the divergence from it. Default: none
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtl.data.examples import LOSS, Batch
from mtl.losses.terms import Terms

# Text, resolved when used: this floor cannot import mtl.recipes.
OBJECTIVES = {
    "causal_lm": "mtl.losses.causal_lm:causal_lm",
    "classification": "mtl.losses.classification:Classification",
    "preference": "mtl.losses.preference:Preference",
    "kpe": "mtl.recipes.kpe.objective:KPE",
    "zeroae_classify": "mtl.recipes.zeroae.objective:Classify",
    "zeroae_generate": "mtl.recipes.zeroae.objective:Generate",
}


class Objective(Protocol):
    def __call__(self, forward: Callable, batch: Batch, k: int) -> Terms: ...


@dataclass(frozen=True)
class Measure:
    """What validation reports of a task beside its loss, computed from sums over all its examples.

    Attributes:
        value: turns a task's (m,) float64 sums into a number; nan where the task has none. They are
            `Terms.measures[name][task]`, added up.
        highest: whether more is better.
    """

    value: Callable[[np.ndarray], float]
    highest: bool = True


def ratio(sums: np.ndarray) -> float:
    """The first sum over the second, such as right answers over all."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


def losses_of(objective: Any) -> tuple[str, ...]:
    return tuple(getattr(plain(objective), "losses", (LOSS,)))


def unit_of(objective: Any) -> str:
    return getattr(plain(objective), "unit", "target token")


def measures_of(objective: Any) -> Mapping[str, Measure]:
    return getattr(plain(objective), "measures", {})


def maker_of_examples(objective: Any) -> Callable[..., Any] | None:
    """`examples(book, tokenizer, config)` of the objective; None: next-token prediction."""
    return getattr(plain(objective), "examples", None)


def reference_of(objective: Any) -> Callable[..., Tensor] | None:
    """`reference(forward, batch)` of the objective, where it compares with the starting model."""
    return getattr(plain(objective), "reference", None)


def teacher_of(objective: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`teacher(forward, batch)` of the objective, where it can hold a task to its own best."""
    return getattr(plain(objective), "teacher", None)


def plain(named: Any) -> Any:
    """What the YAML names, without its keywords: a partial hides its function's attributes."""
    return getattr(named, "func", named)


class Objectives:
    """A run's objectives as one: each batch goes to its own."""

    def __init__(self, each: Sequence[Objective]):
        self.each = list(each)

    @property
    def measures(self) -> dict[str, Measure]:
        return {name: one for each in self.each for name, one in measures_of(each).items()}

    def __call__(self, forward: Callable, batch: Batch, k: int) -> Terms:
        objective = self.each[batch.objective]
        # Every batch is checked: what an objective returns may depend on it.
        found, measures = objective(forward, batch, k), measures_of(objective)
        terms = check_terms(found, k, _name(objective), measures)
        return terms.silenced() if batch.is_dummy else terms


def check_terms(terms: Any, k: int, name: str, measures: Collection[str] = ()) -> Terms:
    """What the objective of this name returned, if it is Terms of K tasks.

    Sums of shape (1,) would silently be added to every task. We look at shapes and dtypes only, so
    no device waits.

    Args:
        measures: names that `Terms.measures` may have.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(terms, Terms):
        found = type(terms).__name__
        raise ValueError(f"objective {name}: returned {found}, wanted mtl.losses.terms.Terms")
    _check(name, "sums", terms.sums, (k,))
    _check(name, "counts", terms.counts, (k,))
    for which, penalty in terms.penalties.items():
        _check(name, f"penalties[{which!r}]", penalty, ())
    for which, sums in terms.measures.items():
        if which not in measures:
            known = ", ".join(map(repr, measures)) or "none"
            raise ValueError(
                f"objective {name}: Terms.measures has {which!r}, wanted names of its attribute "
                f"`measures`: {known}"
            )
        if not (isinstance(sums, Tensor) and sums.ndim == 2 and len(sums) == k):
            raise ValueError(
                f"objective {name}: Terms.measures[{which!r}] is {_seen(sums)}, wanted a tensor "
                f"of shape ({k}, m)"
            )
    return terms


def _check(name: str, what: str, found: Any, shape: tuple[int, ...]) -> None:
    kind = "int64" if what == "counts" else "floating-point"
    if isinstance(found, Tensor):
        fits = found.dtype == torch.int64 if what == "counts" else found.is_floating_point()
        if found.shape == shape and fits:
            return
    raise ValueError(
        f"objective {name}: Terms.{what} is {_seen(found)}, wanted a tensor ({kind}) of shape "
        f"{shape}"
    )


def _seen(found: Any) -> str:
    is_tensor = isinstance(found, Tensor)
    return f"{found.dtype} {tuple(found.shape)}" if is_tensor else type(found).__name__


def _name(objective: Any) -> str:
    bare = plain(objective)
    return getattr(bare, "__name__", type(bare).__name__)
