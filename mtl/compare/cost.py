"""What a run costs in forward-equivalents of a row, reckoned from its settings.

A training row counts 3 (forward, and backward at twice that), a row that is only read 1. Full
validation passes are left out: every arm has the same.
"""

import json
from collections.abc import Collection
from pathlib import Path

from balancers import Signal
from mtl import plugins
from mtl.config import Config
from mtl.data.plan import EVERY, PROBED

TRAINED, READ = 3, 1


def forward_equivalents(
    config: Config, steps: int, allow_code: Collection[str] = (), teacher_rows: int = 0
) -> int:
    """Of a run that took so many steps: training rows; the balancer's probes, second forwards of a
    batch, and gradients of the tasks. A batch has as many rows whichever tasks are drawn.

    Args:
        steps: taken, which are fewer than planned where all tasks were done.
        teacher_rows: that the best weights of tasks have read, for `action: anchor`.
    """
    needs = plugins.holder(config, allow_code).balancer.needs
    rows, k, probe = config.batch.examples, len(config.streams), config.evaluate.probe
    read = k * probe.examples if isinstance(probe.examples, int) else round(PROBED * rows)
    # By the least interval; a run whose probes read more rows probes less often.
    probes = -(-steps // (probe.every or EVERY[config.trains_adapter]))
    grams = -(-steps // config.gram.every)
    cost = steps * rows * TRAINED + teacher_rows * READ
    if Signal.VALID_LOSS in needs:
        cost += probes * read * READ
    if Signal.REPLAY_LOSS in needs:
        cost += steps * rows * READ
    if (Signal.GRAM | Signal.VALID_GRAM) & needs:
        cost += grams * rows * TRAINED
    if Signal.VALID_GRAM in needs:
        cost += grams * read * TRAINED
    return cost


def pilot_cost(config: Config) -> int:
    """Of the run whose result tells this one when its tasks are done
    (`evaluate.patience: {from: ...}`); 0: there is none, or no result of a study.
    """
    patience = config.evaluate.patience
    source = getattr(patience, "from", None)
    if source is None or not source.endswith(".json"):
        return 0
    return json.loads(Path(source).read_text(encoding="utf-8"))["cost"]
