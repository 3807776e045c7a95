"""What several methods need."""

import numpy as np
from numpy.typing import NDArray

from balancers.protocol import Array, State


def softmax(logit: Array, where: NDArray[np.bool_] | bool = True) -> Array:
    """softmax of (K,) over the entries ``where``; the others are nan. Rising logits never
    overflow.
    """
    exp = np.exp(
        logit - np.max(logit, initial=-np.inf, where=where),
        out=np.full_like(logit, np.nan),
        where=where,
    )
    return exp / np.nansum(exp)


def positive(what: str, value: float) -> float:
    """``value`` if it is a finite number > 0; a ValueError that begins with ``what`` if it is
    not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ValueError(f"{what}: found {value!r}, wanted a finite number > 0")
    return value


def whole(what: str, value: int) -> int:
    """``value`` if it is a whole number >= 1; a ValueError that begins with ``what`` if it is
    not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what}: found {value!r}, wanted a whole number >= 1")
    return value


def latest(old: Array, new: Array) -> Array:
    """(K,) ``new``, and ``old`` where the task is absent (nan)."""
    return np.where(np.isnan(new), old, new)


def share(weights: Array, seen: NDArray[np.bool_]) -> Array:
    """(K,) of sum 1: 1/K for a task not seen yet, and the rest shared in the proportions of
    ``weights`` >= 0.
    """
    total = weights[seen].sum()
    # `not > 0` holds for nan too.
    if not total > 0:
        return np.full(len(weights), 1 / len(weights))
    return np.where(seen, weights / total * seen.mean(), 1 / len(weights))


def adam_init(k: int) -> State:
    return {"adam_mean": np.zeros(k), "adam_square": np.zeros(k), "adam_steps": np.zeros(k)}


def adam_step(state: State, gradient: Array, where: NDArray[np.bool_]) -> Array:
    """What Adam (Kingma and Ba 2015, betas 0.9 and 0.999, eps 1e-8) subtracts at learning rate 1;
    moments in ``state``.

    Entries not in ``where`` neither move nor count: an absent task's moments would otherwise fade.
    """
    for name, beta, value in (
        ("adam_mean", 0.9, gradient),
        ("adam_square", 0.999, gradient * gradient),
    ):
        state[name] = np.where(where, beta * state[name] + (1 - beta) * value, state[name])
    state["adam_steps"] = state["adam_steps"] + where
    # At least 1: a task that was never there has made no step.
    steps = np.maximum(state["adam_steps"], 1)
    mean, square = state["adam_mean"] / (1 - 0.9**steps), state["adam_square"] / (1 - 0.999**steps)
    return np.where(where, mean / (np.sqrt(square) + 1e-8), 0.0)
