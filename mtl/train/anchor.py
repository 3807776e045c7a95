"""Holding a task that is done to its own best self (`evaluate.patience: {action: anchor}`).

When a task is done, its best weights read once those of its training rows that the rest of the run
can draw. What they say at each target is kept (`mtl.losses.teacher`), and the task's loss is the
divergence from that, until it comes back. Its share is constant meanwhile, so these rows are known.
Where it draws others after all (a longer run), the rows from then on are read, into another file.

    output/anchors/
      weights-00000040.safetensors   a task's best weights so far: trained parameters, fp32
      task-1-00000040-00000060.npy   what they say at training targets of task 1, 516 bytes each;
                                     made before step 60; rows that were not read are 0

Files stay while the state or the newest checkpoint names them.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtl.data.batches import Layout, Layouts, TrainBatches
from mtl.data.encoded import Flat, TaskData
from mtl.data.next_token import TEACHER
from mtl.distributed import comm, masters
from mtl.distributed.engine import Engine
from mtl.losses.objective import Objective, teacher_of
from mtl.output import manifest
from mtl.output.checkpoint import ANCHORS, check_free
from mtl.output.files import flush
from mtl.output.state import RunState
from mtl.train.reference import micro_batches

OURS = re.compile(r"\.?(weights|task-\d+)(-\d{8}){1,2}\.(safetensors|npy)(\.tmp)?")
CHUNK = 1 << 15  # target tokens whose answers are put together at once: 17 MB


class Anchors:
    """The teachers of one run, and the weights that may become one.

    Args:
        objectives: the run's; layout n of `layouts` has the rows of objective n.
        tasks: K streams, each of them a task; their training rows get the teacher's columns.
        batches: says which rows are drawn; prepared ones are forgotten where a column changes.
        folder: `anchors` in the run's.
    """

    def __init__(
        self,
        engine: Engine,
        objectives: Sequence[Objective],
        tasks: Sequence[TaskData],
        layouts: Layouts,
        batches: TrainBatches,
        folder: Path,
        say: Callable[[str], None],
    ):
        self._engine, self._objectives, self._tasks = engine, list(objectives), list(tasks)
        self._layouts, self._batches, self._folder = layouts, batches, folder
        self._say = say
        self._attached: dict[int, str] = {}  # by task, the file that its rows' columns are from
        self._known: tuple | None = None  # for which round and teachers all rows were read
        self._saved: set[str] = set()  # what the newest checkpoint names

    def at_pass(self, state: RunState) -> None:
        """After a full pass, and after patience has seen it: keep new bests, let go of the teachers
        of tasks that came back. A collective.
        """
        if state.asked is None:
            state.asked = np.full(len(self._tasks), np.nan)
        state.asked[np.isnan(state.anchored)] = np.nan
        # A task that is held keeps the teacher it has, so its own weights are not written again.
        is_best = (state.best_at == state.step) & np.isnan(state.anchored)
        if is_best.any():
            self._keep(state.step)
        self._attach(state)
        comm.on_first(lambda: self._prune(state))

    def ask(self, state: RunState, steps: int) -> int:
        """Before batch `state.step` of a run of `steps`, its round of draws planned: let teachers
        read the rows that their tasks can draw. Returns how many rows were read. A collective.
        """
        tasks = held(state)
        if tasks is None:
            return 0
        now = self._batches.now, state.anchored.tobytes()
        if now == self._known:
            return 0
        read = 0
        for k in np.flatnonzero(tasks):
            if not self._has(k, self._batches.reach(k, state.step, steps)):
                # Other rounds of the same share may draw it up to 2 (K - 1) times more by the end.
                rows = self._batches.reach(k, state.step, steps, spare=2 * len(self._tasks))
                self._say(f"{self._tasks[k].name}: its best weights read {len(rows):,} of its rows")
                state.asked[k] = state.step
                self._ask(k, state, rows)
                read += len(rows)
        self._attach(state)
        comm.on_first(lambda: self._prune(state))
        self._known = now
        return read

    def after_save(self, state: RunState) -> None:
        """A checkpoint of this state is the newest one now. A collective."""
        self._saved = _named(state)
        comm.on_first(lambda: self._prune(state))

    def restore(self, state: RunState) -> None:
        """Go on from a checkpoint's state. A task whose files are gone begins anew: its loss on the
        next full pass is its lowest. A collective.
        """
        self._known = None
        if state.best_at is None:
            return
        if state.asked is None:  # a checkpoint of an older version
            state.asked = np.full(len(self._tasks), np.nan)

        def missing() -> dict[int, str]:
            found = {}
            for k, names in _names(state).items():
                gone = [name for name in names if not (self._folder / name).is_file()]
                found |= {k: gone[0]} if gone else {}
            return found

        for k, name in comm.on_first(missing).items():
            self._say(
                f"{self._folder / name} is gone: {self._tasks[k].name} begins anew, not done and "
                "without a best"
            )
            # Its lowest loss belonged to weights that are lost, so any loss is lower than inf.
            state.lowest[k], state.stalled[k] = np.inf, 0
            state.held[k] = state.anchored[k] = state.best_at[k] = state.asked[k] = np.nan
        self._attach(state)
        self._saved = _named(state)

    def _keep(self, step: int) -> None:
        """Write the trained weights, whole and by name. A collective."""
        found = masters.whole(self._engine, masters.local(self._engine))

        def write() -> None:
            check_free(self._folder, ANCHORS, "the best weights of tasks go there")
            if not manifest.is_ours(self._folder, ANCHORS):
                manifest.mark(self._folder, ANCHORS)
            target = self._folder / _weights(step)
            save_file(found, _half(target))
            _finish(target)

        comm.on_first(write)

    def _has(self, k: int, rows: np.ndarray) -> bool:
        """Whether the columns of task k have these rows. Log probabilities are not all 0."""
        if k not in self._attached:
            return False
        columns = self._tasks[k].train.columns
        return all(columns(int(row))[TEACHER[1]][:1].any() for row in rows)

    def _ask(self, k: int, state: RunState, rows: np.ndarray) -> None:
        """Write what the teacher of task k says at the targets of these rows. A collective. The
        trained weights are put back, bit for bit.
        """

        def read() -> dict[str, Tensor]:
            best = self._folder / _weights(int(state.anchored[k]))
            with safe_open(best, framework="pt") as stored:
                return masters.scatter(self._engine, stored.get_tensor, "cpu")

        theirs = comm.together(read)
        # `theirs` has the trained weights from here on, until they are exchanged again.
        masters.exchange(self._engine, theirs)
        self._answer(k, rows, self._folder / _cache(k, state))
        masters.exchange(self._engine, theirs)  # not in a `finally`, as in `Average.swapped`

    def _answer(self, k: int, rows: np.ndarray, target: Path) -> None:
        data = self._tasks[k].train
        starts = np.cumsum([0, *data.targets])
        asked = np.cumsum([0, *data.targets[rows]])  # as `starts`, of these rows alone
        objective, layout = next(
            (one, layout)
            for one, layout in zip(self._objectives, self._layouts.each, strict=True)
            if layout.streams is None or k in layout.streams
        )
        stored, first = None, 0
        while first < len(rows):
            # As many rows as fit a chunk, at least one.
            last = max(first + 1, int(np.searchsorted(asked, asked[first] + CHUNK, "right")) - 1)
            chunk = rows[first:last]
            ids, log_p = self._chunk(teacher_of(objective), layout, k, chunk)
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chunk])

            # Defaults, so that the function has this round's values and not the loop's last.
            def write(stored=stored, ids=ids, log_p=log_p, at=places) -> np.memmap | None:
                if comm.rank():
                    return None
                if stored is None:
                    kind = [("ids", "<i4", ids.shape[1:]), ("log_p", "<f4", log_p.shape[1:])]
                    shape = (int(starts[-1]),)
                    stored = np.lib.format.open_memmap(_half(target), "w+", np.dtype(kind), shape)
                stored["ids"][at] = ids.cpu().numpy()
                stored["log_p"][at] = log_p.cpu().numpy()
                return stored

            stored, first = comm.together(write), last
        # On rank 0 alone: all of it is in the file before that gets its name.
        if stored is not None:
            stored.flush()
            del stored
        comm.on_first(lambda: _finish(target))

    def _chunk(
        self, ask: Callable, layout: Layout, k: int, row: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The answers at all targets of some rows of task k, in their order, on every rank."""
        splits = [task.train for task in self._tasks]
        starts = np.cumsum([0, *splits[k].targets[row]])
        found: tuple[Tensor, ...] = ()
        with torch.no_grad():
            for micro, batch in micro_batches(self._engine, layout, splits, k, row):
                answers = ask(self._engine.evaluate, batch)
                if not found:
                    found = tuple(one.new_zeros(starts[-1], one.shape[1]) for one in answers)
                pieces = [i for indices in micro for i in indices]
                # Each row is read on one rank; zeros elsewhere make the sum over ranks its answer.
                if not batch.is_dummy and pieces:
                    at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in pieces])
                    for one, answer in zip(found, answers, strict=True):
                        one[torch.from_numpy(at).to(one.device)] = answer
        ids, log_p = map(comm.sum_, found)
        return ids, log_p

    def _attach(self, state: RunState) -> None:
        """Let the rows of each task have its teacher's columns, or none."""
        wanted = {int(k): _cache(k, state) for k in np.flatnonzero(~np.isnan(state.asked))}
        if wanted == self._attached:
            return
        # Batches that are prepared already have the old columns.
        self._batches.forget()

        def attach() -> None:
            for k, task in enumerate(self._tasks):
                if k not in wanted:
                    for name in TEACHER:
                        task.train.detach(name)
                elif self._attached.get(k) != wanted[k]:
                    file = self._folder / wanted[k]
                    stored = np.load(file, mmap_mode="r", allow_pickle=False)
                    for name, field in zip(TEACHER, ("ids", "log_p"), strict=True):
                        task.train.attach(name, Flat(stored[field], task.train.targets))

        comm.together(attach)
        self._attached = wanted

    def _prune(self, state: RunState) -> None:
        if comm.rank() or not manifest.is_ours(self._folder, ANCHORS):
            return
        kept = _named(state) | self._saved
        for path in self._folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in kept:
                path.unlink()


def held(state: RunState) -> np.ndarray | None:
    """(K,) bool: the tasks whose loss is the divergence from a teacher. None: there are none."""
    if state.anchored is None or np.isnan(state.anchored).all():
        return None
    return ~np.isnan(state.anchored)


def unseen(state: RunState, losses: np.ndarray) -> np.ndarray:
    """(K,) losses as balancers may read them: nan, as of absent tasks, where it is a divergence."""
    is_held = held(state)
    return losses if is_held is None else np.where(is_held, np.nan, losses)


def _names(state: RunState) -> dict[int, list[str]]:
    """By task, the files that it needs: its teacher's weights stay, for rows not yet read."""
    found = {}
    for k, (best, anchored) in enumerate(zip(state.best_at, state.anchored, strict=True)):
        weights = best if np.isnan(anchored) else anchored
        if not np.isnan(weights):
            found[k] = [_weights(int(weights))]
        if not np.isnan(state.asked[k]):
            found[k].append(_cache(k, state))
    return found


def _named(state: RunState) -> set[str]:
    if state.best_at is None:
        return set()
    return {name for names in _names(state).values() for name in names}


def _weights(step: int) -> str:
    return f"weights-{step:08d}.safetensors"


def _cache(k: int, state: RunState) -> str:
    return f"task-{k}-{int(state.anchored[k]):08d}-{int(state.asked[k]):08d}.npy"


def _half(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _finish(target: Path) -> None:
    """Give a file its name once it is on the disk."""
    flush(_half(target))
    os.replace(_half(target), target)
    flush(target.parent)
