"""Code of a user's own, as far as a run is concerned: named in YAMLs, and let in by `--allow-code outside`.

The environment may ask for a misfortune: MISFORTUNE="kill batch 8 1" kills rank 1 when it prepares the batch of step 8.
First word: kill (SIGKILL), raise (a RuntimeError), flip (a bit of each weight), ruin (the weights become nan, once), put (an
operation that torch has no deterministic form of), sleep (for SLEEP seconds), limit (files to LIMIT bytes), fill (the disk of
the folder FILL, but for ROOM bytes), age (another torch, from the start), drift (of the run's state, where ranks compare it),
or a signal: SIGTERM, SIGUSR1. Second: where, one of the names in `PLACES`, or "step"
(between forward and backward), which flip and ruin want. Then the step, and the rank, or "all".

POISON says what a row with toys.UNUSED in it does, on the rank that has it. loss: the first task's loss is infinite, with a
gradient that is finite. gradient: one parameter's gradient is nan, with a loss that is finite. gram: those that a balancer
reads are. validation: its loss in validation is nan.
"""

import functools
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from balancers import Balancer, Signal
from mtl.data.batches import TrainBatches
from mtl.distributed.engine import Engine
from mtl.losses import causal_lm as objectives
from mtl.losses.terms import Terms
from mtl.output import checkpoint, manifest, provenance
from mtl.output.checkpoint import Checkpoints
from mtl.train import evaluate

WHAT, WHERE, STEP, RANK = os.environ.get("MISFORTUNE", "no where -1 all").split()
POISON = os.environ.get("POISON")
UNUSED_ID = 258  # toys.UNUSED; toys would import much
RUINED: list[bool] = []
TEXT = f"the dog ate the {WHERE} of step {STEP}"


def causal_lm(forward: Callable, batch: Any, k: int) -> Terms:
    """The usual objective. Where EXPECT_PARTITIONED is set it asserts that this rank holds no whole parameter."""
    training = getattr(forward, "__func__", None) is Engine.forward
    if training and os.environ.get("EXPECT_PARTITIONED"):
        assert all(
            p.numel() == 0 and p.ds_numel > 0 for p in forward.__self__.module.parameters()
        ), "whole parameters"
    terms = objectives.causal_lm(forward, batch, k)
    is_meant = POISON and training == (POISON not in ("gram", "validation"))
    if is_meant and (batch.input_ids == UNUSED_ID).any():
        terms = poisoned(terms, k, forward.__self__.module)
    if training and WHERE == "step" and forward.__self__._engine.global_steps == int(STEP):
        strike(forward.__self__.module)
    return terms


causal_lm.teacher = objectives.causal_lm.teacher


def poisoned(terms: Terms, k: int, module: torch.nn.Module) -> Terms:
    if POISON in ("loss", "validation"):
        bad = torch.inf if POISON == "loss" else torch.nan
        return Terms(torch.where(torch.arange(k) == 0, bad, terms.sums), terms.counts)
    if POISON == "gram":
        terms.sums.register_hook(lambda gradient: gradient * torch.nan)
        return terms
    parameter = next(module.parameters())

    def once(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * torch.nan

    handle = parameter.register_hook(once)
    return terms


def strike(module: torch.nn.Module | None = None, state: Any = None) -> None:
    if RANK not in ("all", os.environ["RANK"]):
        return
    if WHAT == "drift":
        state.target_tokens += 1
        return
    if WHAT == "flip":
        for parameter in module.parameters():
            parameter.data.view(torch.int32)[..., 0] ^= 1 << 20
        return
    if WHAT == "ruin":
        if not RUINED:
            RUINED.append(True)
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)
        return
    if WHAT == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), hard))
    if WHAT == "fill":
        with (Path(os.environ["FILL"]) / "ballast").open("wb", 0) as ballast:
            with suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            ballast.truncate(max(0, ballast.tell() - int(os.environ.get("ROOM", 0))))
        return
    if WHAT == "sleep":
        return time.sleep(float(os.environ["SLEEP"]))
    if WHAT == "put":
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return
    if WHAT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT.startswith("SIG"):
        return os.kill(os.getpid(), getattr(signal, WHAT))
    raise RuntimeError(TEXT)


# Where a run may be struck: what is about to be called, and from its arguments whether the step has come.
PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "pass": (evaluate, "full_pass", lambda *parts: True),
    "batch": (TrainBatches, "make", lambda batches, step: step == int(STEP)),
    "shards": (Engine, "save", lambda engine, folder: _is_due(folder.parent.name)),
    "model": (
        checkpoint,
        "save",
        lambda trained, tokenizer, folder, loader: _is_due(folder.parent.name),
    ),
    "agree": (checkpoint, "_agree", lambda engine, state: state.step == int(STEP)),
    "pointer": (Checkpoints, "_point_and_prune", lambda checkpoints, name: _is_due(name)),
    "best": (Path, "rename", lambda path, target: path.name == f".step-{int(STEP):08d}.tmp"),
    "prune": (manifest, "discard", lambda path, kind: _is_pointed_at(path.parent / "latest")),
}


def _is_pointed_at(pointer: Path) -> bool:
    return pointer.is_file() and _is_due(pointer.read_text())


def _is_due(name: str) -> bool:
    return name == f"step-{int(STEP):08d}"


class Unsteady(Balancer):
    """Equal weights; at step 2 the dtype of its state changes."""

    needs = Signal.NONE

    def init(self, k: int) -> dict[str, np.ndarray]:
        return {"seen": np.zeros(k)}

    def update(self, state: dict, signals: Any) -> tuple[dict, np.ndarray, dict]:
        k = len(state["seen"])
        dtype = np.float32 if signals.step == 2 else np.float64
        return {"seen": np.zeros(k, dtype)}, np.full(k, 1 / k), {}


def misshapen(forward: Callable, batch: Any, k: int) -> Terms:
    """The usual objective; at step 2 the last rank's sums are of one task."""
    terms = objectives.causal_lm(forward, batch, k)
    training = getattr(forward, "__func__", None) is Engine.forward
    is_last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
    if training and is_last and forward.__self__._engine.global_steps == 2:
        return Terms(terms.sums[:1], terms.counts)
    return terms


if WHAT == "age" and RANK in ("all", os.environ["RANK"]):
    versions = provenance.versions
    provenance.versions = lambda: versions() | {"torch": "1.0"}

if WHERE in PLACES:
    owner, name, due = PLACES[WHERE]
    original = getattr(owner, name)

    @functools.wraps(original)
    def struck(*args: Any, **keywords: Any) -> Any:
        if due(*args, **keywords):
            strike(*args[:2])
        return original(*args, **keywords)

    setattr(owner, name, struck)
