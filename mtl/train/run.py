"""What a run is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from balancers import Holder
from mtl.config import Config
from mtl.data.batches import TrainBatches, ValidationGroups
from mtl.data.examples import Book
from mtl.distributed.engine import Engine
from mtl.generation.asking import Asking
from mtl.losses.objective import Measure, Objectives
from mtl.output.checkpoint import Checkpoints
from mtl.output.trackers import Tracker
from mtl.train.anchor import Anchors
from mtl.train.average import Average
from mtl.train.patience import Patience


@dataclass(kw_only=True)
class Run:
    """Everything a run is made of. `mtl.build.build` makes one.

    Attributes:
        names: the K tasks, in the order of every (K,) array.
        book: which task each loss of each stream's rows counts for.
        objective: the run's objectives as one.
        steps: optimizer updates in the whole run.
        differentiated: parameters to differentiate by, where the balancer reads the gradients'
            products.
        probe_every: optimizer steps between the probes that a balancer reads.
        trackers: empty on every rank but 0.
        average: of the trained weights; None where the config asks for none.
        patience: when a task is done; None where the config does not ask.
        anchors: what tasks that are done are held to; None where the config asks for none.
        asking: the questions whose answers are measured; None where the config asks for none.
        trouble: what a tracker could not write, on rank 0.
    """

    config: Config
    names: list[str]
    book: Book
    steps: int
    engine: Engine
    objective: Objectives
    holder: Holder
    batches: TrainBatches
    validation: ValidationGroups
    checkpoints: Checkpoints
    differentiated: Sequence[nn.Parameter] = ()
    probe_every: int = 1
    trackers: Sequence[Tracker] = ()
    average: Average | None = None
    patience: Patience | None = None
    anchors: Anchors | None = None
    asking: Asking | None = None
    trouble: OSError | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Give numbers to the trackers. What they cannot write is kept as `trouble`, until all
        ranks hear of it.
        """
        self._tell(lambda tracker: tracker.log(step, values))

    def say(self, text: str) -> None:
        """The same with a message for people."""
        self._tell(lambda tracker: tracker.say(text))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                tell(tracker)
            except OSError as error:
                self.trouble = self.trouble or error

    def raise_trouble(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    @property
    def measures(self) -> dict[str, Measure]:
        """What may be measured at a pass beside losses."""
        return self.objective.measures | (self.asking.kinds if self.asking else {})
