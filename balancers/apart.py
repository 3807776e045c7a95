"""Parts that share no parameters, each balanced by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from balancers.maths import positive
from balancers.protocol import Array, Balancer, Signals, State
from balancers.wrapper import Wrapper, nested, unnested


class Apart(Wrapper):
    """Each part has an inner balancer with a state of its own; its weights sum to the part's share.

    For losses whose parameters are disjoint (a classifier and a generator): weights between them
    only rescale their gradients, which Adam undoes. So only tasks of the same part are compared.

    Args:
        balancer: the inner one, or its name, or a mapping of its name and keywords. One whose
            scale carries meaning loses it.
        parts: a part's name to the names of its tasks. Every task is in exactly one part. A part of
            one task has its share as a constant weight, and no inner balancer.
        shares: a part's name to a number > 0, one for each part; brought to sum 1. None: equal.

    It needs task names, so a Holder.

    Explains: what the inner balancers explain, a part's value at each of its tasks; nan for a task
        whose part explains none.

    Raises:
        ValueError: parts that do not cover the tasks once each, shares that do not fit the parts,
            an inner balancer with negative weights.
    """

    sums_to_one: ClassVar[bool] = True

    def __init__(
        self,
        balancer: Balancer | str | Mapping[str, Any],
        parts: Mapping[str, Sequence[str]],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(balancer)
        if not self.balancer.non_negative:
            raise ValueError(
                f"Apart balancer: found {self.balancer.public().__name__}, whose weights may be "
                "negative, wanted shares"
            )
        if (
            not isinstance(parts, Mapping)
            or not parts
            or any(isinstance(each, str) or not each for each in parts.values())
        ):
            raise ValueError(
                f"Apart parts: found {parts!r}, wanted part names, each with a list of task names"
            )
        self.parts = {name: list(tasks) for name, tasks in parts.items()}
        self.shares = None if shares is None else _shares(shares, self.parts)
        self._members: list[tuple[Balancer | None, Array, float]] = []

    def settings(self) -> dict[str, Any]:
        return {"balancer": self.balancer, "parts": self.parts, "shares": self.shares}

    def bind(self, tasks: Sequence[str]) -> Self:
        _once_each(self.parts, tasks)
        bound = type(self)(self.balancer, self.parts, self.shares)
        shares = self.shares or dict.fromkeys(self.parts, 1.0)
        for name, listed in self.parts.items():
            members = [task for task in tasks if task in listed]
            inner = self.balancer.bind(members) if len(members) > 1 else None
            share = shares[name] / sum(shares.values())
            bound._members.append((inner, np.array([tasks.index(each) for each in members]), share))
        return bound

    def init(self, k: int) -> State:
        if not self._members:
            raise ValueError("Apart: found no task names, wanted a Holder around it")
        state: State = {}
        for i, (inner, members, _) in enumerate(self._members):
            if inner is not None:
                state |= nested(inner.init(len(members)), f"{i}.")
        return state

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        k = sum(len(members) for _, members, _ in self._members)
        following: State = {}
        weights, explain = np.empty(k), {}
        for i, (inner, members, share) in enumerate(self._members):
            if inner is None:
                weights[members] = share
                continue
            mine = unnested(state, f"{i}.")
            mine, inner_weights, reasons = inner.update(mine, _only(signals, members))
            following |= nested(mine, f"{i}.")
            total = inner_weights.sum()
            # Where the inner sum is 0 there are no proportions: equal ones.
            part = inner_weights / total if total > 0 else np.full(len(members), 1 / len(members))
            weights[members] = share * part
            for name, value in reasons.items():
                explain.setdefault(name, np.full(k, np.nan))[members] = value
        return following, weights, explain


def _shares(shares: Mapping[str, float], parts: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(shares, Mapping) or shares.keys() != parts.keys():
        raise ValueError(
            f"Apart shares: found {shares!r}, wanted a number for each of the parts {list(parts)}"
        )
    return {name: positive(f"Apart shares: part {name!r}", each) for name, each in shares.items()}


def _once_each(parts: Mapping[str, Sequence[str]], tasks: Sequence[str]) -> None:
    """Raise ValueError unless every task is in exactly one part, and nothing else is."""
    listed = [task for members in parts.values() for task in members]
    problems = (
        ("unknown tasks", [task for task in listed if task not in tasks]),
        ("tasks that are listed twice", [task for task in listed if listed.count(task) > 1]),
        ("tasks in no part", [task for task in tasks if task not in listed]),
    )
    for what, found in problems:
        if found:
            raise ValueError(
                f"Apart parts: found {what}, {list(dict.fromkeys(found))}, in {parts}, wanted each "
                f"of {list(tasks)} in exactly one part; a part may have one task alone"
            )


def _only(signals: Signals, members: Array) -> Signals:
    """The signals of these tasks."""
    # (K,) and (K, K) alike: ix_ picks members along every axis.
    arrays = {
        field.name: value[np.ix_(*[members] * value.ndim)]
        for field in fields(signals)
        if isinstance(value := getattr(signals, field.name), np.ndarray)
    }
    return replace(signals, **arrays)
