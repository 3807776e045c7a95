"""The weights of a step: what the balancer reads, and everything that alters a weight before the
loss.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from balancers import Signal, Signals
from mtl.data.examples import Batch
from mtl.distributed import comm
from mtl.output.state import RunState
from mtl.train import evaluate, gram
from mtl.train.evaluate import ValidationResult
from mtl.train.patience import hold
from mtl.train.randomness import seed_step
from mtl.train.run import Run
from mtl.train.step import GlobalBatch, NonFinite


def weigh(
    run: Run, state: RunState, batch: GlobalBatch, validation: ValidationResult | None
) -> np.ndarray:
    """(K,) float64 weights of the whole global batch `state.step`, the same on every rank. A
    collective.

    From the balancer to the loss, in this order:

    1. `Grouped` (`tasks.X.group`): the balancer sees a group as one task. The group's tasks share
       its weight equally.
    2. The balancer itself (`CoBa.update`), with whatever wraps it (`Bounded`, `Scheduled`).
    3. `Holder`: each weight times `tasks.X.loss_weight`, brought back to the balancer's sum.
    4. Patience (`hold`): a done task has its held part, the others share the rest.
    5. Broadcast: steps 1 to 4 run on rank 0 alone, because numpy's last bits differ between unlike
       hosts.

    Nothing alters them afterwards: `terms.combine` multiplies each task's loss by its weight. Only
    where draws follow the weights does it count what the batch has of each task instead
    (`draws.loss_weights`).

    Args:
        validation: the full pass at this step, where there was one. It contains the probe.
    """
    signals = measure(run, state, batch, validation)

    def update() -> np.ndarray:
        weights = run.holder.update(signals)
        return weights if state.held is None else hold(state.held, weights)

    return comm.on_first(update)


def measure(
    run: Run, state: RunState, batch: GlobalBatch, validation: ValidationResult | None
) -> Signals:
    """Measure what the balancer declares that it needs, and no more. A collective.

    Raises:
        NonFinite: on every rank: a gradient is not finite; or a validation loss, which going back
            to a checkpoint may mend.
        ValueError: on every rank: a validation loss is not finite. No batch is to blame for it.
    """
    t, needs, k = state.step, run.holder.balancer.needs, len(run.names)
    signals: dict[str, object] = {"step": t}
    if Signal.TOKENS in needs:
        signals["tokens"] = batch.tokens.numpy()
    if Signal.TRAIN_LOSS in needs:
        signals["train_loss"] = state.train_loss
    if Signal.REPLAY_LOSS in needs:
        signals["replay_loss"] = state.replay_loss
    if Signal.VALID_LOSS in needs and t % run.probe_every == 0:
        group = t // run.probe_every % run.validation.groups
        if validation is None:
            losses = evaluate.probe(run.engine, run.objective, run.validation, group, k)
        else:  # the pass has read the group's rows at these parameters, in the same micro-batches
            losses = validation.group(group)
        base = ValidationResult(state.base_sums, state.base_tokens).group(group)
        # A balancer would take nan for a task that has no rows in the group.
        bad = evaluate.bad_losses(run.names, losses, np.isfinite(base))
        if bad and run.config.train.not_finite.action == "back":
            raise NonFinite(f"the validation loss of {bad} is not finite")
        if bad:
            raise evaluate.not_finite(t, bad)
        signals |= {"valid_loss": losses, "valid_base": base, "valid_group": group}
    every = run.config.gram.every
    if (Signal.GRAM | Signal.VALID_GRAM) & needs and t % every == 0:
        signals |= _products(run, t, t // every % run.validation.groups)
    return Signals(**signals)


def _products(run: Run, step: int, group: int) -> dict[str, np.ndarray]:
    """The Gramian of batch `step`'s gradients, and that of a validation group's with them."""

    def gradients(make: Callable[[int], list[list[Batch]]], number: int) -> Tensor:
        streams = comm.together(lambda: make(number))
        # A task made `of` others' rows reads their batches, so each task takes a forward of its
        # own.
        tasks = [
            [micro for stream in run.book.reads(task) for micro in streams[stream]]
            for task in range(len(run.names))
        ]
        return gram.gradients(run.engine, run.objective, tasks, run.differentiated)

    found = {}
    seed_step(run.config.train.seed, step)
    run.engine.train()
    ours = gradients(run.batches.by_stream, step)
    if bad := [n for n, g in zip(run.names, ours, strict=True) if not g.isfinite().all()]:
        raise NonFinite(f"the gradient of {', '.join(bad)} is not finite", bad)
    if Signal.GRAM in run.holder.balancer.needs:
        found["gram"] = gram.products(ours, ours)
    if Signal.VALID_GRAM in run.holder.balancer.needs:
        run.engine.eval()
        found["valid_gram"] = gram.products(gradients(run.validation.by_stream, group), ours)
    return found
