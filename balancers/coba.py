"""CoBa: validation losses that converge together (Gong et al., EMNLP 2024,
https://arxiv.org/abs/2410.06741).
"""

import logging
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np

from balancers.maths import positive, share, softmax, whole
from balancers.protocol import Array, Balancer, Signal, Signals, State

logger = logging.getLogger(__name__)
Divergence = Literal["abs", "signed", "released"]
Slope = Literal["auto", "ols", "panel"]
WINDOW = 200  # probes, as published
SPAN = 200  # optimizer steps, as published, where a probe is taken at every one
# History entries handled at once: 64 KiB stay in the cache, a temporary as long as the history does
# not.
CHUNK = 8192


@dataclass(frozen=True)
class CoBa(Balancer):
    """Convergence Balancer: slower tasks get more weight, a task that turns up gets less.

    With the ratio ``r_i = l_i / l_i(0)`` of validation losses (nats per target token) and its
    least-squares slope ``a_i(t)`` on the step number over the last N probes, for K tasks::

        RCS_i = softmax over tasks of   K * a_i / sum_j |a_j|      relative convergence score
        ACS_i = softmax over tasks of  -n * a_i / sum_s |a_i(s)|   absolute one
        DF    = min(m * softmax over history of (-tau * m * a_max(s) / D) [t], 1)
        w     = DF * RCS + (1 - DF) * ACS

    where n <= N slopes are in the window, ``a_max = max_i a_i``, its history has length m, and
    ``D = sum_s |a_max(s)|``. Before step W all weights are 1/K.

    Args:
        window: N >= 1, in probes. None: 200, as published; where slopes are panel slopes and groups
            take turns, the whole rounds of them (so that none counts more than another) that come
            nearest to 200 optimizer steps: at least two, and at most 200 probes. Not with
            ``divergence="released"``, which has 200.
        warmup: W >= 1, in optimizer steps.
        tau: temperature of the divergence factor, > 0.
        divergence: "abs" as above; "signed" takes ``D = sum_s a_max(s)``, the equation as printed,
            which rewards a diverging task until the sum changes sign; "released" makes a
            ``balancers.coba_released.Released``, which does what the authors' code does.
        slope: "ols", least squares as published; or "panel", our addition: with one intercept for
            each group of validation rows, so that the difference between groups is not taken for
            progress. It needs ``Signals.valid_group`` and every group of the window twice, so N >=
            2 * groups; with fewer, and for a task that was absent too often, the slope is the plain
            one and ``explain["panel"]`` is 0; a window that is too small for them is logged once,
            when it is full. "auto": panel where the signals name a group, which is plain least
            squares where they never do.
        gate: None, or a number of standard errors, our addition: each task's two scores are
            multiplied by ``max(0, 1 - (gate * error_i / a_i)^2)`` before the softmax, so that
            slopes which are noise give equal weights. The error is that of the same fit.
        forgetting: our addition: tells a task that is forgotten (training and validation loss rise)
            from one that overfits (training loss falls). With ``b_i`` the slope of the training
            loss over the task's first probe, at the same probes, and ``s_i`` its standard error,
            ACS and a_max take ``min(a_i, a_i - max(b_i - s_i, 0))`` for the slope; RCS keeps
            ``a_i``. A probe's training loss is the mean of those since the last probe. Reads
            ``train_loss`` as well. Not with ``divergence="released"``.

    A task's ``l(0)`` is ``valid_base`` where the signals carry it, else the task's first probe
    above 0. Steps are true step numbers, so probes may come at any interval. An absent task keeps
    the slope its window still has, 0 with fewer than two observations. A task not seen yet gets
    1/K, is left out of every sum, and the others share the rest. Without a new probe the scores
    stay.

    Explains: ``slope``, ``rcs``, ``acs`` (K,), in ratio per optimizer step and as shares; ``df``
    (scalar); ``panel``, ``gate`` and ``forgotten``, what the slope is lowered by, (K,) with those
    options. nan: not seen yet.

    State: 8 bytes a probe for the history of a_max (plus an eighth of slack); the rest is bounded
    by the window.

    Raises:
        ValueError: settings outside the ranges above or that do not go together; panel slopes
            without ``valid_group``.
    """

    window: int | None = None
    warmup: int = 100
    tau: float = 5.0
    divergence: Divergence = "abs"
    slope: Slope = "auto"
    gate: float | None = None
    forgetting: bool = False

    def __post_init__(self) -> None:
        if self.window is not None:
            whole("CoBa window", self.window)
        whole("CoBa warmup", self.warmup)
        positive("CoBa tau", self.tau)
        if self.gate is not None:
            positive("CoBa gate", self.gate)
        if not isinstance(self.forgetting, bool):
            raise ValueError(f"CoBa forgetting: found {self.forgetting!r}, wanted true or false")
        if self.forgetting and self.divergence == "released":
            raise ValueError(
                "CoBa forgetting: found true beside divergence: released, which does what the "
                "authors' code does and nothing more; wanted divergence: abs or signed"
            )
        for name, options in (("divergence", get_args(Divergence)), ("slope", get_args(Slope))):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"CoBa {name}: found {getattr(self, name)!r}, wanted one of "
                    f"{', '.join(options)}"
                )
        if self.divergence == "released":
            self._become_released()

    @property
    def needs(self) -> Signal:
        return Signal.VALID_LOSS | Signal.TRAIN_LOSS if self.forgetting else Signal.VALID_LOSS

    def settings(self) -> dict[str, Any]:
        # Left out while it is off: so the states saved before there was one still fit.
        given = super().settings()
        return given if self.forgetting else {k: v for k, v in given.items() if k != "forgetting"}

    def _become_released(self) -> None:
        if type(self) is not CoBa:
            raise ValueError(
                f"{type(self).__name__} divergence: found 'released', wanted abs or signed; to "
                "change what the authors' code does, derive from balancers.coba_released.Released"
            )
        # Here and not in __new__, which would hide the constructor's signature; by name, since that
        # file imports this one.
        released = import_module("balancers.coba_released").Released
        object.__setattr__(self, "__class__", released)

    def init(self, k: int) -> State:
        train = {
            "train_sum": np.zeros(k),  # of the training losses since the last probe
            "train_count": np.zeros(k),
            "train": np.zeros((0, k)),  # their mean over l(0), a row for each probe
        }
        return {
            "probes": np.array(0),
            # l(0) from the first probe; nan = the task was not seen yet
            "base": np.full(k, np.nan),
            # as many of the last probes as a window may have, N: row = probe mod N
            "step": np.zeros(0),
            "group": np.zeros(0),
            "ratio": np.zeros((0, k)),
            "slopes": np.zeros((0, k)),
            "entries": np.array(0),
            "history": np.zeros(0),  # a_max at every probe so far
            "divisor": np.array(0.0),  # D
            "weights": np.full(k, 1 / k),  # those of the newest probe, warm-up or not
            **(train if self.forgetting else {}),
        }

    def update(self, state: State, signals: Signals) -> tuple[State, Array, dict[str, Array]]:
        if self.forgetting and signals.train_loss is not None:
            state["train_sum"] = state["train_sum"] + np.nan_to_num(signals.train_loss)
            state["train_count"] = state["train_count"] + ~np.isnan(signals.train_loss)
        explain = {} if signals.valid_loss is None else self._probe(state, signals)
        k = len(state["base"])
        warming = self._warming(signals.step)
        return state, np.full(k, 1 / k) if warming else state["weights"].copy(), explain

    def _probe(self, state: State, signals: Signals) -> dict[str, Array]:
        """Take in one probe, and put the weights that its scores give into the state."""
        fresh, n = self._observe(state, signals), self._reach(state, signals)
        # As they stand there, not by age: a full window is all of the state.
        rows = np.sort(self._newest(state, n))
        slope, error, explain = self._slopes(state, rows)
        # A task's first observation has no slope: a zero there would be a plateau that nobody
        # observed.
        seen = ~np.isnan(state["base"])
        slope = np.where(seen & ~fresh, slope, np.nan)
        own = slope - self._forgotten(state, rows, explain)
        past = self._keep(state, own, n, signals.step)
        trust = self._trust(slope, error, explain)

        # K a_i / sum |a_j| is a_i over the mean |a_j|; the same for ACS over the window's slopes.
        rcs = _scores(trust * slope, np.nansum(np.abs(slope)) / max(1, seen.sum()), seen)
        usual = np.nansum(np.abs(past), axis=0) / (~np.isnan(past)).sum(axis=0).clip(1)
        acs = _scores(-trust * own, usual, seen)
        a_max = self._a_max(state, own, rows, signals.step)
        df, weights = self._weigh(self._divergence(state, a_max), rcs, acs, seen)

        state["weights"] = share(weights, seen)
        return {"slope": slope, "rcs": rcs, "acs": acs, "df": np.array(df), **explain}

    def _warming(self, step: int) -> bool:
        return step < self.warmup

    def _observe(self, state: State, signals: Signals) -> np.ndarray:
        """Put a probe's ratios into the window; (K,) bool, the tasks that it saw first."""
        fresh = np.isnan(state["base"]) & (signals.valid_loss > 0)
        base = state["base"] = np.where(fresh, signals.valid_loss, state["base"])
        unseen = np.isnan(base)
        # For this probe alone: the state keeps the first one, for probes that come without.
        if signals.valid_base is not None:
            base = np.where(signals.valid_base > 0, signals.valid_base, base)
        with np.errstate(over="ignore"):
            # far out, and its square is still finite
            ratio = np.minimum(signals.valid_loss / base, 1e100)
        ratio[unseen] = np.nan
        state["probes"] += 1
        row = self._row(state)
        state["step"] = _put(state["step"], row, signals.step)
        state["group"] = _put(state["group"], row, self._group(signals))
        state["ratio"] = _put(state["ratio"], row, ratio)
        return fresh

    def _forgotten(self, state: State, rows: Array, explain: dict[str, Array]) -> Array | float:
        """(K,) how far the training loss rises beyond its noise, in ratio per step; 0 without the
        option.
        """
        if not self.forgetting:
            return 0.0
        base, count = state["base"], state["train_count"]
        known = (count > 0) & ~np.isnan(base)
        with np.errstate(over="ignore"):
            mean = np.divide(state["train_sum"], count * base, out=base * np.nan, where=known)
        state["train"] = _put(state["train"], self._row(state), np.minimum(mean, 1e100))
        state["train_sum"], state["train_count"] = np.zeros_like(base), np.zeros_like(base)
        rise, error = least_squares(state["step"][rows], state["train"][rows], np.zeros(len(rows)))
        explain["forgotten"] = np.maximum(rise - error, 0)
        return explain["forgotten"]

    def _keep(self, state: State, slope: Array, n: int, step: int) -> Array:
        """Put the slopes into the window; (n, K), those that ACS compares them with."""
        state["slopes"] = _put(state["slopes"], self._row(state), slope)
        return state["slopes"][self._newest(state, n)]

    def _trust(self, slope: Array, error: Array, explain: dict[str, Array]) -> Array:
        """(K,) what the gate leaves of a score, 1 without one."""
        if self.gate is None:
            return np.ones_like(slope)
        with np.errstate(over="ignore"):
            # A slope of 0 is all noise: infinite here, and its gate 0.
            noise = np.divide(
                self.gate * error, slope, out=np.full_like(slope, np.inf), where=slope != 0
            )
            explain["gate"] = np.nan_to_num(np.maximum(0, 1 - noise**2))
        return explain["gate"]

    def _a_max(self, state: State, slope: Array, rows: Array, step: int) -> float:
        """The largest slope; not finite where there is none."""
        return float(np.max(slope, initial=-np.inf, where=~np.isnan(slope)))

    def _weigh(self, df: float, rcs: Array, acs: Array, seen: Array) -> tuple[float, Array]:
        """DF as it is used, and the weights (K,), nan where unseen."""
        df = min(df, 1.0)
        return df, df * rcs + (1 - df) * acs

    @property
    def _most(self) -> int:
        """Probes that the state holds."""
        return WINDOW if self.window is None else self.window

    def _newest(self, state: State, n: int) -> np.ndarray:
        """(n,) rows of the newest n probes in the state, from the oldest on."""
        return np.arange(int(state["probes"]) - n, int(state["probes"])) % self._most

    def _reach(self, state: State, signals: Signals) -> int:
        """How many of the newest probes the window has."""
        n = min(int(state["probes"]), self._most)
        if self.window or self.slope == "ols" or signals.valid_group is None:
            return n
        # Optimizer steps between probes, on average over the state.
        apart = (signals.step - state["step"][:n].min()) / max(1, n - 1)
        return min(n, default_window(len(np.unique(state["group"][:n])), max(1, apart)))

    def _row(self, state: State) -> int:
        """Where the newest probe stands in the state."""
        return (int(state["probes"]) - 1) % self._most

    def _slopes(self, state: State, rows: Array) -> tuple[Array, Array, dict[str, Array]]:
        """Slopes and standard errors over the window's rows of the state; with panel slopes, which
        tasks have them.
        """
        step, ratio, group = state["step"][rows], state["ratio"][rows], state["group"][rows]
        slope, error = least_squares(step, ratio, np.zeros(len(rows)))
        if self.slope == "ols":
            return slope, error, {}
        inner, inner_error = least_squares(step, ratio, group)
        groups, times = np.unique(group, return_counts=True)
        # Said once: when the state is full for the first time.
        if len(groups) > 1 and times.min() < 2 and int(state["probes"]) == self._most:
            logger.warning(
                f"CoBa: found a window of {len(rows)} probes that does not hold every group of "
                "validation rows twice, so its slopes are "
                "plain ones: wanted a window of at least twice as many probes as there are "
                "groups, or fewer groups"
            )
        fits = np.isfinite(inner_error) & (times.min() > 1)
        slope, error = np.where(fits, inner, slope), np.where(fits, inner_error, error)
        return slope, error, {"panel": fits.astype(np.float64)}

    def _group(self, signals: Signals) -> float:
        if self.slope == "ols" or (self.slope == "auto" and signals.valid_group is None):
            return 0.0
        if signals.valid_group is None:
            raise ValueError(
                f"CoBa with panel slopes at step {signals.step}: found no Signals.valid_group, "
                "wanted the number of "
                f"the group of validation rows that this probe read; without groups use slope: ols"
            )
        return float(signals.valid_group)

    def _divergence(self, state: State, a_max: float) -> float:
        """DF before its clamp, with a_max appended to the history; 1 where there is no a_max."""
        if not math.isfinite(a_max):
            return 1.0
        state["entries"] += 1
        state["divisor"] += a_max if self.divergence == "signed" else abs(a_max)
        entries, divisor = int(state["entries"]), float(state["divisor"])
        state["history"] = _put(state["history"], entries - 1, a_max)
        scale = self.tau * entries / divisor if divisor else 0.0
        if not math.isfinite(scale):  # the sum is nothing but rounding
            scale = 0.0
        total = 0.0
        # Every term is taken relative to the newest: past the range of a float the sum is inf and
        # DF is 0, which is right, so no second pass for the maximum is needed.
        with np.errstate(over="ignore"):
            for start in range(0, entries, CHUNK):
                part = state["history"][start : min(start + CHUNK, entries)]
                part = (part - a_max) * -scale
                total += np.exp(part, out=part).sum()
        return entries / float(total)


def default_window(groups: int, apart: float) -> int:
    """Probes in the window where none is given: whole rounds of ``groups`` with ``apart`` optimizer
    steps between probes.
    """
    return groups * max(2, min(round(SPAN / (groups * apart)), WINDOW // groups))


def least_squares(x: Array, y: Array, group: Array) -> tuple[Array, Array]:
    """Slope of y on x with one intercept for each group, and its standard error.

    Args:
        x: (n,). y: (n, K), nan = not observed. group: (n,), what is equal belongs together.

    Returns:
        (K,) slopes, 0 where x does not vary within a group or y only by rounding; (K,) standard
            errors, inf where
        nothing is left to estimate them from.
    """
    seen = ~np.isnan(y)
    member = (group == np.unique(group)[:, None]).astype(np.float64)  # (G, n)
    count = member @ seen  # (G, K)
    filled = np.where(seen, y, 0.0)
    x = x - x.mean()  # products of absolute step numbers lose digits

    def center(values: Array) -> Array:
        means = (member @ values) / count.clip(1)
        return np.where(seen, values - member.T @ means, 0.0)

    dx, dy = center(seen * x[:, None]), center(filled)
    spread = (dx * dx).sum(axis=0)
    varies = spread > 0
    product = (dx * dy).sum(axis=0)
    # A flat curve must not get a slope made of rounding: scores divide by slopes, which would blow
    # it up to full range.
    product[np.abs(product) <= 4 * np.finfo(float).eps * np.abs(dx * filled).sum(axis=0)] = 0
    slope = np.divide(product, spread, out=np.zeros_like(spread), where=varies)
    # Observations less one intercept for each group that was seen, and the slope.
    freedom = seen.sum(axis=0) - (count > 0).sum(axis=0) - 1
    rest = ((dy - slope * dx) ** 2).sum(axis=0)
    error = np.full_like(spread, np.inf)
    np.divide(rest, spread * freedom, out=error, where=varies & (freedom > 0))
    return slope, np.sqrt(error)


def _scores(slope: Array, scale: Array | float, seen: Array) -> Array:
    """softmax over the seen tasks of slope / scale; nan where unseen. No slope or no scale counts
    as 0.
    """
    with np.errstate(over="ignore"):
        logit = np.divide(
            slope, scale, out=np.zeros_like(slope), where=(scale > 0) & ~np.isnan(slope)
        )
    return softmax(logit, seen)


def _put(buffer: Array, row: int, value: Array | float) -> Array:
    """``buffer`` with ``value`` at ``row``, grown by an eighth where it ends: one copied number in
    eight, amortized.
    """
    if row >= len(buffer):
        grown = np.full((row + row // 8 + 16, *buffer.shape[1:]), np.nan)
        grown[: len(buffer)] = buffer
        buffer = grown
    buffer[row] = value
    return buffer
