"""What `launch/check.py` prints, section by section, in the order in which it becomes known."""

from collections.abc import Callable, Iterator
from typing import Any

from mtl.check import dryrun
from mtl.config import Config, dump
from mtl.models.loaders import Loader

Section = tuple[str, list[str]]
"""A title, and lines."""


def everything(
    config: Config,
    origin: str,
    encode: Callable[[], dryrun.EncodedData],
    loader: Loader,
    balancer: Any,
    world: int,
    color: bool,
) -> Iterator[Section]:
    """All that can be said of a run without starting it.

    Args:
        origin: the YAML's path.
        encode: reads and encodes the rows; slow.
        balancer: the run's.
        world: processes of the run.
        color: whether targets are shown in green, else in brackets.
    """
    yield f"{origin}, with defaults", dump(config.resolved()).splitlines()
    data = encode()
    yield "Data", dryrun.data(data.tasks)
    yield "Batches", dryrun.batches(config, data, balancer, world)
    targets = "in green" if color else "in [[ ]]"
    for task, number in zip(data.tasks, data.goals.of, strict=True):
        shown = data.examples[number].show(task.train.columns(0), color)
        yield f"{task.name}: {task.train.where(0)}, targets {targets}", shown.splitlines()
    yield "Memory of one process", dryrun.needs(config, data, loader, world)
