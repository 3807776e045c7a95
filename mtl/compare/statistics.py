"""What paired differences say: interval, p, and the least effect that could have been found."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
POWER = 0.8
EXACT = 16  # pairs up to which every assignment of signs is tried
NORMAL = NormalDist()


def interval(differences: Sequence[float], resamples: int = 9999) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean, at `LEVEL` (Efron 1987, JASA
    82:171). Seeded: the same differences give the same interval.

    Args:
        differences: (n,) paired differences, n >= 2.
    """
    x = np.asarray(differences, float)
    n, mean = len(x), float(x.mean())
    # Equal differences: the acceleration below would be 0 / 0.
    if np.ptp(x) == 0:
        return mean, mean
    draws = np.random.default_rng(0).integers(0, n, (resamples, n))
    means = x[draws].mean(1)
    # Means that equal the sample's count half: with few pairs there are many.
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    # Clipped, since the normal's quantiles at 0 and 1 are infinite.
    bias = NORMAL.inv_cdf(float(np.clip(below, 1 / resamples, 1 - 1 / resamples)))
    left_out = (x.sum() - x) / (n - 1)
    pulls = left_out.mean() - left_out
    # Skewness of the jackknife's means, over 6.
    acceleration = (pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5)
    ends = []
    for side in (1 - LEVEL) / 2, (1 + LEVEL) / 2:
        z = bias + NORMAL.inv_cdf(side)
        ends.append(NORMAL.cdf(float(bias + z / (1 - acceleration * z))))
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean at `LEVEL`, of n >= 2 values."""
    x = np.asarray(values, float)
    reach = _student((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - reach), float(x.mean() + reach)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean as far from 0, where each pair's sign is a coin's. Exact up to `EXACT`
    pairs, beyond from 2 ** `EXACT` seeded assignments.
    """
    x = np.asarray(differences, float)
    n = len(x)
    if n <= EXACT:
        # Row i has the bits of i: every assignment once.
        heads = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        heads = np.random.default_rng(0).integers(0, 2, (2**EXACT, n))
        heads[0] = 0  # the data themselves count
    sums = np.abs((1 - 2 * heads) @ x)
    # The same sum in another order may differ in its last bits: it counts as equal.
    return float((sums >= abs(x.sum()) * (1 - 1e-12)).mean())


def least_p(pairs: int) -> float:
    """The least p that `sign_flip` can give: every difference has the same sign."""
    return 2.0 ** (1 - min(pairs, EXACT))


def pairs_for(tests: int) -> int:
    """The fewest pairs with which the first of so many tests can pass `holm` at `LEVEL`."""
    return next(n for n in range(1, EXACT + 1) if least_p(n) * tests <= 1 - LEVEL)


def holm(p: Sequence[float], tests: int | None = None) -> list[float]:
    """p adjusted for as many tests (Holm 1979): the i-th smallest times the number of tests left,
    never below one before it.

    Args:
        tests: how many there are, those without a p so far counted in; None: as many as p.
    """
    tests = len(p) if tests is None else tests
    adjusted, highest = np.ones(len(p)), 0.0
    for i, k in enumerate(np.argsort(p, kind="stable")):
        highest = max(highest, min(1.0, (tests - i) * p[k]))
        adjusted[k] = highest
    return adjusted.tolist()


def least_effect(differences: Sequence[float]) -> float:
    """The mean difference that n such pairs find with `POWER` at two-sided 1 - `LEVEL`, from their
    deviation: (t(level) + t(power)) sd / sqrt(n), quantiles with n - 1 degrees of freedom.
    """
    x = np.asarray(differences, float)
    quantiles = (_student((1 + LEVEL) / 2, len(x) - 1), _student(POWER, len(x) - 1))
    return float(sum(quantiles) * x.std(ddof=1) / np.sqrt(len(x)))


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t above 1/2: its density summed by the trapezoid rule, in the angle
    atan(t / sqrt(freedom)), where it is a power of a cosine.
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(probability - 0.5, mass / mass[-1] / 2, angles)
    return float(np.sqrt(freedom) * np.tan(angle))
