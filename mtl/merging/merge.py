"""The merge: every tensor through a method, into a folder that appears whole or not at all."""

import functools
import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtl.merging import fit, sources
from mtl.merging.average import average
from mtl.merging.candidates import Candidates, Losses
from mtl.merging.files import Copy, Stored, carry, is_full
from mtl.merging.piece import MergeError, TensorPiece, factors
from mtl.merging.report import Counts, MergeReport, count
from mtl.merging.select import select

Method = Callable[..., Any]
Evaluate = Callable[[Path], Losses]
FAR = 1.0  # |delta| / |base| of a model that is not of this base: two independent ones have 1.4
REPORT = "merge.json"


def found(
    base: str | None, models: Sequence[Path], run: Path | None, steps: str | None
) -> tuple[str | None, list[Path]]:
    """Base and sub-models of a command line: those named, and those of a run.

    Raises:
        MergeError: neither is given, or `steps` is no range.
    """
    if run is None:
        if steps:
            raise MergeError(f"--steps: found {steps!r} without --run, wanted the run it is of.")
        if not models:
            raise MergeError("found neither --models nor --run, wanted at least one of them.")
        return base, list(models)
    span = None
    if steps is not None:
        first, _, last = steps.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise MergeError(f"--steps: found {steps!r}, wanted FIRST:LAST, such as 30:80.")
        span = int(first), int(last)
    name, of_run = sources.of_run(run, span)
    return base or name, [*models, *of_run]


def merge(
    base: str | None,
    models: Sequence[Path],
    method: Method,
    out: Path,
    *,
    seed: int = 0,
    adapters: bool = False,
    evaluate: Evaluate | None = None,
    tasks: Sequence[str] = (),
    force: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    allow_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> MergeReport:
    """Merge K sub-models of one base into the folder `out`.

    Args:
        base: a folder or hub name; None: the one that adapters name.
        models: K folders. Adapters are first added to their base. One that is given n times counts
            n times: its `weights` are added up. Methods without weights see it once.
        method: with its settings bound (`methods.named`).
        seed: of methods that draw.
        adapters: write an adapter, whole modules selected (`select`, granularity module or layer).
        evaluate: from a folder to its tasks' losses, for the report and for methods that choose.
        tasks: the names of these losses.
        force: write a model that is worse than the worst sub-model, or of a far base, too.
        memory: bytes for tensors in work; None: a quarter of what is free. One tensor of each model
            is the least.
        threads: tensors in work at once, at most; None: one a core.
        allow_remote_code: whether code that comes with the base may run.
        say: takes messages for people.

    Raises:
        MergeError, ConfigError: it cannot be done as asked. `out` is as it was.
    """
    if not models:
        raise MergeError("found no sub-model, wanted at least one.")
    if getattr(method.func, "chooses", False) and evaluate is None:
        raise MergeError(f"{method.func.__name__}: it chooses on validation rows: add --config.")
    models, method = _once(models, method)
    stream = functools.partial(_stream, seed=seed, memory=memory, threads=threads)
    with _folder(out) as (target, scratch):
        if adapters:
            stored = _adapters(models, base, method)
            # No base: an adapter's delta is from zeros.
            first, method = None, _module_wise(method)
        else:
            first, stored = _whole(base, models, scratch, allow_remote_code, say)
        names = [str(model) for model in models]
        settings = dict(method.keywords)
        report = MergeReport(method.func.__name__, settings, seed, str(base or ""), names)
        known: dict[Path, Losses] = {}

        def losses(folder: Path) -> Losses:
            if folder not in known:
                known[folder] = evaluate(folder)
            return known[folder]

        if chosen := getattr(method.func, "chooses", False):

            def candidate(weights: Sequence[float]) -> Losses:
                # One sub-model alone: it is there already, and its losses may be known.
                if max(weights) == 1:
                    return losses(stored[list(weights).index(1)].folder)
                tried = scratch / "candidate"
                # One candidate on the disk at a time.
                shutil.rmtree(tried, ignore_errors=True)
                tried.mkdir()
                stream(first, stored, functools.partial(average, weights=weights), tried)
                carry(stored[0].folder, tried)
                return evaluate(tried)

            report.weights = method(Candidates(len(stored), candidate))
            method = functools.partial(average, weights=report.weights)
        report.tensors = stream(first, stored, method, target, show=True)
        carry(stored[0].folder, target)
        _refuse(report, names, far=first is not None and not force)
        if evaluate is not None:
            report.tasks = _tasks(losses, evaluate(target), stored, names, tasks, bool(chosen))
            _refuse_worse(report.tasks, force)
        (target / REPORT).write_text(json.dumps(report.plain(), indent=1) + "\n", encoding="utf-8")
        (target / "README.md").write_text(_card(report, bool(adapters)), encoding="utf-8")
    return report


def _once(models: Sequence[Path], method: Method) -> tuple[list[Path], Method]:
    """Every folder once, and the method with the weights that follow."""
    count = Counter(models)
    if len(count) == len(models) or "weights" not in inspect.signature(method.func).parameters:
        return list(count), method
    each = factors(method.keywords.get("weights"), len(models), 1.0)
    weights = dict.fromkeys(count, 0.0)
    for model, weight in zip(models, each, strict=True):
        weights[model] += weight
    return list(count), functools.partial(method, weights=list(weights.values()))


@contextmanager
def _folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that takes the name `out` at the end, and one beside it that goes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out}: found something there, wanted a new or empty folder. Untouched.")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            target, scratch = Path(temporary) / "merged", Path(temporary) / "scratch"
            target.mkdir()
            scratch.mkdir()
            yield target, scratch
            # An empty folder of the user's; it had to be one, see above.
            if out.exists():
                out.rmdir()
            target.rename(out)
    except OSError as e:
        if not is_full(e):
            raise
        text = f"{out}: the disk is full ({e}). Make room; nothing was left behind."
        raise MergeError(text) from e


def _whole(
    base: str | None,
    models: Sequence[Path],
    scratch: Path,
    allow_remote_code: bool,
    say: Callable[[str], None],
) -> tuple[Stored, list[Stored]]:
    for model in models:
        if not model.is_dir():
            raise MergeError(f"{model}: found no such folder, wanted a model's.")
    base = sources.base_of_adapters(list(models), base)
    if base is None:
        raise MergeError("found no base: the models are no adapters, so add --base.")
    found = []
    for i, model in enumerate(models):
        if sources.is_adapter(model):
            say(f"{model}: an adapter, added to its base first")
        found.append(Stored(sources.whole(model, scratch / f"model-{i}", allow_remote_code)))
    first = Stored(sources.folder_of(base))
    try:
        fit.check(first, found)
    except MergeError:
        # The names are alike, so reading it again would change nothing: it does not fit.
        if (other := sources.like(first, found[0], scratch / "base", say)) is first:
            raise
        first = other
        fit.check(first, found)
    return first, found


def _adapters(models: Sequence[Path], base: str | None, method: Method) -> list[Stored]:
    whole = [str(model) for model in models if not sources.is_adapter(model)]
    if whole:
        raise MergeError(f"--adapters: found whole models ({', '.join(whole)}), wanted adapters.")
    if method.func is not select or method.keywords.get("granularity", "module") not in (
        "module",
        "layer",
    ):
        raise MergeError(
            f"--adapters: found {method.func.__name__} {method.keywords}, wanted select by module "
            "or layer: A of one run and B of another mean nothing together. Without --adapters "
            "every method works, on the adapted weights."
        )
    sources.base_of_adapters(list(models), base)
    stored = [Stored(model) for model in models]
    fit.check_adapters(stored)
    return stored


def _module_wise(method: Method) -> Method:
    return functools.partial(method.func, **{"granularity": "module", **method.keywords})


def _stream(
    base: Stored | None,
    models: Sequence[Stored],
    method: Method,
    target: Path,
    *,
    seed: int,
    memory: int | None,
    threads: int | None,
    show: bool = False,
) -> dict[str, Counts]:
    """Merge tensor by tensor into files like the first sub-model's.

    A tensor is one thread's from beginning to end, so that sums do not depend on their number.
    """
    like, counts = models[0], {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = memory or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    # Pool threads compute with one torch thread each; the caller's number comes back below.
    before = torch.get_num_threads()

    def work(name: str) -> tuple[str, Counts | None]:
        if not like.entries[name].is_float:  # counters and masks are nobody's to average
            copy.write(name, (base or like).tensor(name))
            return name, None
        stored = [model.tensor(name) for model in models]
        start = base.tensor(name).to(stored[0].dtype) if base else torch.zeros_like(stored[0])
        piece = TensorPiece(name, start, stored, seed)
        merged = _checked(method, piece).to(start.dtype)
        copy.write(name, merged)
        piece.__dict__.pop("deltas", None)  # what the method computed
        return name, count(piece, merged)

    running: dict[Future, int] = {}
    with (
        Copy(like, target) as copy,
        ThreadPoolExecutor(threads or cores or 1, initializer=torch.set_num_threads, initargs=(1,))
        as pool,
        # None: on a terminal only
        tqdm(total=len(like.entries), unit="tensor", desc="merge", disable=None if show else True)
        as bar,
    ):  # fmt: skip

        def settle(least: int) -> None:
            """Wait until at most `least` bytes are in work."""
            while running and sum(running.values()) > least:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for each in done:
                    del running[each]
                    name, found = each.result()
                    counts.update({name: found} if found else {})
                    bar.update()

        try:
            for name, entry in like.entries.items():
                # Bytes as stored and once in the wide type, twice as wide,
                # of every model, the base and the result.
                size = (entry.stop - entry.start) * 3 * (len(models) + 2)
                settle(max(0, limit - size))
                running[pool.submit(work, name)] = size
            # -1: until nothing is in work, since an empty tensor counts 0 bytes.
            settle(-1)
        finally:
            # After an error no further tensor is begun.
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
    return {name: counts[name] for name in like.entries if name in counts}


def _checked(method: Method, piece: TensorPiece) -> Tensor:
    merged = method(piece)
    name = method.func.__name__
    if not isinstance(merged, Tensor) or merged.shape != piece.base.shape:
        found = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
        raise MergeError(
            f"{name}: found {found} for {piece.name}, wanted a tensor of {list(piece.base.shape)}."
        )
    if not torch.isfinite(merged).all():
        raise MergeError(f"{name}: {piece.name} is not finite: is it so in a sub-model?")
    return merged


def _refuse(report: MergeReport, names: list[str], far: bool) -> None:
    # The last of the diagonal is the merged model's.
    norms = report.total.gram.diagonal()[:-1]
    same = [name for name, norm in zip(names, norms, strict=True) if norm == 0]
    if same:
        raise MergeError(
            f"{', '.join(same)}: found the base itself, wanted models trained from it. Leave it "
            "out."
        )
    # The median: norms' scales and biases are alike in models that have nothing in common.
    every = [counts.figures()["drift"] for counts in report.tensors.values()]
    drift = [
        median([each for each in one if each is not None] or [0])
        for one in zip(*every, strict=True)
    ]
    if far and max(drift) > FAR:
        raise MergeError(
            f"{names[drift.index(max(drift))]}: found {max(drift):.2f} times the base's length "
            "between it and the base, wanted less than 1: it is of another base. --force merges."
        )


def _tasks(
    losses: Evaluate,
    merged: Losses,
    stored: list[Stored],
    names: list[str],
    tasks: Sequence[str],
    chosen: bool,
) -> dict[str, Any]:
    def read(one: Losses) -> list[float]:
        return (one.group(1) if chosen else one.losses).tolist()

    rows = "the half of validation that did not choose" if chosen else "validation"
    found = {name: read(losses(s.folder)) for name, s in zip(names, stored, strict=True)}
    return {"rows": rows, "names": list(tasks), "losses": {**found, "merged": read(merged)}}


def _refuse_worse(tasks: dict[str, Any], force: bool) -> None:
    macro = {name: sum(each) / len(each) for name, each in tasks["losses"].items()}
    merged = macro.pop("merged")
    worst = max(macro, key=macro.__getitem__)
    if not merged <= macro[worst] and not force:
        raise MergeError(
            f"the merged model's macro loss is {merged:.4f}, that of the worst sub-model "
            f"{macro[worst]:.4f} ({worst}). Take another method, or --force. Nothing was written."
        )


def _card(report: MergeReport, is_adapter: bool) -> str:
    text = "\n".join(report.lines())
    kind = "peft" if is_adapter else "transformers"
    return (
        f"---\nlibrary_name: {kind}\ntags: [coba-mtl, merge]\n---\n\n"
        f"# Merged by {report.method}\n\n"
        f"Of {', '.join(f'`{m}`' for m in report.models)}; base `{report.base}`.\n\n"
        f"```\n{text}\n```\n"
    )
