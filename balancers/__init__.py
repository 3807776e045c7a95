"""Rules that weigh the losses of several tasks against each other. Needs numpy, nothing else.

>>> from balancers import CoBa, Holder, Signals
>>> holder = Holder(CoBa(window=40, warmup=15), ["code", "math"])
>>> weights = holder.update(Signals(step=0, valid_loss=[2.1, 1.4]))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balancers.holder import Holder
from balancers.protocol import Array, Balancer, Signal, Signals, State, describe

if TYPE_CHECKING:
    from balancers.coba import CoBa
    from balancers.equal import Equal
    from balancers.static import Static
    from balancers.tokens import Tokens

METHODS: dict[str, str] = {
    "CoBa": "balancers.coba:CoBa",
    "Equal": "balancers.equal:Equal",
    "Static": "balancers.static:Static",
    "Tokens": "balancers.tokens:Tokens",
}

__all__ = [
    "METHODS", "Array", "Balancer", "CoBa", "Equal", "Holder", "Signal", "Signals", "State", "Static", "Tokens",
    "describe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A method is imported when its name is asked for, so that one with an extra does not burden the others."""
    if name not in METHODS:
        raise AttributeError(f"module 'balancers' has no attribute {name!r}; the methods are {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    return getattr(import_module(module), attribute)
