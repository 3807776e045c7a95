"""Learning rate as a pure function of the step, so that there is no scheduler state to save."""

import math
from typing import Literal


def lr(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup: int = 0,
    name: Literal["cosine", "linear", "constant"] = "cosine",
    floor: float = 0.0,
) -> float:
    """The learning rate of update `step` (0-based).

    It rises linearly from peak/warmup to peak over the first `warmup` updates. Then `name` shapes
    the way from peak to floor * peak, which the last update (steps - 1) reaches.

    Args:
        step: optimizer updates completed.
        peak: the highest learning rate.
        steps: optimizer updates in the whole run.
        warmup: optimizer updates of warm-up.
        floor: fraction of `peak` at the end; "constant" ignores it.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    # max: with warm-up up to the last step there is no way left to shape.
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    match name:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            shape = 1 - done
        case "constant":
            return peak
    return peak * (floor + (1 - floor) * shape)
