"""What a run costs in forward-equivalents of a row, reckoned from its settings.

A training row counts 3 (forward, and backward at twice that), a row that is only read 1. Full
validation passes are left out: every arm has the same.
"""

from collections.abc import Collection

from balancers import Signal
from mtl import plugins
from mtl.config import Config
from mtl.data.plan import EVERY, PROBED

TRAINED, READ = 3, 1


def forward_equivalents(config: Config, steps: int, allow_code: Collection[str] = ()) -> int:
    """Of a run that took so many steps: training rows; the balancer's probes, second forwards of a
    batch, and gradients of the tasks.
    """
    needs = plugins.holder(config, allow_code).balancer.needs
    rows, k, probe = config.batch.examples, len(config.streams), config.evaluate.probe
    read = k * probe.examples if isinstance(probe.examples, int) else round(PROBED * rows)
    probes = -(-steps // (probe.every or EVERY[config.trains_adapter]))
    grams = -(-steps // config.gram.every)
    cost = steps * rows * TRAINED
    if Signal.VALID_LOSS in needs:
        cost += probes * read * READ
    if Signal.REPLAY_LOSS in needs:
        cost += steps * rows * READ
    if (Signal.GRAM | Signal.VALID_GRAM) & needs:
        cost += grams * rows * TRAINED
    if Signal.VALID_GRAM in needs:
        cost += grams * read * TRAINED
    return cost
