"""Record every validation row's loss along a run, for slopes.py: python benchmarks/record.py x.yaml
run.npz [--set KEY=VALUE ...].

The run is `mtl.train.loop.train` itself. The rows' losses are read before the first update and
after every other one. The file holds `step` (probes,), updates so far; `loss_sum` (probes, K, rows)
in nats; `target_tokens`, `positions` and `answer` (K, rows), of which the last says what the
targets are (`Encoded.answers`); `tasks` (K,). Of every task as many rows as the smallest has.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtl import process

process.settle()  # before torch is imported

import numpy as np
import torch
from ours import build_run

from mtl import build, plugins
from mtl.data.mix import permutation
from mtl.train.loop import train
from mtl.train.run import Run


class Unhurried:
    """A driver that lets every step begin at once."""

    def ready(self, **_: object) -> None: ...

    def step(self, *_: object, **__: object) -> None: ...


class Recorder:
    """A tracker that reads the rows' losses."""

    def __init__(self, run: Run, every: int):
        self._run, self._every = run, every
        splits, layout = run.validation.splits, run.validation.layouts.each[0]
        self._rows = min(len(split) for split in splits)
        drawn = [np.sort(permutation(len(split), "record")[: self._rows]) for split in splits]
        task, row = np.repeat(np.arange(len(splits)), self._rows), np.concatenate(drawn)
        self.targets, self.positions, self.answers = (
            np.array(
                [getattr(split, name)[rows] for split, rows in zip(splits, drawn, strict=True)]
            )
            for name in ("targets", "positions", "answers")
        )
        each, self._micros = self.targets.reshape(-1), []
        for micro, most in layout.deal(splits, task, row):
            # The targets of a micro-batch stand row by row, and in a row example by example.
            number = np.concatenate([np.full(each[i], i) for indices in micro for i in indices])
            made = layout.collate(micro, most, splits, task, row)
            self._micros.append(replace(made, task=torch.from_numpy(number)))
        self.steps: list[int] = []
        self.sums: list[np.ndarray] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        done = step + 1 if "train/loss" in values else step  # updates so far
        if done % self._every or done in self.steps:
            return
        engine, objective, k = (
            self._run.engine,
            self._run.objective,
            len(self._run.names) * self._rows,
        )
        engine.eval()
        with torch.no_grad():
            sums = sum(objective(engine.evaluate, micro, k).sums for micro in self._micros)
        self.steps.append(done)
        self.sums.append(sums.numpy().reshape(-1, self._rows))
        print(done, (self.sums[-1].sum(1) / self.targets.sum(1)).round(3), flush=True)

    def say(self, text: str) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="override, as in train.seed=1"
    )
    args = parser.parse_args()
    run = build_run(plugins.read(args.config, args.set, []), Unhurried())
    recorder = Recorder(run, args.every)
    train(replace(run, trackers=[recorder]), build.restore(run, False))
    np.savez_compressed(
        args.out,
        step=np.array(recorder.steps),
        loss_sum=np.array(recorder.sums, np.float32),
        target_tokens=recorder.targets,
        positions=recorder.positions,
        answer=recorder.answers,
        tasks=np.array(run.names),
    )


if __name__ == "__main__":
    main()
