"""What every balancer must do. Run it over a balancer of your own:

    from contract import CHECKS

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check(lambda tasks: MyBalancer(0.5))

Each check takes a function from the tasks' names to a fresh balancer, and goes through a Holder, which checks the
weights.
"""

import io
import json
from collections.abc import Callable, Iterator

import numpy as np

from balancers import Balancer, Holder, Signal, Signals

Make = Callable[[tuple[str, ...]], Balancer]
NAMES = ("code", "math", "law", "chat", "news")


def stream(
    k: int, steps: int, needs: Signal, absent: float = 0.0, every: int = 1, seed: int = 0
) -> Iterator[Signals]:
    """Signals of a run in which task i falls at its own rate and the last one turns up: only what ``needs`` names.

    ``absent`` is the chance that a task lacks in a batch or a probe, ``every`` the steps between probes. A
    Gramian comes every fourth step.
    """
    rng = np.random.default_rng(seed)
    base, rate = rng.uniform(1, 4, k), rng.uniform(0.003, 0.03, k)
    for step in range(steps):
        loss = base * (0.2 + 0.8 * np.exp(-rate * step)) * rng.uniform(0.95, 1.05, k)
        loss[-1] *= 1 + max(0, step - 60) / 100
        lacks, lacks_probe = rng.random((2, k)) < absent
        gradients = rng.normal(size=(k, 8)) * loss[:, None] * ~lacks[:, None]
        probed, grams = step % every == 0, step % 4 == 0
        known = {
            Signal.TOKENS: {"tokens": rng.integers(1, 100, k) * ~lacks},
            Signal.TRAIN_LOSS: {"train_loss": np.where(lacks, np.nan, loss) if step else None},
            Signal.VALID_LOSS: {
                "valid_loss": np.where(lacks_probe, np.nan, 1.1 * loss) if probed else None,
                "valid_group": step // every % 4 if probed else None,
            },
            Signal.GRAM: {"gram": gradients @ gradients.T if grams else None},
            Signal.REPLAY_LOSS: {
                "replay_loss": np.where(lacks, np.nan, 0.99 * loss) if step else None
            },
            Signal.VALID_GRAM: {
                "valid_gram": (1.1 * gradients + 0.1) @ gradients.T if grams else None
            },
        }
        declared = {
            name: value
            for flag, values in known.items()
            if flag in needs
            for name, value in values.items()
        }
        yield Signals(step=step, **declared)


def holder(make: Make, k: int) -> Holder:
    return Holder(make(NAMES[:k]), NAMES[:k])


def run(held: Holder, signals: Iterator[Signals]) -> np.ndarray:
    """(steps, K) weights."""
    return np.array([held.update(each) for each in signals])


def check_weights(make: Make) -> None:
    """Finite, >= 0, float64, of sum 1 unless declared otherwise; explanations are (K,) or scalar arrays."""
    held = holder(make, 4)
    for signals in stream(4, 150, held.balancer.needs):
        weights = held.update(signals)
        assert weights.shape == (4,) and weights.dtype == np.float64
        assert np.isfinite(weights).all()
        assert not held.balancer.non_negative or (weights >= 0).all()
        assert not held.balancer.sums_to_one or abs(weights.sum() - 1) < 1e-12
        assert all(
            isinstance(each, np.ndarray) and each.shape in ((), (4,))
            for each in held.explain.values()
        )


def check_one_task(make: Make) -> None:
    held = holder(make, 1)
    weights = run(held, stream(1, 150, held.balancer.needs))
    assert np.isfinite(weights).all()
    if held.balancer.sums_to_one:
        np.testing.assert_allclose(weights, 1, rtol=1e-12)


def check_absent_tasks(make: Make) -> None:
    """Tasks that are often absent, one that never comes, a batch and a probe without any task."""
    needs = make(NAMES[:4]).needs
    for absent in (0.5, 1.0):
        assert np.isfinite(run(holder(make, 4), stream(4, 150, needs, absent))).all()
    held = holder(make, 3)
    for signals in stream(3, 80, needs):
        fields = {name: value for name, value in vars(signals).items() if value is not None}
        for name in fields.keys() & {"train_loss", "valid_loss", "replay_loss"}:
            fields[name] = np.append(fields[name][:2], np.nan)
        assert np.isfinite(held.update(Signals(**fields))).all()


def check_nothing_new(make: Make) -> None:
    """Updates to which nothing was measured, before the first measurement and between others."""
    needs = make(NAMES[:4]).needs
    for every in (1, 7):
        bare = (
            Signals(step, tokens=np.ones(4) if Signal.TOKENS in needs else None)
            for step in range(5)
        )
        held = holder(make, 4)
        assert np.isfinite(run(held, bare)).all()
        assert np.isfinite(run(held, stream(4, 100, needs, every=every))).all()


def check_permutation(make: Make) -> None:
    """Reordered tasks get the same weights, to what an iterative solver leaves over."""
    order = np.array([2, 0, 3, 1])
    needs = make(NAMES[:4]).needs
    plain = run(holder(make, 4), stream(4, 150, needs, absent=0.1))
    held = Holder(make(NAMES[:4]), [NAMES[i] for i in order])
    moved = []
    for signals in stream(4, 150, needs, absent=0.1):
        fields = dict(vars(signals))
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                fields[name] = value[np.ix_(*[order] * value.ndim)]
        moved.append(held.update(Signals(**fields)))
    np.testing.assert_allclose(np.array(moved), plain[:, order], rtol=1e-5, atol=1e-7)


def check_degenerate_gramians(make: Make) -> None:
    """Zero, rank one, one task 1e15 times as loud as the others, gradients that cancel."""
    held, ones = holder(make, 3), np.ones(3)
    loud, opposed = np.array([1e15, 1, 1]), np.array([1, -1, 0])
    for vector in (0 * ones, ones, loud, opposed):
        for gram in (np.outer(vector, vector), np.diag(vector**2)):
            fields = {}
            if Signal.GRAM in held.balancer.needs:
                fields["gram"] = gram
            if Signal.VALID_GRAM in held.balancer.needs:
                fields["valid_gram"] = gram
            if Signal.TOKENS in held.balancer.needs:
                fields["tokens"] = ones
            for step in range(3):
                assert np.isfinite(held.update(Signals(step=step, **fields))).all()


def check_replay(make: Make) -> None:
    """The same signals give the same bits: nothing is kept outside the state, nothing random is outside it."""
    needs = make(NAMES[:4]).needs
    balancer, runs = make(NAMES[:4]), []
    for _ in range(2):
        runs.append(run(Holder(balancer, NAMES[:4]), stream(4, 100, needs, absent=0.1)))
    np.testing.assert_array_equal(*runs)


def check_round_trip(make: Make) -> None:
    """Saved as JSON and arrays after any step, restored and continued: the same bits as without a break."""
    held, whole, saved = holder(make, 4), [], {}
    needs = held.balancer.needs
    for signals in stream(4, 200, needs, absent=0.1, every=3):
        if signals.step in (0, 1, 100, 199):
            saved[signals.step] = _dump(held)
        whole.append(held.update(signals))
    for step, (meta, arrays) in saved.items():
        again = holder(make, 4)
        with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
            again.load_state_dict({"meta": json.loads(meta), "arrays": dict(loaded)})
        rest = [each for each in stream(4, 200, needs, absent=0.1, every=3) if each.step >= step]
        np.testing.assert_array_equal(run(again, iter(rest)), np.array(whole[step:]))


def _dump(held: Holder) -> tuple[str, bytes]:
    saved, file = held.state_dict(), io.BytesIO()
    np.savez(file, **saved["arrays"])
    return json.dumps(saved["meta"]), file.getvalue()


CHECKS = (
    check_weights,
    check_one_task,
    check_absent_tasks,
    check_nothing_new,
    check_permutation,
    check_degenerate_gramians,
    check_replay,
    check_round_trip,
)
