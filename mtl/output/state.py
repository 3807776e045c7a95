"""Where a run stands."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class RunState:
    """Everything that a run's next step depends on, but weights, optimizer and balancer.

    Attributes:
        step: optimizer updates completed.
        target_tokens: target tokens trained on.
        best: {"step": ..., "value": ...} of what picks the best checkpoint (`evaluate.best`), and
            {"weights": "average"} where the averaged weights have it.
        single: as `best`, of the trained weights alone, where `checkpoint.bests` asks.
        bests: the same of every task's own loss, by its name, where `checkpoint.bests` asks.
        averaged: updates of `average:`.
        evaluated: step of the last full validation pass; -1 before the first.
        metrics_bytes: length of metrics.jsonl, to cut it back on resume.
        base_sums, base_tokens: (K, parts) float64, the full pass at step 0. The parts are the
            groups of validation rows, and one more where rows are left over.
        train_loss: (K,) float64, nats per target token of the last update.
        replay_loss: (K,) float64, the same examples once more after it, where the balancer asks.
        weights: (K,) float64, those of the last update; before the first the balancer's own.
        lowest: (K,) float64, the lowest loss on a full pass so far, nats per target token.
        stalled: (K,) float64, full passes since.
        held: (K,) float64, the part of all weights at which a task that is done is held; nan = not
            held.
        best_at: (K,) float64, step of `lowest`; nan = none. This and the next with `anchor` only.
        anchored: (K,) float64, step of the weights that a task is held to; nan = not held.
        asked: (K,) float64, step before which these read the task's rows; nan = they have not.
        round_start: first step of the present round of draws (`mtl.data.mix.Round`).
        shares, drawn, owed: (S,) int64, the round's; None: the first round's.
        passed: steps whose batch was passed over, ascending (`train.not_finite`).
        recent: (K, W) float64, the tasks' newest losses, nan = none yet (`train.spike`).
    """

    step: int = 0
    target_tokens: int = 0
    best: dict[str, float] | None = None
    evaluated: int = -1
    single: dict[str, float] | None = None
    bests: dict[str, dict[str, float]] | None = None
    averaged: int = 0
    metrics_bytes: int = 0
    base_sums: np.ndarray | None = None
    base_tokens: np.ndarray | None = None
    train_loss: np.ndarray | None = None
    replay_loss: np.ndarray | None = None
    weights: np.ndarray | None = None
    lowest: np.ndarray | None = None
    stalled: np.ndarray | None = None
    held: np.ndarray | None = None
    best_at: np.ndarray | None = None
    anchored: np.ndarray | None = None
    asked: np.ndarray | None = None
    round_start: int = 0
    shares: np.ndarray | None = None
    drawn: np.ndarray | None = None
    owed: np.ndarray | None = None
    passed: list[int] = field(default_factory=list)
    recent: np.ndarray | None = None

    ARRAYS = (
        "base_sums",
        "base_tokens",
        "train_loss",
        "replay_loss",
        "weights",
        "lowest",
        "stalled",
        "held",
        "best_at",
        "anchored",
        "asked",
        "shares",
        "drawn",
        "owed",
        "recent",
    )
