"""Where each method lives: a literal table, read by ``balancers`` and by the trainer's
configuration.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from balancers.protocol import Balancer

METHODS: dict[str, str] = {
    "Apart": "balancers.apart:Apart",
    "Bounded": "balancers.bounded:Bounded",
    "CoBa": "balancers.coba:CoBa",
    "DWA": "balancers.dwa:DWA",
    "Equal": "balancers.equal:Equal",
    "FAMO": "balancers.famo:FAMO",
    "FAMOValid": "balancers.famo:FAMOValid",
    "GLS": "balancers.gls:GLS",
    "GradNorm": "balancers.gradnorm:GradNorm",
    "GradNormValid": "balancers.gradnorm:GradNormValid",
    "Grouped": "balancers.grouped:Grouped",
    "LBTW": "balancers.lbtw:LBTW",
    "LBTWValid": "balancers.lbtw:LBTWValid",
    "MetaWeighting": "balancers.metaweighting:MetaWeighting",
    "RLW": "balancers.rlw:RLW",
    "Scheduled": "balancers.scheduled:Scheduled",
    "Static": "balancers.static:Static",
    "Tokens": "balancers.tokens:Tokens",
    "TorchJD": "balancers.torchjd:TorchJD",
    "Uncertainty": "balancers.uncertainty:Uncertainty",
}


def method(name: str) -> type[Balancer]:
    """The class behind a name of the table, imported now. Raises KeyError."""
    module, attribute = METHODS[name].split(":")
    return getattr(import_module(module), attribute)


def make(given: Balancer | str | Mapping[str, Any]) -> Balancer:
    """A balancer, from itself, from a name of the table, or from a mapping with ``name`` and its
    keywords.

    Raises:
        ValueError: another name, keywords that do not fit, or something else altogether.
    """
    if isinstance(given, Balancer):
        return given
    keywords = (
        {"name": given}
        if isinstance(given, str)
        else dict(given)
        if isinstance(given, Mapping)
        else {}
    )
    name = keywords.pop("name", None)
    if name not in METHODS:
        raise ValueError(
            f"balancer {given!r}: wanted a Balancer, or one of the names {', '.join(METHODS)}, "
            "alone or as `name` "
            f"beside its keywords"
        )
    try:
        return method(name)(**keywords)
    except TypeError as error:
        raise ValueError(f"balancer {name}: its keywords do not fit: {error}") from error
