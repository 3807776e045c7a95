"""What a run leaves on disk, and how it goes on from there.

    output/
      run.json                     resolved YAML, versions, data fingerprints: before the first step
      metrics.jsonl                one line per step
      checkpoints/
        latest                     name of the newest complete checkpoint; written last
        step-00000120/
          engine/                  DeepSpeed's shards: weights, optimizer
          model/                   the model (or adapter) as a Hugging Face folder, ready for use
          average/                 the same with the averaged weights, where `average:` asks
          average.safetensors      what they go on from, in fp32
          state.json               step, best so far, balancer, identity, layout (processes, ZeRO)
          state.safetensors        the balancer's arrays, initial validation losses, last losses
      bests/step-00000080/         a task's best model, weights only, where `checkpoint.bests` asks
      model/                       the exported model, at the end

Data order, learning rate and randomness are functions of seed, step and rank, so none of them is
saved.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from balancers import Holder
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.models.save import save
from mtl.output import bests
from mtl.output.state import RunState

FORMAT = 1
SCRATCH = ".resharded"
AVERAGE_FILE = "average.safetensors"
STEPS = "steps of the run"  # in an identity: the only thing that may grow


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or continued from; the text says why and what to do."""


def check_output(output: Path, resume: bool) -> None:
    """Refuse to start a run on top of another.

    Raises:
        CheckpointError: the folder holds a run and `resume` is false. Nothing has been touched.
    """
    if not resume and ((output / "metrics.jsonl").exists() or (output / "checkpoints").exists()):
        raise CheckpointError(
            f"output: {output} already holds a run. Add --resume to go on with it, or choose "
            "another `output:` (or remove the "
            "folder). Nothing was changed."
        )


class Averaged(Protocol):
    """What is averaged beside the trained weights; `mtl.train.average` has it."""

    def save(self, file: Path) -> None: ...

    def load(self, file: Path) -> None: ...

    def swapped(self) -> AbstractContextManager[None]: ...


@dataclass
class Checkpoints:
    """Checkpoints of one run.

    Args:
        output: the run's folder.
        keep: how many of the newest checkpoints stay; the best one stays beside them.
        identity: dotted name to plain value: what a run must share with a checkpoint to go on from
            it exactly.
        tokenizer: goes with every exported model.
        layout: {"processes": ..., "zero": ...}: how the engine's state is partitioned. A checkpoint
            of another layout is re-partitioned.
        loader: name and keywords of the model's loader, where it is not built in.
        say: takes messages for people about what differs from what was asked for.

    Attributes:
        best: name of the best checkpoint's folder so far.
        best_weights: which folder in it is meant, "model" or "average".
        named: folders of `bests` that the newest checkpoint names.
    """

    output: Path
    keep: int
    identity: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    layout: dict[str, int]
    loader: tuple[str, dict[str, Any]] | None = None
    say: Callable[[str], None] = lambda text: None
    best: str | None = field(default=None, init=False)
    best_weights: str = field(default="model", init=False)
    named: set[str] = field(default_factory=set, init=False)

    @property
    def folder(self) -> Path:
        return self.output / "checkpoints"

    def save(
        self,
        engine: Engine,
        holder: Holder,
        state: RunState,
        *,
        is_best: bool = False,
        average: Averaged | None = None,
    ) -> Path:
        """Write a checkpoint, point `latest` at it, then remove what is no longer kept. A
        collective.

        A run killed at any moment leaves `latest` on a complete checkpoint.
        """
        name = f"step-{state.step:08d}"
        folder = self.folder / name
        # A run that was killed while it wrote this step may have left files of any process.
        comm.together(
            lambda: shutil.rmtree(folder, ignore_errors=True) if comm.rank() == 0 else None
        )
        engine.save(folder / "engine")
        save(engine, self.tokenizer, folder / "model", self.loader)
        if average is not None:
            average.save(folder / AVERAGE_FILE)
            with average.swapped():
                save(engine, self.tokenizer, folder / "average", self.loader)
        if is_best:
            self.best, self.best_weights = name, state.best.get("weights", "model")

        def write() -> None:
            if comm.rank() == 0:
                held = holder.state_dict()
                plain = {k: v for k, v in asdict(state).items() if k not in RunState.ARRAYS}
                arrays = {
                    f"run.{k}": v for k in RunState.ARRAYS if (v := getattr(state, k)) is not None
                }
                arrays |= {f"balancer.{k}": v for k, v in held["arrays"].items()}
                save_file(
                    {k: np.array(v, order="C") for k, v in arrays.items()},
                    folder / "state.safetensors",
                )
                record = {
                    "format": FORMAT,
                    "run": plain,
                    "best": self.best,
                    "best_weights": self.best_weights,
                    "balancer": held["meta"],
                    "identity": self.identity,
                }
                record["layout"] = self.layout
                write_json(folder / "state.json", record)

        comm.together(write)  # every shard is on disk when this returns
        comm.together(lambda: self._point_and_prune(name) if comm.rank() == 0 else None)
        self.named = bests.named(state)
        comm.together(lambda: self._prune_bests(state) if comm.rank() == 0 else None)
        return folder

    def save_bests(
        self, engine: Engine, state: RunState, names: Sequence[str], losses: np.ndarray
    ) -> list[str]:
        """Keep the model for the tasks that the (K,) losses of a full pass show at their best;
        returns these. A collective.

        What the newest checkpoint names stays beside it: a killed run goes on from there.
        """
        better = bests.observe(state, names, losses)
        if better and state.step:
            folder = self.output / "bests"
            bests.write(engine, self.tokenizer, folder, state.step, self.loader)
            comm.together(lambda: self._prune_bests(state) if comm.rank() == 0 else None)
        return better

    def load(self, engine: Engine, holder: Holder, average: Averaged | None = None) -> RunState:
        """Continue from the newest complete checkpoint; there must be one. A collective.

        Raises:
            CheckpointError: it belongs to other tasks, data, batches or another model. Nothing has
                been touched.
            ValueError: it belongs to another balancer.
        """
        folder = self.latest()
        assert folder is not None, "ask latest() first"
        record = comm.together(lambda: json.loads((folder / "state.json").read_text()))
        comm.together(lambda: self._check(record, folder))
        arrays = comm.together(lambda: load_file(folder / "state.safetensors"))
        mine = {
            k.removeprefix("balancer."): v for k, v in arrays.items() if k.startswith("balancer.")
        }
        holder.load_state_dict({"meta": record["balancer"], "arrays": mine})
        if record["layout"] == self.layout:
            engine.load(folder / "engine")
        else:
            old, new = (
                f"ZeRO {one['zero']} (processes: {one['processes']})"
                for one in (record["layout"], self.layout)
            )
            self.say(
                f"{folder.name} is of {old}; its parameters and optimizer state are re-partitioned "
                f"for {new}"
            )
            shards = record["layout"]["processes"] if record["layout"]["zero"] else 0
            engine.reshard(folder / "engine", self.folder / SCRATCH, shards)
        if average is not None:
            average.load(folder / AVERAGE_FILE)
        self.best, self.best_weights = record["best"], record.get("best_weights", "model")
        before, now = record["identity"][STEPS], self.identity[STEPS]
        if before != now:
            self.say(
                f"{folder.name} is of a run of {before:,} steps, which now has {now:,}: from here "
                "on its learning rate is that of a run of this length"
            )
        state = RunState(
            **record["run"],
            **{k.removeprefix("run."): v for k, v in arrays.items() if k.startswith("run.")},
        )
        self.named = bests.named(state)
        return state

    def check_beginning(self) -> None:
        """Raise CheckpointError where the folder holds another run, stopped before its first
        checkpoint.
        """
        beginning = self.output / "run.json"
        if beginning.is_file():
            self._check(json.loads(beginning.read_text(encoding="utf-8")), beginning)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none yet.

        Raises:
            CheckpointError: what `latest` names is gone, or was changed by hand.
        """
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        folder = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not (folder / "state.json").is_file():
            others = sorted(path.parent.name for path in self.folder.glob("step-*/state.json"))
            move = (
                f"Write one of {others} into it."
                if others
                else "There is none: start a new run in another `output:` folder."
            )
            raise CheckpointError(
                f"{pointer}: found {folder.name}, wanted the name of a complete checkpoint: "
                f"{folder}/state.json does not exist. {move}"
            )
        return folder

    def exported(self, which: str) -> tuple[Path, str]:
        """The checkpoint to export and which of its weights, "model" or "average": for "best"
        (where none beat the start, the last one), "last", or "average" (the last one's).
        """
        if which == "best" and self.best:
            return self.folder / self.best, self.best_weights
        return self.latest(), "average" if which == "average" else "model"

    def _check(self, record: dict, folder: Path) -> None:
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: checkpoint format {record['format']}; this version reads {FORMAT}."
            )
        theirs = record["identity"]
        differs = [
            k for k in sorted({*theirs, *self.identity}) if theirs.get(k) != self.identity.get(k)
        ]
        if STEPS in differs and theirs.get(STEPS, math.inf) < self.identity[STEPS]:
            differs.remove(STEPS)
        if differs:
            lines = "\n".join(
                f"  {k}: checkpoint {theirs.get(k)!r}, now {self.identity.get(k)!r}"
                for k in differs
            )
            raise CheckpointError(
                f"{folder} cannot be continued: the run has changed.\n{lines}\n"
                "Put these back as they were, or start a new run in another `output:` folder."
            )

    def _prune_bests(self, state: RunState) -> None:
        bests.prune(self.output / "bests", bests.named(state) | self.named)

    def _point_and_prune(self, name: str) -> None:
        write_text(self.folder / "latest", name)
        folders = sorted(p.name for p in self.folder.glob("step-*"))
        # A folder after this one was being written when a run was killed.
        kept = {self.best, *folders[: folders.index(name) + 1][-self.keep :]}
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(self.folder / folder)
        shutil.rmtree(
            self.folder / SCRATCH, ignore_errors=True
        )  # of a run killed while it re-partitioned its state


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
