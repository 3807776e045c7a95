"""What balancers around another balancer share."""

from collections.abc import Mapping
from typing import Any

from balancers.methods import make
from balancers.protocol import Balancer, Signal, State


class Wrapper(Balancer):
    """A balancer around another one: reads its signals and promises what it promises of the
    weights.

    Args:
        balancer: the inner one, or its name, or a mapping of its name and keywords.
    """

    def __init__(self, balancer: Balancer | str | Mapping[str, Any]) -> None:
        self.balancer = make(balancer)

    @property
    def needs(self) -> Signal:
        return self.balancer.needs

    @property
    def sums_to_one(self) -> bool:
        return self.balancer.sums_to_one

    @property
    def non_negative(self) -> bool:
        return self.balancer.non_negative


def nested(state: State, prefix: str = "inner.") -> State:
    """The inner balancer's state, as part of the outer one's."""
    return {f"{prefix}{name}": array for name, array in state.items()}


def unnested(state: State, prefix: str = "inner.") -> State:
    """The inner balancer's state out of the outer one's."""
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
