"""What a run leaves on disk, and how it goes on from there.

    output/
      coba-mtl.json                the mark that the folder holds a run of ours
      run.json                     resolved YAML, versions, data fingerprints: before the first step
      metrics.jsonl                one line per step
      report.html, log.txt         charts of it (mtl/report), and what the run told
      passed.json                  batches that the run went back for (`train.not_finite`)
      checkpoints/
        latest                     name of the newest complete checkpoint; written last
        step-00000120/
          coba-mtl.json            the mark; sizes and checksums of the other files: written last
          engine/                  DeepSpeed's shards: weights, optimizer
          model/                   the model (or adapter) as a Hugging Face folder, ready for use
          average/                 the same with the averaged weights, where `average:` asks
          average.safetensors      what they go on from, in fp32
          state.json               step, best so far, balancer, identity, layout (processes, ZeRO)
          state.safetensors        the balancer's arrays, initial validation and last train losses
      bests/step-00000080/         a task's best model, weights only, where `checkpoint.bests` asks
      anchors/                     what tasks that are done are held to, where `patience` asks
      model/                       the exported model, at the end

Data order, learning rate and randomness are functions of seed, step and rank, so none of them is
saved.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from balancers import Holder
from mtl import process
from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.models.save import save
from mtl.output import bests, manifest
from mtl.output.export import EXPORT
from mtl.output.files import write_json, write_text
from mtl.output.state import RunState

FORMAT = 1
SCRATCH = ".resharded"
CHECKPOINT, RUN, ANCHORS = "checkpoint", "run", "anchors"  # kinds of our folders, beside EXPORT
STEP = re.compile(r"step-(\d{8})")
AVERAGE_FILE = "average.safetensors"
PASSED = "passed.json"
# What a run writes under fixed names, and would overwrite.
WRITTEN = (
    "metrics.jsonl", "run.json", PASSED, "report.html", "predictions", "checkpoints", "bests",
    "anchors",
)  # fmt: skip
STEPS = "steps of the run"  # in an identity: the only thing that may grow


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or continued from; the text says why and what to do."""


def check_output(output: Path, resume: bool) -> None:
    """Refuse to start a run on top of another, or of files that are not ours.

    Raises:
        CheckpointError: the folder holds a run and `resume` is false, or it holds what a run would
            write, not written by one. Nothing has been touched.
    """
    found = [name for name in WRITTEN if (output / name).exists()]
    if found and not manifest.is_ours(output, RUN):
        raise CheckpointError(
            f"output: {output} holds {either(found)} without the mark of a run ({manifest.NAME}): "
            f"not ours to write to. Choose another `output:`. {UNTOUCHED}"
        )
    if found and not resume:
        raise CheckpointError(
            f"output: {output} already holds a run. Add --resume to go on with it, or choose "
            f"another `output:` (or remove the folder). {UNTOUCHED}"
        )
    check_free(output / "model", EXPORT, "the exported model goes there")
    folders = output / "checkpoints"
    for folder in sorted(folders.iterdir()) if folders.is_dir() else ():
        # One with a file of the user's in it stays; it is refused where its step is saved again.
        if STEP.fullmatch(folder.name) and not manifest.is_whole(folder, CHECKPOINT):
            check_free(folder, CHECKPOINT, "a checkpoint goes there")
    check_free(folders / SCRATCH, SCRATCH, "a checkpoint is re-partitioned there")
    for folder in bests.folders(output / "bests"):
        if not manifest.is_whole(folder, bests.BEST):
            check_free(folder, bests.BEST, "a task's best model goes there")
    check_free(output / "anchors", ANCHORS, "the best weights of tasks go there")


def check_place(output: Path) -> None:
    """Raise CheckpointError where a run cannot make its folder, or write to it."""
    there = next(one for one in (output, *output.absolute().parents) if one.exists())
    try:
        with TemporaryDirectory(prefix=".coba-mtl-", dir=there):
            pass
    except OSError as error:
        raise no_folder(output, error) from error


def no_folder(output: Path, error: OSError) -> CheckpointError:
    """The error of a folder that cannot be made."""
    return CheckpointError(
        f"output: found {output}, where nothing can be written ({error.strerror}), wanted a folder "
        f"that is there or can be made. {UNTOUCHED}"
    )


def check_free(folder: Path, kind: str, why: str) -> None:
    """Raise CheckpointError where a folder holds anything that we did not write."""
    if manifest.is_free(folder):
        return
    if not manifest.is_ours(folder, kind):
        raise CheckpointError(
            f"{folder}: found something without our mark ({manifest.NAME}), and {why}. Move it "
            f"away, or choose another `output:`. {UNTOUCHED}"
        )
    if manifest.is_whole(folder, kind) and (others := manifest.strangers(folder)):
        raise CheckpointError(
            f"{folder}: found {either([str(folder / name) for name in others])}, which we did not "
            f"write, and {why}. Move it away. {UNTOUCHED}"
        )


def _check_best(folder: Path, name: str) -> None:
    """`check_free` of where a best model is about to be written. On rank 0."""
    if comm.rank() == 0:
        for path in (folder / name, bests.half(folder / name)):
            check_free(path, bests.BEST, "we are about to write there")


def either(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


UNTOUCHED = "Nothing was changed."


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
        versions: of the libraries. A message names those that differ from a checkpoint's.
        loader: as `mtl.models.save.save` takes it.
        say: takes messages for people about what differs from what was asked for.

    Attributes:
        best: name of the best checkpoint's folder so far.
        best_weights: which folder in it is meant, "model" or "average".
        named: folders of `bests` that the newest checkpoint names.
        at: the checkpoint that this process has saved or loaded last; None before. `latest` may
            name a later one until the next save: --resume=STEP leaves that one behind.
    """

    output: Path
    keep: int
    identity: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    layout: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    loader: tuple[str, dict[str, Any]] | None = None
    say: Callable[[str], None] = lambda text: None
    best: str | None = field(default=None, init=False)
    best_weights: str = field(default="model", init=False)
    named: set[str] = field(default_factory=set, init=False)
    at: Path | None = field(default=None, init=False)

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

        Raises:
            CheckpointError: the ranks hold other weights or another state, or weights that are not
                finite. Nothing is written.
        """
        _agree(engine, state)
        name = f"step-{state.step:08d}"
        folder = self.folder / name
        comm.on_first(lambda: self._clear(folder))
        with process.bar("save", 2 if average is None else 4, "part") as bar:
            engine.save(folder / "engine")
            bar.update()
            save(engine, self.tokenizer, folder / "model", self.loader)
            bar.update()
            if average is not None:
                average.save(folder / AVERAGE_FILE)
                bar.update()
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
                record |= {"layout": self.layout, "versions": self.versions}
                write_json(folder / "state.json", record)

        comm.together(write)
        manifest.seal_together(folder)  # every file is on the disk when this returns
        comm.on_first(lambda: self._point_and_prune(name))
        self.at, self.named = folder, bests.named(state)
        comm.on_first(lambda: self._prune_bests(state))
        return folder

    def save_bests(
        self, engine: Engine, state: RunState, names: Sequence[str], losses: np.ndarray
    ) -> list[str]:
        """Keep the model for the tasks that the (K,) losses of a full pass show at their best, and
        where it is the best single one; returns these tasks. A collective.

        What the newest checkpoint names stays beside it: a killed run goes on from there.
        """
        better = bests.observe(state, names, losses)
        is_single = state.single is not None and state.single["step"] == state.step
        if (better or is_single) and state.step:
            folder = self.output / "bests"
            comm.together(lambda: _check_best(folder, bests.folder_name(state.step)))
            bests.write(engine, self.tokenizer, folder, state.step, self.loader)
            comm.on_first(lambda: self._prune_bests(state))
        return better

    def load(
        self, engine: Engine, holder: Holder, folder: Path, average: Averaged | None = None
    ) -> RunState:
        """Continue from a checkpoint that `find` gave. A collective.

        Raises:
            CheckpointError: it is damaged, or of other tasks, data, batches or model. Nothing has
                been touched.
            ValueError: it is of another balancer.
        """
        self._verify(folder)
        record = comm.together(lambda: json.loads((folder / "state.json").read_text()))
        comm.together(lambda: self._check(record, folder))
        for name in sorted({*self.versions, *record["versions"]}):
            then, now = record["versions"].get(name), self.versions.get(name)
            if then != now:
                self.say(f"warning: {folder.name} was written with {name} {then}, here is {now}")
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
            scratch = self.folder / SCRATCH
            comm.on_first(lambda: self._clear(scratch, SCRATCH))
            engine.reshard(folder / "engine", scratch / "engine", shards)
            comm.on_first(lambda: manifest.discard(scratch, SCRATCH))
        if average is not None:
            average.load(folder / AVERAGE_FILE)
        self.best, self.best_weights = record["best"], record.get("best_weights", "model")
        if self.best and not manifest.is_whole(self.folder / self.best, CHECKPOINT):
            self.say(f"{self.folder / self.best}, the best checkpoint so far, is gone")
            self.best, self.best_weights = None, "model"
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
        self._forget_lost_bests(state)
        # `latest` may be a later checkpoint than this one: a run that is killed before it saves
        # again, and goes on from there, wants what that one names.
        self.named = bests.named(state) | comm.on_first(self._named_by_latest)
        self.at = folder
        return state

    def _named_by_latest(self) -> set[str]:
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return set()
        newest = self.folder / pointer.read_text(encoding="utf-8").strip() / "state.json"
        if not newest.is_file():  # `find` has more to say of it
            return set()
        try:
            run = json.loads(newest.read_text(encoding="utf-8"))["run"]
            return bests.folders_of(run.get("bests"), run.get("single"))
        except (ValueError, KeyError, TypeError):  # damaged, which is why the run goes back
            return set()

    def _forget_lost_bests(self, state: RunState) -> None:
        """After going back, a later step may have replaced a task's best of then. A collective."""
        folder = self.output / "bests"
        lost = comm.on_first(
            lambda: {
                name
                for name in bests.named(state)
                if not manifest.is_whole(folder / name, bests.BEST)
            }
        )
        for name in sorted(lost):
            self.say(f"{folder / name}, a task's best model so far, is gone: from here on anew")
        if lost:
            state.bests = state.bests and {  # None where only the single best is kept
                task: best
                for task, best in state.bests.items()
                if bests.folder_name(int(best["step"])) not in lost
            }
            if state.single and bests.folder_name(int(state.single["step"])) in lost:
                state.single = None

    def check_beginning(self) -> None:
        """Raise CheckpointError where the folder holds another run, stopped before its first
        checkpoint.
        """
        beginning = self.output / "run.json"
        if not beginning.is_file():
            return
        try:
            record = json.loads(beginning.read_text(encoding="utf-8"))
            record["format"], record["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{beginning}: is damaged ({error}), and no checkpoint says what the run was. "
                f"Start a new run in another `output:` folder. {UNTOUCHED}"
            ) from error
        self._check(record, beginning)

    def find(self, step: int | None = None) -> Path | None:
        """The complete checkpoint of a step, or the newest one; None where there is none yet.

        Raises:
            CheckpointError: there is none of that step; or what `latest` names is gone, or was
                changed by hand.
        """
        complete = self._complete()
        if step is not None:
            folder = self.folder / f"step-{step:08d}"
            if folder.name not in complete:
                raise CheckpointError(
                    f"--resume={step}: found no complete checkpoint {folder}. {_choose(complete)}"
                )
            return folder
        pointer = self.folder / "latest"
        if not pointer.is_file():
            if not complete:
                return None
            self.say(f"{pointer} is missing: going on from the newest complete checkpoint")
            return self.folder / complete[-1]
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if name not in complete:
            raise CheckpointError(
                f"{pointer}: names {str(self.folder / name[:80])!r}, wanted a complete checkpoint. "
                f"{_choose(complete)}"
            )
        return self.folder / name

    def pass_over(self, steps: Sequence[int]) -> None:
        """Write down whose batches the run passes over, before it goes back for one. On rank 0.

        Until the next save no checkpoint knows of them.
        """
        write_json(self.output / PASSED, {"passed over": sorted(steps)})

    def passed(self) -> list[int]:
        """The steps that `pass_over` wrote down.

        Raises:
            CheckpointError: the file is damaged, or not ours.
        """
        path = self.output / PASSED
        if not path.is_file():
            return []
        try:
            steps = json.loads(path.read_text(encoding="utf-8"))["passed over"]
            if not all(type(step) is int for step in steps):
                raise ValueError(f"found {steps}, wanted a list of steps")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: is damaged ({error}). It names the batches that the run went back for "
                "(train.not_finite). Remove it, and the run meets them again, unless its "
                "checkpoint knows them."
            ) from error
        return steps

    def unwritable(self, error: OSError) -> CheckpointError:
        """The error of a run that cannot write: path, space found and wanted, and what there is to
        go on from. Not a collective.
        """
        complete = self._complete()
        if complete:
            took = manifest.size(self.folder / complete[-1]) / 1e6
            move = (
                f"A checkpoint takes {took:,.1f} MB, as {complete[-1]} did: that is the last good "
                "one. Make room, and go on from it with --resume."
            )
        else:
            move = "There is no checkpoint yet. Make room, and start again."
        return CheckpointError(f"{process.storage(error, self.output)} {move}")

    def exported(self, which: str) -> tuple[Path, str] | None:
        """The checkpoint to export and which of its weights, "model" or "average": for "best"
        (where none beat the start, the last one), "last", or "average" (the last one's). None
        where no checkpoint is left.
        """
        if which == "best" and self.best:
            return self.folder / self.best, self.best_weights
        found = self.find()
        return None if found is None else (found, "average" if which == "average" else "model")

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

    def _verify(self, folder: Path) -> None:
        """Read every file of a checkpoint, divided among the ranks. A collective."""

        def damage(one: Path) -> list[str]:
            mine = comm.together(lambda: manifest.damage(one, part=(comm.rank(), comm.world())))
            return sorted(line for lines in comm.gather(mine) for line in lines)

        found = damage(folder)
        if not found:
            return
        older = [name for name in comm.on_first(self._complete) if name < folder.name]
        good = next((name for name in reversed(older) if not damage(self.folder / name)), None)
        move = (
            f"The newest good checkpoint before it is {good}: go on from it with "
            f"--resume={int(good[5:])}."
            if good
            else "There is no good one before it: start a new run in another `output:` folder."
        )
        raise CheckpointError("\n  ".join([f"{folder} is damaged. {move}", *found[:10]]))

    def _complete(self) -> list[str]:
        """Names of the sealed checkpoints, the oldest first."""
        return [name for name in self._ours() if manifest.is_whole(self.folder / name, CHECKPOINT)]

    def _ours(self) -> list[str]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(
            p.name for p in found if STEP.fullmatch(p.name) and manifest.is_ours(p, CHECKPOINT)
        )

    def _clear(self, folder: Path, kind: str = CHECKPOINT) -> None:
        """Make a folder empty but for our mark: a killed run may have left half of it."""
        check_free(folder, kind, "we are about to write there")
        pointer = self.folder / "latest"
        if self.at and pointer.is_file() and pointer.read_text("utf-8").strip() == folder.name:
            # After --resume=STEP. Killed from here on, the run goes on from that step once more.
            write_text(pointer, self.at.name)
        manifest.discard(folder, kind)
        manifest.mark(folder, kind)

    def _prune_bests(self, state: RunState) -> None:
        bests.prune(self.output / "bests", bests.named(state) | self.named)

    def _point_and_prune(self, name: str) -> None:
        write_text(self.folder / "latest", name)
        # What stands after this one was being written when a run was killed, or was gone back from.
        complete = [each for each in self._complete() if each <= name]
        kept = {self.best, *complete[-self.keep :]}
        for each in self._ours():
            folder = self.folder / each
            if each in kept:
                continue
            if manifest.is_whole(folder, CHECKPOINT) and (others := manifest.strangers(folder)):
                self.say(f"{folder} stays: it holds {either(others)}, which we did not write")
                continue
            manifest.discard(folder, CHECKPOINT)
        scratch = self.folder / SCRATCH
        if manifest.is_ours(scratch, SCRATCH):  # of a run killed while re-partitioning
            manifest.discard(scratch, SCRATCH)


def _agree(engine: Engine, state: RunState) -> None:
    """Compare what every rank should hold alike: whole weights and the run's state. A collective.

    The balancer's state is on rank 0 alone, and so is the length of metrics.jsonl.
    """
    plain = {k: v for k, v in asdict(state).items() if k != "metrics_bytes"}
    for name in RunState.ARRAYS:
        if plain[name] is not None:
            plain[name] = zlib.crc32(plain[name].tobytes())
    if bad := sorted({name for names in comm.gather(engine.not_finite()) for name in names}):
        raise CheckpointError(
            f"step {state.step}: weights that are not finite: {either(bad)}. No checkpoint was "
            "written; --resume goes on from the last one."
        )
    found = comm.differences({"state": plain, "weights": engine.checksums()})
    if found:
        more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
        raise CheckpointError(
            "\n  ".join(
                [
                    f"step {state.step}: what the ranks should hold alike differs. "
                    "No checkpoint was written; --resume goes on from the last one. If it comes "
                    "again, look at the memory and the network of the hosts.",
                    *found[:5],
                    *more,
                ]
            )
        )


def _choose(complete: list[str]) -> str:
    if not complete:
        return "There is none: start a new run in another `output:` folder."
    steps = ", ".join(str(int(name[5:])) for name in complete)
    return f"There are those of steps {steps}: go on from one with --resume=STEP."
