"""The loop: next micro-batches -> probe -> weights -> step -> log -> save, until done."""

import resource
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from balancers import Holder, Signal
from mtl import process
from mtl.config import Config
from mtl.distributed import comm, watchdog
from mtl.output import trackers
from mtl.output.state import RunState
from mtl.train import anchor, draws, evaluate, incidents, schedule
from mtl.train.evaluate import ValidationResult
from mtl.train.randomness import seed_step
from mtl.train.run import Run
from mtl.train.step import GlobalBatch, NonFinite, StepReport, fetch, train_step
from mtl.train.weights import weigh


def train(run: Run, state: RunState) -> RunState:
    """Train from `state.step` to `run.steps`, or until all tasks are done. A collective. Returns
    the last state.

    Raises:
        Preempted: a signal has asked any rank to stop; all have saved, but before the first step.
        StepError: a loss or gradient is not finite, and the config lets no more batches go.
        CheckpointError: the disk is full, or closed to us.
    """
    while True:
        try:
            return _train(run, state)
        except incidents.GoBack as back:
            state = back.state
        except OSError as error:
            if error.errno not in process.STORAGE:
                raise
            raise run.checkpoints.unwritable(error) from error
        except RuntimeError as error:  # such as of a collective, whose text names no step
            at = f"rank {comm.rank()} of {comm.world()} failed, {watchdog.where()}"
            error.add_note(f"{at}. --resume goes on from the newest checkpoint.")
            raise


def _train(run: Run, state: RunState) -> RunState:
    """`train`, until the end or until the run goes back to a checkpoint."""
    config, names, k = run.config, run.names, len(run.names)
    started, first = time.monotonic(), state.step
    while True:
        t = state.step
        watchdog.doing(f"at step {t} of {run.steps}")
        is_due = _due(config.evaluate.every, t, run.steps) and state.evaluated < t
        validation = _evaluate(run, state) if is_due else None
        is_best = validation is not None and config.checkpoint.best and state.best["step"] == t
        is_over = t == run.steps or bool(run.patience and run.patience.done(state).all())
        signs = [process.stop_asked(), run.trouble is not None]
        asked, troubled = comm.sum_(torch.tensor(signs, dtype=torch.float32)).bool().tolist()
        if troubled:
            comm.together(run.raise_trouble)
        is_due = asked or is_over or _due(config.checkpoint.every, t, run.steps)
        if t > first and (is_best or is_due):
            _save(run, state, is_best)
        if is_over:
            return state
        if asked:
            saved = ", and saved," if run.checkpoints.at else ""  # not before the first update
            raise process.Preempted(f"asked to stop{saved} at step {t}/{run.steps}")

        began = time.monotonic()
        draws.plan(run, state)
        if run.anchors and (rows := run.anchors.ask(state, run.steps)):
            run.log(t, {"anchor/rows": rows})
        if t in state.passed:
            incidents.pass_over(run, state)
            continue
        kept = incidents.before(run, state)
        batch = fetch(lambda t=t: run.batches.batch(t), k)
        lr = _lr(config, t, run.steps)
        try:
            state.weights = weigh(run, state, batch, validation)
            weights, drawn = draws.loss_weights(run, state), draws.values(run, state)
            seed_step(config.train.seed, t)
            report = train_step(run.engine, run.objective, batch, weights, lr, names)
        except NonFinite as error:
            incidents.meet(run, state, error, kept)
            continue
        incidents.watch(run, state, report)
        state.step, state.train_loss = t + 1, anchor.unseen(state, report.losses)
        if run.average:
            run.average.after_update(state)
        state.target_tokens += int(batch.tokens.sum())
        if Signal.REPLAY_LOSS in run.holder.balancer.needs:
            seed_step(config.train.seed, t)
            replayed = evaluate.replay(run.engine, run.objective, batch, k)
            state.replay_loss = anchor.unseen(state, replayed)

        now = time.monotonic()
        values = _train_values(names, weights, report, batch, run.holder, anchor.held(state))
        values |= drawn | _signal_values(names, run.holder, state)
        values["train/lr"] = lr
        values["train/target_tokens"] = state.target_tokens
        values["train/tokens_per_second"] = int(batch.tokens.sum()) / (now - began)
        values["time/step_seconds"] = now - began
        values["time/left_seconds"] = (
            (now - started) / (state.step - first) * (run.steps - state.step)
        )
        run.log(t, values)


def _due(every: int | None, step: int, steps: int) -> bool:
    """Whether an event of every `every` steps, and of the end, is due at `step`."""
    return step == steps or (every is not None and step % every == 0)


def _lr(config: Config, step: int, steps: int) -> float:
    shape = config.schedule
    return schedule.lr(
        step,
        peak=config.optimizer.lr,
        steps=steps,
        warmup=shape.warmup,
        name=shape.name,
        floor=shape.floor,
    )


def _evaluate(run: Run, state: RunState) -> ValidationResult:
    """The full validation pass. The state learns whether it is the best. The first pass gives every
    group's initial loss.
    """
    began, asks = time.monotonic(), _asks(run, state.step)

    def full_pass(weights: str = "model") -> ValidationResult:
        found = evaluate.full_pass(run.engine, run.objective, run.validation, len(run.names))
        if bad := evaluate.bad_losses(run.names, found.losses, found.tokens.sum(1) > 0):
            averaged = ", with averaged weights" * (weights == "average")
            raise evaluate.not_finite(state.step, bad + averaged)
        if not asks:
            return found
        name = f"step-{state.step:08d}{'.average' * (weights == 'average')}.jsonl"
        answers = run.asking.measure(run.engine, run.checkpoints.output / "predictions" / name)
        return replace(found, measures={**found.measures, **answers})

    validation = full_pass()
    state.evaluated = state.step
    if state.base_sums is None:
        state.base_sums, state.base_tokens = validation.sums, validation.tokens
    passes = {"model": validation}
    if run.average:
        run.average.at_pass(state)
        passes["average"] = run.average.measure(state, validation, lambda: full_pass("average"))
    found = {weights: _found(run, one) for weights, one in passes.items()}
    values = _eval_values("eval", found["model"], run.names)
    if run.average:
        values |= _eval_values("eval/average", found["average"], run.names)
    told = run.patience.observe(state, validation.losses, run.names) if run.patience else []
    if run.patience:
        done = zip(run.names, run.patience.done(state).tolist(), strict=True)
        values |= {f"patience/{name}/done": float(is_done) for name, is_done in done}
    values |= _memory(run.engine.device)
    run.log(state.step, values | {"time/evaluate_seconds": time.monotonic() - began})
    for text in told:
        run.say(f"step {state.step}/{run.steps}  {text}")
    if run.anchors:
        run.anchors.at_pass(state)
    if asks or run.config.evaluate.best.rpartition("/")[2] not in _kinds_asked(run):
        _judge(run, state, found)
    if run.config.checkpoint.bests:
        better = run.checkpoints.save_bests(run.engine, state, run.names, validation.losses)
        if better and state.step:
            run.say(f"step {state.step}/{run.steps}  kept the best of {', '.join(better)}")
    return validation


def _asks(run: Run, step: int) -> bool:
    """Whether answers are generated at the full pass of this step."""
    every = run.config.evaluate.generate.every
    return run.asking is not None and every is not None and _due(every, step, run.steps)


def _kinds_asked(run: Run) -> Mapping[str, object]:
    return run.asking.kinds if run.asking else {}


def _found(run: Run, validation: ValidationResult) -> dict[str, float]:
    """Everything that may judge a run: losses and measures."""
    measured = validation.measured(run.names, run.measures)
    return validation.summary(run.names) | measured


def _eval_values(group: str, found: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """What is logged of a pass: a task's loss under `<group>/<task>/loss`."""
    return {f"{group}/{what}{'/loss' * (what in names)}": value for what, value in found.items()}


def _judge(run: Run, state: RunState, found: Mapping[str, Mapping[str, float]]) -> None:
    """Put into the state whether this pass is the best so far, by `evaluate.best`.

    Args:
        found: what was measured with the trained weights ("model"), and with their average.
    """
    key = run.config.evaluate.best
    kind = run.measures.get(key.rpartition("/")[2])
    sign = -1 if kind is not None and kind.highest else 1
    for weights, values in found.items():
        value = values.get(key, np.nan)
        if not np.isfinite(value):
            raise ValueError(
                f"validation at step {state.step}: {key} (evaluate.best) is {value}: {values}"
            )
        if state.best is None or sign * value < sign * state.best["value"]:
            state.best = {"step": state.step, "value": value}
            if weights != "model":
                state.best["weights"] = weights
        is_single = weights == "model" and run.config.checkpoint.bests
        if is_single and (state.single is None or sign * value < sign * state.single["value"]):
            state.single = {"step": state.step, "value": value}


def _train_values(
    names: list[str],
    weights: np.ndarray,
    report: StepReport,
    batch: GlobalBatch,
    holder: Holder,
    is_held: np.ndarray | None,
) -> dict[str, float]:
    """What is logged of a step.

    Args:
        is_held: (K,) bool, the tasks whose loss is the divergence from their own best.
    """
    present = ~np.isnan(report.losses)
    values = {} if present.all() else {"train/present_weight": float(weights[present].sum())}
    values |= {
        "train/loss": float(
            (weights * report.losses)[present].sum() + sum(report.penalties.values())
        )
    }
    values |= {f"train/{name}": value for name, value in report.penalties.items()}
    for i, name in enumerate(names):
        what = "loss" if is_held is None or not is_held[i] else "kl"
        values[f"train/{name}/{what}"] = float(report.losses[i])
        values[f"train/{name}/weight"] = float(weights[i])
        values[f"train/{name}/tokens"] = int(batch.tokens[i])
    values["train/positions"] = batch.positions
    values["train/grad_norm"] = report.grad_norm
    method = holder.balancer.public().__name__.lower()
    for what, array in holder.explain.items():
        if np.ndim(array) == 0:
            values[f"{method}/{what}"] = float(array)
        else:
            values |= {
                f"{method}/{name}/{what}": float(x) for name, x in zip(names, array, strict=True)
            }
    return {tag: value for tag, value in values.items() if np.isfinite(value)}


def _signal_values(names: list[str], holder: Holder, state: RunState) -> dict[str, float]:
    """What the balancer read that nothing else logs, so that another can be replayed on it. On
    rank 0, whose balancer it is.
    """
    given, found = holder.signals, {}
    if given is not None and given.valid_loss is not None:
        found["probe/group"] = given.valid_group
        found |= {f"probe/{n}/loss": x for n, x in zip(names, given.valid_loss, strict=True)}
        found |= {f"probe/{n}/base": x for n, x in zip(names, given.valid_base, strict=True)}
    if state.replay_loss is not None:
        found |= {f"replay/{n}/loss": x for n, x in zip(names, state.replay_loss, strict=True)}
    return {tag: float(value) for tag, value in found.items() if np.isfinite(value)}


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has held so far, in GiB: of the host, of the device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    found = {"memory/host_gib": peak}
    if device.type != "cpu":
        found["memory/device_gib"] = torch.accelerator.max_memory_allocated(device) / 2**30
    return found


def _save(run: Run, state: RunState, is_best: bool) -> None:
    began = time.monotonic()
    state.metrics_bytes = trackers.metrics_bytes(run.checkpoints.output)
    folder = run.checkpoints.save(
        run.engine, run.holder, state, is_best=is_best, average=run.average
    )
    if run.anchors:
        run.anchors.after_save(state)
    best = (
        f", the best so far ({run.config.evaluate.best} {state.best['value']:.4f}"
        f"{', averaged weights' if 'weights' in state.best else ''})"
        if is_best
        else ""
    )
    run.say(
        f"step {state.step}/{run.steps}  saved {folder}{best} in {time.monotonic() - began:.1f} s",
    )
