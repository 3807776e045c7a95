"""What stands at the end of a run: its table, and the exported model."""

import sys
from collections.abc import Sequence

from mtl.config import Config
from mtl.output import report
from mtl.output.checkpoint import Checkpoints
from mtl.output.export import export
from mtl.output.trackers import Tracker


def close(trackers: Sequence[Tracker]) -> None:
    """Let every tracker write what it still holds."""
    for tracker in trackers:
        tracker.close()


def finish(config: Config, checkpoints: Checkpoints, trackers: Sequence[Tracker]) -> None:
    """Close the trackers, print the run's table and export its model. On rank 0."""
    close(trackers)
    try:
        print(report.table(report.read(checkpoints.output)), flush=True)
    except ValueError as error:  # the model does not depend on the log
        print(f"no table of the run: {error}", file=sys.stderr, flush=True)
    which = config.export.which
    if which != "none":
        found = checkpoints.exported(which)
        if found is None:
            raise ValueError(f"{checkpoints.folder}: holds no checkpoint to export any more.")
        source, weights = found
        what = f"{which} model"
        if which == "best" and checkpoints.best is None:
            key = config.evaluate.best
            what = f"no step was better than the start (by evaluate.best: {key}): last model"
        target, dtype = checkpoints.output / "model", config.export.dtype
        made = export(source, target, dtype, weights=weights)
        averaged = ", averaged weights" if weights == "average" else ""
        print(f"{what}, of {source.name}{averaged}: {made}")
