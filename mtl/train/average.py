"""An average of the trained weights along the run, beside the weights that are trained.

Exponential, after every `every` updates:

    a <- d a + (1 - d) w,    d = min(decay, (1 + n) / (warmup + n)) at its n-th update, n = 0, 1 ...

It begins as the weights at the start (Polyak and Juditsky 1992). The warm-up is that of
TensorFlow's `ExponentialMovingAverage`. With `last` it is the mean of the weights at that many last
full validation passes (Izmailov et al. 2018, arXiv 1803.05407).

Each rank averages its part of the fp32 master weights; at ZeRO 0 every rank averages all
parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtl.config.schema import AverageSection
from mtl.distributed import comm, masters
from mtl.distributed.engine import Engine
from mtl.output.state import RunState
from mtl.train.evaluate import ValidationResult


@dataclass
class Average:
    """The average of one run. The state counts its updates: `averaged`.

    Attributes:
        copies: flat fp32 values by parameter. One copy is the exponential average; several are the
            weights at the last passes, oldest first.
    """

    engine: Engine
    settings: AverageSection
    copies: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.settings.last is None:
            self.copies = [self._copy()]

    def after_update(self, state: RunState) -> None:
        """Take the weights of update `state.step` into an exponential average."""
        given = self.settings
        if given.last is not None or state.step % given.every:
            return
        n = state.averaged
        rate = 1 - min(given.decay, (1 + n) / (given.warmup + n))
        for name, weights in masters.local(self.engine).items():
            mine = self.copies[0][name]
            mine.lerp_(weights.to(mine.device), rate)
        state.averaged += 1

    def at_pass(self, state: RunState) -> None:
        """Take the weights at a full pass into the mean of the last ones, but not at the start."""
        if self.settings.last is None or state.step == 0:
            return
        # Dropped before the new copy is made, so that `last` copies are the most in memory.
        while len(self.copies) >= self.settings.last:
            self.copies.pop(0)
        self.copies.append(self._copy())
        state.averaged += 1

    def measure(
        self, state: RunState, raw: ValidationResult, full_pass: Callable[[], ValidationResult]
    ) -> ValidationResult:
        """The full pass with the averaged weights. While they are still the trained ones it is
        `raw`. A collective.
        """
        if not state.averaged:
            return raw
        with self.swapped():
            return full_pass()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the module has the averaged weights. Afterwards it has the trained
        ones again, bit for bit. A collective.
        """
        if not self.copies:
            yield
            return
        mean = self.copies[0] if len(self.copies) == 1 else self._mean()
        masters.exchange(self.engine, mean)
        yield  # not in a `finally`: after an error the ranks are no longer in step
        masters.exchange(self.engine, mean)

    def save(self, file: Path) -> None:
        """Write the copies whole and by name, so that any number of processes can read them. A
        collective.
        """
        found: dict[str, Tensor] = {}
        for i, copy in enumerate(self.copies):
            parts = masters.whole(self.engine, copy)
            found |= {f"{i}.{name}": values for name, values in parts.items()}
        comm.on_first(lambda: save_file(found, file))

    def load(self, file: Path) -> None:
        """Go on from what `save` wrote. A collective."""

        def read() -> list[dict[str, Tensor]]:
            with safe_open(file, framework="pt") as stored:
                count = 1 + max((int(key.partition(".")[0]) for key in stored.keys()), default=-1)
                return [
                    # This rank's part, in this run's division: the file holds whole tensors.
                    masters.scatter(
                        self.engine,
                        lambda name, i=i: stored.get_tensor(f"{i}.{name}"),
                        self.settings.device,
                    )
                    for i in range(count)
                ]

        self.copies = comm.together(read)

    def _copy(self) -> dict[str, Tensor]:
        device = self.settings.device
        now = masters.local(self.engine)
        # copy=True: where nothing changes, `to` gives the trained weights themselves.
        return {name: w.to(device or w.device, copy=True) for name, w in now.items()}

    def _mean(self) -> dict[str, Tensor]:
        first, *rest = self.copies
        # clone: the sums below must not change the oldest copy.
        mean = {name: values.clone() for name, values in first.items()}
        for name, values in mean.items():
            for other in rest:
                values += other[name]
            values /= len(self.copies)
        return mean
