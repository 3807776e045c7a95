"""The loop: next micro-batches -> probe -> weights -> step -> log -> save, until done."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from balancers import Holder, Signal, Signals
from mtl import comm, evaluate, gram, schedule, trackers
from mtl.checkpoint import Checkpoints, RunState
from mtl.config import Config
from mtl.data.batches import TrainBatches, ValidationCut
from mtl.data.collate import MicroBatch
from mtl.engine import Engine
from mtl.evaluate import Validation
from mtl.objectives import Objective
from mtl.patience import Patience, hold
from mtl.step import GlobalBatch, StepReport, fetch, train_step
from mtl.trackers import Tracker


@dataclass
class Parts:
    """Everything a run is made of, built by `launch/train.py`.

    Attributes:
        names: the K tasks, in the order of every (K,) array.
        steps: optimizer updates in the whole run.
        trackers: empty on every rank but 0.
        differentiated: what gradients are taken by, where the balancer reads their products.
        probe_every: optimizer steps between the probes that a balancer reads.
    """

    config: Config
    names: list[str]
    steps: int
    engine: Engine
    objective: Objective
    holder: Holder
    batches: TrainBatches
    cut: ValidationCut
    checkpoints: Checkpoints
    trackers: list[Tracker]
    differentiated: Sequence[nn.Parameter] = ()
    probe_every: int = 1

    @property
    def patience(self) -> Patience | None:
        given = self.config.evaluate.patience
        return given and Patience(given.evaluations, given.action, given.margin)


def run(parts: Parts, state: RunState) -> RunState:
    """Train from `state.step` to `parts.steps`, or until all tasks are done. A collective. Returns the last state."""
    config, names, k = parts.config, parts.names, len(parts.names)
    started, first = time.monotonic(), state.step
    while True:
        t = state.step
        is_due = _due(config.evaluate.every, t, parts.steps) and state.evaluated < t
        validation = _evaluate(parts, state) if is_due else None
        is_best = validation is not None and config.checkpoint.best and state.best["step"] == t
        is_over = t == parts.steps or bool(parts.patience and parts.patience.done(state).all())
        if t > first and (is_best or is_over or _due(config.checkpoint.every, t, parts.steps)):
            _save(parts, state, is_best)
        if is_over:
            return state

        began = time.monotonic()
        batch = fetch(lambda t=t: parts.batches.batch(t), k)
        state.weights = weights = _weigh(parts, state, batch, validation)
        _seed(config.train.seed, t)
        lr = _lr(config, t, parts.steps)
        report = train_step(parts.engine, parts.objective, batch, weights, lr, names)
        state.step, state.train_loss = t + 1, report.losses
        state.target_tokens += int(batch.tokens.sum())
        if Signal.REPLAY_LOSS in parts.holder.balancer.needs:
            _seed(config.train.seed, t)
            state.replay_loss = evaluate.replay(parts.engine, parts.objective, batch, k)

        now = time.monotonic()
        values = _train_values(names, weights, report, batch, parts.holder)
        values["train/lr"] = lr
        values["train/target_tokens"] = state.target_tokens
        values["train/tokens_per_second"] = int(batch.tokens.sum()) / (now - began)
        values["time/step_seconds"] = now - began
        values["time/left_seconds"] = (now - started) / (state.step - first) * (parts.steps - state.step)
        _log(parts, t, values)


def _due(every: int | None, step: int, steps: int) -> bool:
    """Whether what happens every so many steps, and at the end, happens at `step`."""
    return step == steps or (every is not None and step % every == 0)


def _evaluate(parts: Parts, state: RunState) -> Validation:
    """The full validation pass, and in the state whether it is the best so far; the first one gives every group's initial loss."""
    began = time.monotonic()
    validation = evaluate.full_pass(parts.engine, parts.objective, parts.cut, len(parts.names))
    state.evaluated = state.step
    if state.base_sums is None:
        state.base_sums, state.base_tokens = validation.sums, validation.tokens
    summary = validation.summary(parts.names)
    values = {f"eval/{name}/loss": summary[name] for name in parts.names}
    values |= {f"eval/{what}": summary[what] for what in ("macro", "token", "worst")}
    _log(parts, state.step, values | {"time/evaluate_seconds": time.monotonic() - began})
    if parts.patience:
        for text in parts.patience.observe(state, validation.losses, parts.names):
            _say(parts, f"step {state.step}/{parts.steps}  {text}")

    key = parts.config.evaluate.best
    if not np.isfinite(summary[key]):
        raise ValueError(f"validation at step {state.step}: {key} (evaluate.best) is {summary[key]}: {summary}")
    if state.best is None or summary[key] < state.best["value"]:
        state.best = {"step": state.step, "value": summary[key]}
    return validation


def _weigh(parts: Parts, state: RunState, batch: GlobalBatch, validation: Validation | None) -> np.ndarray:
    """Measure what the balancer declares it needs, update it on rank 0 and share its weights. A collective.

    Rank 0 alone: numpy on mixed hosts differs in last bits, and weights that differ between ranks are a wrong gradient.

    Args:
        validation: the full pass at this step, where there was one: the probe is in it.
    """
    t, needs = state.step, parts.holder.balancer.needs
    every, gram_every = parts.probe_every, parts.config.gram.every
    group = t // every % parts.cut.groups
    signals = {"step": t}
    if Signal.TOKENS in needs:
        signals["tokens"] = batch.tokens.numpy()
    if Signal.TRAIN_LOSS in needs:
        signals["train_loss"] = state.train_loss
    if Signal.REPLAY_LOSS in needs:
        signals["replay_loss"] = state.replay_loss
    if Signal.VALID_LOSS in needs and t % every == 0:
        # A full pass at these very parameters has read the group's rows in the same micro-batches.
        signals["valid_loss"] = (
            validation.group(group)
            if validation is not None
            else evaluate.probe(parts.engine, parts.objective, parts.cut, group, len(parts.names))
        )
        signals["valid_base"] = Validation(state.base_sums, state.base_tokens).group(group)
        signals["valid_group"] = group
    if (Signal.GRAM | Signal.VALID_GRAM) & needs and t % gram_every == 0:
        signals |= _products(parts, t, t // gram_every % parts.cut.groups)

    weights = torch.zeros(len(parts.names), dtype=torch.float64)
    if comm.together(lambda: parts.holder.update(Signals(**signals)) if comm.rank() == 0 else None) is not None:
        held = parts.holder.weights
        weights.copy_(torch.from_numpy(held if state.held is None else hold(state.held, held)))
    return comm.broadcast_(weights).numpy()


def _products(parts: Parts, step: int, group: int) -> dict[str, np.ndarray]:
    """The Gramian of batch `step`'s gradients, and that of a validation group's with them, as the balancer needs."""

    def measure(make: Callable[[int], list[list[MicroBatch]]], number: int) -> Tensor:
        tasks = comm.together(lambda: make(number))
        return gram.gradients(parts.engine, parts.objective, tasks, parts.differentiated)

    found = {}
    _seed(parts.config.train.seed, step)
    parts.engine.train()
    ours = measure(parts.batches.by_task, step)
    if Signal.GRAM in parts.holder.balancer.needs:
        found["gram"] = gram.products(ours, ours)
    if Signal.VALID_GRAM in parts.holder.balancer.needs:
        parts.engine.eval()
        found["valid_gram"] = gram.products(measure(parts.cut.by_task, group), ours)
    return found


def _train_values(
    names: list[str], weights: np.ndarray, report: StepReport, batch: GlobalBatch, holder: Holder
) -> dict[str, float]:
    present = ~np.isnan(report.losses)
    values = {"train/loss": float((weights * report.losses)[present].sum() + sum(report.penalties.values()))}
    values |= {f"train/{name}": value for name, value in report.penalties.items()}
    for i, name in enumerate(names):
        values[f"train/{name}/loss"] = float(report.losses[i])
        values[f"train/{name}/weight"] = float(weights[i])
        values[f"train/{name}/tokens"] = int(batch.tokens[i])
    values["train/positions"] = batch.positions
    values["train/grad_norm"] = report.grad_norm
    method = type(holder.balancer).__name__.lower()
    for what, array in holder.explain.items():
        if np.ndim(array) == 0:
            values[f"{method}/{what}"] = float(array)
        else:
            values |= {f"{method}/{name}/{what}": float(x) for name, x in zip(names, array, strict=True)}
    return {tag: value for tag, value in values.items() if np.isfinite(value)}


def _lr(config: Config, step: int, steps: int) -> float:
    s = config.schedule
    return schedule.lr(step, peak=config.optimizer.lr, steps=steps, warmup=s.warmup, name=s.name, floor=s.floor)


def _seed(seed: int, step: int) -> None:
    """Dropout's randomness is a function of seed, step and rank, so that it has no state to save."""
    digest = hashlib.blake2b(f"{seed}/dropout/{step}/{comm.rank()}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def _log(parts: Parts, step: int, values: Mapping[str, float]) -> None:
    for tracker in parts.trackers:
        tracker.log(step, values)


def _save(parts: Parts, state: RunState, is_best: bool) -> None:
    began = time.monotonic()
    state.metrics_bytes = trackers.metrics_bytes(parts.checkpoints.output)
    folder = parts.checkpoints.save(parts.engine, parts.holder, state, is_best=is_best)
    best = f", the best so far ({parts.config.evaluate.best} {state.best['value']:.4f})" if is_best else ""
    _say(parts, f"step {state.step}/{parts.steps}  saved {folder}{best} in {time.monotonic() - began:.1f} s")


def _say(parts: Parts, text: str) -> None:
    for tracker in parts.trackers:
        tracker.say(text)
