"""What stands at the end of a run: its table, and the exported model."""

from collections.abc import Sequence

from mtl.config import Config
from mtl.output import report
from mtl.output.checkpoint import Checkpoints
from mtl.output.export import export
from mtl.output.trackers import Tracker


def finish(config: Config, checkpoints: Checkpoints, trackers: Sequence[Tracker]) -> None:
    """Close the trackers, print the run's table and export its model. On rank 0."""
    for tracker in trackers:
        tracker.close()
    print(report.table(report.read(checkpoints.output)), flush=True)
    which = config.export.which
    if which != "none":
        source, weights = checkpoints.exported(which)
        target = export(source, checkpoints.output / "model", config.export.dtype, weights=weights)
        averaged = ", averaged weights" if weights == "average" else ""
        print(f"{which} model, of {source.name}{averaged}: {target}")
