"""Replicas of a run that differ in the order of rows only, their merges, and the controls at equal
compute: the commands of such a study, in order.

Controls: one run K times as long, and the mean of its last K checkpoints. Without them a gain of
merging K runs only says that K times the compute helps (Ju et al. 2024, arXiv 2410.03743).
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl.config import Config

METHODS = ("average", "average_norm", "select", "task_arithmetic", "ties", "dare", "model_stock")


@dataclass(frozen=True)
class ReplicaStudy:
    """A study of K replicas, in the folder `out`.

    Args:
        config: the experiment; `experiment` are the options that read it, for the programs.
        launcher: what starts a training run, such as `deepspeed --num_gpus 2`.
        programs: the folder of `train.py`, `merge.py` and `evaluate.py`.
        scheme, of, epochs: as `train.order`.
        methods: of `launch/merge.py`.
        split: "validation" or "test": the rows that every model is evaluated on.
        rows: whether to measure what the order left behind, too (`mtl.compare.orders.applies`).
        figure: whether to draw that.
    """

    config: Config
    experiment: Sequence[str]
    launcher: Sequence[str]
    programs: Path
    out: Path
    scheme: str
    of: int
    epochs: str
    methods: Sequence[str]
    split: str
    rows: bool = False
    figure: bool = False

    def __post_init__(self) -> None:
        if self.of < 2:
            raise ValueError(f"--of: found {self.of}, wanted 2 or more replicas to merge.")
        if self.config.export.which == "none":
            where = self.config.where("export.which")
            raise ValueError(
                f"{where}: export.which: found none, wanted best, last or average: the exported "
                "models are what is merged."
            )

    @property
    def replicas(self) -> list[Path]:
        return [self.out / f"replica-{i}" for i in range(self.of)]

    def commands(self) -> Iterator[list[str]]:
        """What is to be run, one after another; what an earlier command leaves decides later ones.

        All may be given again: training goes on from its checkpoints, and a merge that exists is
        not repeated.
        """
        for i, output in enumerate(self.replicas):
            order = {"scheme": self.scheme, "replica": i, "of": self.of, "epochs": self.epochs}
            yield self._train(output, f"train.order={json.dumps(order)}")
        train, every = self.config.train, self.config.checkpoint.every
        length = "epochs" if train.steps is None else "steps"
        yield self._train(
            self.out / "long",
            f"train.{length}={getattr(train, length) * self.of}",
            f"checkpoint.keep={self.of}",
            f"checkpoint.every={every or self.config.evaluate.every}",
        )
        exported = [output / "model" for output in self.replicas]
        merges = {self.out / f"merged-{method}": (method, exported) for method in self.methods}
        # Only now: the commands are asked for one by one, and the long run has ended.
        merges[self.out / "tail"] = "average", self._tail()
        for target, (method, models) in merges.items():
            # A merge appears whole or not at all, so one that is there is finished.
            if not target.exists():
                yield self._merge(method, models, target)
        models = [*exported, self.out / "long" / "model", *merges]
        yield [
            *self._program("evaluate"),
            *self.experiment,
            *map(str, models),
            *("--split", self.split, "--json", str(self.out / "losses.json")),
        ]
        if self.rows:
            made = [*merges, self.out / "long" / "model"]
            drawn = ["--figure", str(self.out / "imbalance.png")] * self.figure
            yield [
                *self._program("imbalance"),
                *self.experiment,
                *("--runs", *map(str, self.replicas), "--models", *map(str, made)),
                *("--json", str(self.out / "imbalance.json"), *drawn),
            ]

    def _train(self, output: Path, *settings: str) -> list[str]:
        sets = [part for each in (f"output={output}", *settings) for part in ("--set", each)]
        program = str(self.programs / "train.py")
        return [*self.launcher, program, *self.experiment, *sets, "--resume"]

    def _merge(self, method: str, models: Sequence[Path], target: Path) -> list[str]:
        from mtl.merging import sources  # imports torch, which `--help` does without

        named = ["--base", sources.base(self.config), "--models", *map(str, models)]
        remote = ["--allow-remote-code"] * self.config.model.allow_remote_code
        return [*self._program("merge"), *named, "--method", method, "--out", str(target), *remote]

    def _program(self, name: str) -> list[str]:
        return [sys.executable, str(self.programs / f"{name}.py")]

    def _tail(self) -> list[Path]:
        """Models of the long run's last K checkpoints."""
        found = sorted((self.out / "long" / "checkpoints").glob("step-*/model"))[-self.of :]
        if len(found) < self.of:
            raise ValueError(
                f"{self.out / 'long'}: found {len(found)} checkpoints, wanted {self.of} for their "
                "mean. Set a smaller checkpoint.every, in a new --out."
            )
        return found


def run(commands: Iterator[list[str]], say: Callable[[str], None]) -> None:
    """Run each command to its end.

    Raises:
        ValueError: one of them failed.
    """
    for command in commands:
        say("$ " + shlex.join(command))
        code = subprocess.run(command).returncode
        if code:
            raise ValueError(
                f"exit code {code}: {shlex.join(command)}\nWhat came before is kept: give the same "
                "command again once the cause is gone."
            )
