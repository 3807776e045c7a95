"""Rules that weigh the losses of several tasks against each other. Needs numpy, nothing else.

>>> from balancers import CoBa, Holder, Signals
>>> holder = Holder(CoBa(window=40, warmup=15), ["code", "math"])
>>> weights = holder.update(Signals(step=0, valid_loss=[2.1, 1.4]))
"""

from typing import TYPE_CHECKING, Any

from balancers.holder import Holder
from balancers.methods import METHODS, make, method
from balancers.protocol import Array, Balancer, Signal, Signals, State, describe

if TYPE_CHECKING:
    from balancers.apart import Apart
    from balancers.bounded import Bounded
    from balancers.coba import CoBa
    from balancers.dwa import DWA
    from balancers.equal import Equal
    from balancers.famo import FAMO, FAMOValid
    from balancers.gls import GLS
    from balancers.gradnorm import GradNorm, GradNormValid
    from balancers.grouped import Grouped
    from balancers.lbtw import LBTW, LBTWValid
    from balancers.metaweighting import MetaWeighting
    from balancers.rlw import RLW
    from balancers.scheduled import Scheduled
    from balancers.static import Static
    from balancers.tokens import Tokens
    from balancers.torchjd import TorchJD
    from balancers.uncertainty import Uncertainty

__all__ = [
    "METHODS",
    "Apart",
    "Array",
    "Balancer",
    "Bounded",
    "CoBa",
    "DWA",
    "Equal",
    "FAMO",
    "FAMOValid",
    "GLS",
    "GradNorm",
    "GradNormValid",
    "Grouped",
    "Holder",
    "LBTW",
    "LBTWValid",
    "MetaWeighting",
    "RLW",
    "Scheduled",
    "Signal",
    "Signals",
    "State",
    "Static",
    "Tokens",
    "TorchJD",
    "Uncertainty",
    "describe",
    "make",
]


def __getattr__(name: str) -> Any:
    """A method is imported when its name is asked for, so that one with an extra does not burden
    the others.
    """
    if name not in METHODS:
        raise AttributeError(
            f"module 'balancers' has no attribute {name!r}; the methods are {', '.join(METHODS)}"
        )
    return method(name)
