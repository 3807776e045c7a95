"""This trainer, measured: `mtl.train.loop.train` on a configuration, step by step at the driver's
command.

    python benchmarks/ours.py x.yaml                       a contender (see turns.py) python
    benchmarks/ours.py x.yaml --rows rows.json      write the rows of every step, for the peers, and
    end

Nothing here replaces a part of the trainer: the clocks are put around its calls from outside.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtl import process

process.settle()  # before torch is imported

import numpy as np
from turns import Turns

from mtl import build, plugins
from mtl.config import Config
from mtl.data.plan import mix_for, steps_of
from mtl.distributed import comm, engine
from mtl.losses.objective import measures_of
from mtl.train.loop import train
from mtl.train.run import Run


class Clock:
    """Seconds spent inside chosen calls. A call within another is counted once, under the outer
    one's name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._is_inside = False

    def around(self, name: str, call: Callable) -> Callable:
        self.seconds[name] = 0.0

        def timed(*args: Any, **keywords: Any) -> Any:
            if self._is_inside:
                return call(*args, **keywords)
            self._is_inside, began = True, time.perf_counter()
            try:
                return call(*args, **keywords)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self._is_inside = False

        return timed

    def apart(self, name: str, call: Callable) -> Callable:
        """For a call on a thread of its own: the processor's seconds, beside what the others
        take.
        """
        self.seconds[name] = 0.0

        def timed(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds[name] += time.thread_time() - began

        return timed

    def take(self) -> dict[str, float]:
        """The seconds since the last call of this."""
        taken = dict(self.seconds)
        self.seconds.update(dict.fromkeys(taken, 0.0))
        return taken


class Ours:
    """A tracker that ends each step's turn, and the run's stand-in for checkpoints, of which it
    keeps none.
    """

    def __init__(self, turns: Turns, clock: Clock, names: list[str]):
        self.output = Path(tempfile.gettempdir()) / "no-such-run"
        self.about: dict[str, Any] = {}
        self._turns, self._clock, self._names = turns, clock, names

    def log(self, step: int, values: dict[str, float]) -> None:
        if "train/loss" not in values:  # the full validation pass before the first step
            self._turns.ready(**self.about)
            self._clock.take()
            return
        tokens = np.array([values[f"train/{n}/tokens"] for n in self._names])
        losses = np.array(
            [values.get(f"train/{n}/loss", 0.0) for n in self._names]
        )  # absent: no token either
        self._turns.step(
            float(losses @ tokens / tokens.sum()), int(tokens.sum()), **self._clock.take()
        )

    def say(self, text: str) -> None:
        pass

    def save(self, *_: Any, **__: Any) -> Path:
        return self.output


def build_run(config: Config, turns: Turns) -> Run:
    """The trainer's own run, without checkpoints and with clocks around its parts."""
    data = build.encode(config, say=lambda text: None)
    if not comm.active():
        engine.init_process_group(5)
    run = build.build(config, data, say=lambda text: None)
    clock = Clock()
    run.engine.backward = clock.around("backward", run.engine.backward)
    run.engine.step = clock.around("optimizer", run.engine.step)
    run.batches.batch = clock.around("data_wait", run.batches.batch)
    for name in ("sum_", "broadcast_"):
        setattr(comm, name, clock.around("communication", getattr(comm, name)))
    each = run.objective.each
    run.objective.each = [clock.around("forward", one) for one in each]
    for timed, one in zip(run.objective.each, each, strict=True):
        timed.measures = measures_of(one)  # validation asks the objective for them
    run.batches.make = clock.apart("data_thread", run.batches.make)
    ours = Ours(turns, clock, run.names)
    ours.about = {
        "row_length": run.batches.layouts.each[0].row_length,
        "first": [list(micro.input_ids.shape) for micro in run.batches.batch(0)],
        "parameters": sum(p.numel() for p in run.engine.module.parameters() if p.requires_grad),
        "probe_every": run.probe_every,
    }
    run.checkpoints, run.trackers = ours, [ours]
    return run


def rows(config: Config) -> list[list[dict[str, list[int]]]]:
    """The examples of every step in the order they are drawn: ids and labels (-100 = no target);
    of pairs the ids of prompt and answers.
    """
    tasks = build.encode(config, say=lambda text: None).tasks
    mix = mix_for(config, tasks)

    def row(k: int, n: int) -> dict[str, list[int]]:
        columns = tasks[k].train.columns(n)
        if "chosen" in columns:
            return pair(columns)
        ids, target = columns["ids"], columns["target"] > 0
        return {"input_ids": ids.tolist(), "labels": np.where(target, ids, -100).tolist()}

    return [
        [row(k, n) for k, n in zip(*mix.batch(step), strict=True)]
        for step in range(steps_of(config, mix))
    ]


def pair(columns: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """A pair of texts as TRL has it. The prompt ends where an answer's targets begin."""
    start = int(columns["chosen_target"].argmax())
    assert start == int(columns["rejected_target"].argmax())
    sides = {f"{side}_ids": columns[side][start:].tolist() for side in ("chosen", "rejected")}
    return {"prompt_ids": columns["chosen"][:start].tolist(), **sides}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--rows", type=Path, help="write the rows here, and end")
    args = parser.parse_args()
    config = plugins.read(args.config, [], [])
    if args.rows:
        args.rows.write_text(json.dumps(rows(config)))
        return
    run = build_run(config, Turns())
    train(run, build.restore(run, False))


if __name__ == "__main__":
    main()
