"""What a run does at a step whose loss or gradient is not finite (`train.not_finite`), and what it
says of a loss that leaps (`train.spike`).

A batch that is passed over leaves no trace: weights, optimizer, balancer and average are as if it
had not been there, and the step counts. So a run that skips it, one that goes back and passes over
it, and one that knew of it from the start are the same, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl.distributed import comm
from mtl.output import trackers
from mtl.output.state import RunState
from mtl.train import anchor
from mtl.train.run import Run
from mtl.train.step import NonFinite, StepReport

SHOWN = 12  # rows named of each stream
WINDOW, LEAST = 64, 5  # losses that a running median is of; fewer say nothing yet


class StepError(ValueError):
    """A step is not finite, and the run may not pass over its batch."""


class GoBack(Exception):
    """The run goes on from its last checkpoint, as `state` has it."""

    def __init__(self, state: RunState):
        self.state = state


def before(run: Run, state: RunState) -> Any:
    """What passing over this step's batch puts back: the balancer and its weights."""
    if run.config.train.not_finite.action != "skip":
        return None
    return run.holder.state_dict(), state.weights


def meet(run: Run, state: RunState, error: NonFinite, kept: Any) -> None:
    """Deal with a step that is not finite, which all ranks have found. A collective.

    Args:
        kept: what `before` gave at this step.

    Raises:
        StepError: the run ends here, with the rows named.
        GoBack: it goes on from its last checkpoint.
    """
    given, t = run.config.train.not_finite, state.step
    named, why = rows(run, t, error.tasks), ""
    found = run.checkpoints.at if given.action == "back" else None
    if given.action == "back" and not found:
        why = " There is no checkpoint yet to go back to."
    if given.action != "stop" and len(state.passed) >= given.most:
        why = f" {len(state.passed)} batches were passed over before (train.not_finite.most)."
    if given.action == "stop" or why:
        raise StepError(f"step {t}: {error}{why}\n{named}") from error
    count = f"({len(state.passed) + 1} of at most {given.most})"
    if given.action == "skip":
        saved, state.weights = kept
        run.holder.load_state_dict(saved)
        _say(run, t, f"{error.what}: this batch is passed over {count}\n{named}")
        pass_over(run, state)
        return
    _say(run, t, f"{error.what}: back to {found}, to pass over this batch {count}\n{named}")
    passed = sorted({*state.passed, t})
    comm.on_first(lambda: run.checkpoints.pass_over(passed))  # killed from here on, it knows
    again = run.checkpoints.load(run.engine, run.holder, found, run.average)
    again.passed = passed
    if run.anchors:
        run.anchors.restore(again)
    comm.on_first(
        lambda: trackers.cut_metrics(
            run.checkpoints.output, again.metrics_bytes, run.checkpoints.say
        )
    )
    raise GoBack(again)


def pass_over(run: Run, state: RunState) -> None:
    """Count a step whose batch is passed over."""
    if state.step not in state.passed:
        state.passed.append(state.step)
    run.log(state.step, {"train/passed_over": state.passed.index(state.step) + 1})
    state.step += 1


def watch(run: Run, state: RunState, report: StepReport) -> None:
    """Say which losses of step `state.step` are far above what they were. The state keeps them."""
    factor, t = run.config.train.spike, state.step
    if factor is None:
        return
    if state.recent is None:
        state.recent = np.full((len(run.names), WINDOW), np.nan)
    losses = anchor.unseen(state, report.losses)
    for name, window, loss in zip(run.names, state.recent, losses, strict=True):
        known = window[~np.isnan(window)]
        median = float(np.median(known)) if len(known) >= LEAST else np.inf
        if loss > factor * median > 0:
            _say(
                run,
                t,
                f"warning: the loss of {name} is {loss:.4g}, {loss / median:.3g} times its median "
                f"of the last {len(known)}, {median:.4g} (train.spike: {factor:g})\n"
                f"{rows(run, t, [name])}",
            )
        if np.isfinite(loss):
            window[:] = [*window[1:], loss]


def rows(run: Run, step: int, tasks: Sequence[str] = ()) -> str:
    """The rows of global batch `step` that these tasks (none: all) read, a line a stream."""
    stream, row = run.batches.rows(step)
    wanted = {
        s for i, n in enumerate(run.names) if not tasks or n in tasks for s in run.book.reads(i)
    }
    lines = []
    for s, name in enumerate(run.batches.mix.names):
        mine = row[stream == s].tolist() if s in wanted else []
        if mine:
            more = f" and {len(mine) - SHOWN} more" if len(mine) > SHOWN else ""
            lines.append(
                f"  rows of {name}: {', '.join(run.batches.places(s, mine[:SHOWN]))}{more}"
            )
    return "\n".join(lines)


def _say(run: Run, step: int, text: str) -> None:
    run.say(f"step {step}/{run.steps}  {text}")
