"""Weights of the average by coordinate descent on the simplex, without gradients."""

from mtl.merging.candidates import Candidates, chooses
from mtl.merging.piece import MergeError


@chooses
def search(candidates: Candidates, *, rounds: int = 4, step: float = 0.5) -> list[float]:
    """(K,) weights >= 0 of sum 1 whose average has the lowest validation loss found.

    It begins at the best of the sub-models and their mean. A round moves each weight up and down in
    turn, the others in proportion, and keeps what lowers the loss; a round without gain halves the
    step. At most 2 K evaluations a round.

    Args:
        rounds: how often to go through the weights.
        step: of the way to a sub-model (up) or off it (down), in (0, 1).
    """
    if not 0 < step < 1:
        raise MergeError(f"step: found {step}, wanted a part of the way, above 0 and below 1.")
    k = candidates.k
    starts = [[1 / k] * k, *([float(j == i) for j in range(k)] for i in range(k))]
    best = min(starts, key=candidates.loss)
    for _ in range(rounds):
        before = best
        for i in range(k):
            # The sum stays 1: all move towards sub-model i.
            up = [(1 - step) * w + step * (j == i) for j, w in enumerate(best)]
            down = [w * (1 - step * (j == i)) for j, w in enumerate(best)]
            down = [w / sum(down) for w in down]
            # min keeps the first of equals, so a tie changes nothing and the step is halved.
            best = min([best, up, down], key=candidates.loss)
        step = step / 2 if best == before else step
    return best
