"""What the YAML may name (balancer, objective, formats, trackers), and reading it with all of that
checked at once.
"""

import sys
from collections.abc import Collection
from pathlib import Path

from balancers import METHODS, Balancer, Grouped, Holder
from mtl.config import Config, ConfigError, load
from mtl.config.spec import Kind, check, resolve
from mtl.data.formats import FORMATS, Format
from mtl.losses.objective import OBJECTIVES
from mtl.output.trackers import TRACKERS

BALANCER = Kind(METHODS, base=Balancer, build=True, inner="balancer")
OBJECTIVE = Kind(OBJECTIVES, arguments=3)
FORMAT = Kind(FORMATS, arguments=1)
TRACKER = Kind(TRACKERS, keywords=("output", "steps", "start"))
KINDS = {
    "balancer": BALANCER,
    "objective": OBJECTIVE,
    "tasks.*.format": FORMAT,
    "trackers.*": TRACKER,
}


def read(path: str, overrides: Collection[str] = (), allow_code: Collection[str] = ()) -> Config:
    """`config.load`, with wrong names and keywords of balancer, objective, formats and trackers
    reported beside the rest.

    Args:
        path: the YAML file.
        overrides: `key.path=value`.
        allow_code: packages outside this one whose code the YAML may name; one in the current
            directory is found too.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    if allow_code and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: nothing here replaces what is installed
    config = load(path, overrides, check(KINDS, allow_code))
    holder(config, allow_code)
    return config


def holder(config: Config, allow_code: Collection[str] = ()) -> Holder:
    """The balancer with its tasks, those of a `group` counting as one.

    Raises:
        ConfigError: the balancer does not fit the tasks: their number, their names, their groups.
    """
    balancer, groups = resolve(config, "balancer", BALANCER, allow_code)(), {}
    for name, task in config.tasks.items():
        if task.group is not None:
            groups.setdefault(task.group, []).append(name)
    try:
        weights = [task.loss_weight for task in config.tasks.values()]
        return Holder(
            Grouped(balancer, groups) if groups else balancer, list(config.tasks), weights
        )
    except ValueError as error:
        raise ConfigError([f"{config.where('balancer')}: balancer: {error}"]) from error


def formats(config: Config, allow_code: Collection[str] = ()) -> dict[str, Format]:
    """Each task's format, its keywords bound."""
    return {
        name: resolve(config, ("tasks", name, "format"), FORMAT, allow_code)
        for name in config.tasks
    }
