"""Several tasks that count as one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from balancers.maths import latest
from balancers.protocol import Array, Balancer, Signals, State
from balancers.wrapper import Wrapper, nested, unnested

LOSSES = ("train_loss", "valid_loss", "valid_base", "replay_loss")
GRAMS = ("gram", "valid_gram")


class Grouped(Wrapper):
    """The inner balancer sees each group as one task, and a group's weight is dealt equally to its
    tasks.

    Args:
        balancer: the inner one, or its name, or a mapping of its name and keywords.
        groups: a group's name to the names of its tasks; a task in no group is a group of its own,
            under its name.

    A group's loss is the mean of its tasks' losses, an absent task counting with its last one as
    long as another is there; its tokens are the sum; its gradient is the mean of its tasks'
    gradients. It needs task names, so a Holder.

    Explains: what the inner balancer explains, a group's value at each of its tasks.
    """

    def __init__(
        self, balancer: Balancer | str | Mapping[str, Any], groups: Mapping[str, Sequence[str]]
    ) -> None:
        super().__init__(balancer)
        if not isinstance(groups, Mapping) or any(
            isinstance(each, str) or not each for each in groups.values()
        ):
            raise ValueError(
                f"Grouped groups: found {groups!r}, wanted group names, each with a list of task "
                "names"
            )
        self.groups = {name: list(tasks) for name, tasks in groups.items()}
        self._of: np.ndarray | None = None  # (K,) the group of each task

    @classmethod
    def of(cls, balancer: Balancer, group_of: Mapping[str, str | None]) -> Balancer:
        """The balancer over the groups that tasks name; as it is where none names one.

        Args:
            group_of: a task's name to its group's; None: it is in none.
        """
        groups: dict[str, list[str]] = {}
        for task, group in group_of.items():
            if group is not None:
                groups.setdefault(group, []).append(task)
        return cls(balancer, groups) if groups else balancer

    def settings(self) -> dict[str, Any]:
        return {"balancer": self.balancer, "groups": self.groups}

    def bind(self, tasks: Sequence[str]) -> Self:
        group_of = {task: name for name, members in self.groups.items() for task in members}
        listed = sum(len(members) for members in self.groups.values())
        taken = set(self.groups) & (set(tasks) - set(group_of))
        if len(group_of) < listed or not group_of.keys() <= set(tasks) or taken:
            raise ValueError(
                f"Grouped groups: found {self.groups}, wanted tasks of {list(tasks)}, each in one "
                "group at most, and "
                f"no group with the name of a task outside it"
            )
        names = [group_of.get(task, task) for task in tasks]
        order = list(dict.fromkeys(names))  # by the first task of each
        bound = type(self)(self.balancer.bind(order), self.groups)
        bound._of = np.array([order.index(name) for name in names])
        return bound

    def init(self, k: int) -> State:
        if self._of is None:
            raise ValueError("Grouped: found no task names, wanted a Holder around it")
        return {
            **{name: np.full(k, np.nan) for name in LOSSES},
            **nested(self.balancer.init(1 + self._of.max())),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        # (groups, K): 1 where the task is of the group
        member = (np.arange(1 + self._of.max())[:, None] == self._of).astype(np.float64)
        size = member.sum(axis=1)
        mean = member / size[:, None]
        seen = {}
        for name in LOSSES:
            loss = getattr(signals, name)
            if loss is not None:
                state[name] = latest(state[name], loss)
                # Absent where all its tasks are; else an absent task counts with its last loss.
                seen[name] = np.where(
                    member @ ~np.isnan(loss) > 0, _mean(member, state[name]), np.nan
                )
        for name in GRAMS:
            gram = getattr(signals, name)
            if gram is not None:
                # Products of the groups' mean gradients are means of the tasks' products.
                seen[name] = mean @ gram @ mean.T
        if signals.tokens is not None:
            seen["tokens"] = member @ signals.tokens
        inner, weights, explain = self.balancer.update(unnested(state), replace(signals, **seen))
        # Scalars belong to no group.
        explain = {name: each[self._of] if each.ndim else each for name, each in explain.items()}
        return (
            {**{name: state[name] for name in LOSSES}, **nested(inner)},
            (weights / size)[self._of],
            explain,
        )


def _mean(member: Array, loss: Array) -> Array:
    """(groups,) mean over the tasks of a group with a loss; nan without any."""
    known = ~np.isnan(loss)
    count = member @ known
    total = member @ np.where(known, loss, 0.0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
