"""CoBa against golden numbers, its properties on any curves, and the corners."""

import copy
import json
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from balancers import CoBa, Signal, Signals, describe, make
from balancers.coba import least_squares
from balancers.coba_released import Released

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "coba.json").read_text())
PANELS = json.loads((GOLDEN / "panel.json").read_text())


def run(balancer, losses, steps=None, groups=None, base=None):
    """Every step's weights (T, K) and explanations for losses (T, K); a row of None is a step without a probe."""
    state = balancer.init(max(np.size(row) for row in losses))
    weights, explained = [], []
    for i, row in enumerate(losses):
        signals = Signals(
            step=i if steps is None else steps[i],
            valid_loss=row,
            valid_base=base,
            valid_group=None if groups is None else groups[i],
        )
        state, now, explain = balancer.update(state, signals)
        weights.append(now)
        explained.append(explain)
    return np.array(weights), explained


# --- golden numbers


@pytest.mark.parametrize("divergence", ["abs", "signed", "released"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case, divergence):
    balancer = CoBa(window=case["N"], warmup=case["W"], tau=case["tau"], divergence=divergence)
    weights, explained = run(balancer, case["ratios"])
    want, at = case[divergence], np.array(case["at"]) - (divergence == "released")
    np.testing.assert_allclose(
        weights[at], want["weights"], rtol=0, atol=1e-6 if divergence == "released" else 1e-9
    )
    for golden, ours in {"slopes": "slope", "rcs": "rcs", "acs": "acs", "df": "df"}.items():
        if golden in want:
            np.testing.assert_allclose(
                [explained[t][ours] for t in at], want[golden], rtol=0, atol=1e-9
            )
    assert np.all(weights[: min(at)] == 1 / weights.shape[1])


def test_released_is_a_class_of_its_own_and_is_saved_as_coba():
    made = [
        CoBa(divergence="released"),
        CoBa(None, 100, 5.0, "released"),
        make({"name": "CoBa", "divergence": "released"}),
    ]
    for balancer in made:
        assert type(balancer) is Released and balancer == made[0]
        assert copy.deepcopy(balancer) == pickle.loads(pickle.dumps(balancer)) == balancer  # noqa: S301
        assert describe(balancer) == {
            "method": "balancers.coba:CoBa",
            "settings": {
                "window": None,
                "warmup": 100,
                "tau": 5.0,
                "divergence": "released",
                "slope": "auto",
                "gate": None,
            },
        }
    assert type(CoBa()) is CoBa and type(CoBa(divergence="signed")) is CoBa
    with pytest.raises(ValueError, match="Released divergence: found 'abs', wanted 'released'"):
        Released()

    class Mine(CoBa):
        pass

    with pytest.raises(ValueError, match="Mine divergence: found 'released', wanted abs or signed"):
        Mine(divergence="released")


@pytest.mark.parametrize("case", PANELS, ids=lambda case: f"N{case['N']}")
def test_golden_panel_slopes(case):
    ratios = np.array(case["ratios"], np.float64)  # null reads as nan
    balancer = CoBa(window=case["N"], warmup=1, slope="panel")
    _, explained = run(
        balancer, ratios, case["steps"], case["groups"], base=np.ones(ratios.shape[1])
    )
    np.testing.assert_allclose(
        [explained[i]["slope"] for i in case["at"]], case["slopes"], rtol=0, atol=1e-9
    )
    assert all(explained[i]["panel"].all() for i in case["at"])


# --- the three properties of the method

slopes = arrays(
    np.float64,
    st.integers(2, 6),
    elements=st.floats(-0.01, 0.01).map(lambda x: round(x, 5)),
    unique=True,
)


@given(slopes)
def test_rcs_rises_with_the_slope(slope):
    _, explained = run(CoBa(window=10, warmup=1), 1 + slope * np.arange(10)[:, None])
    order = np.argsort(slope)
    assert (np.diff(explained[-1]["rcs"][order]) > 0).all()


@st.composite
def falling_then_rising(draw):
    """Curves (T, K) that all fall for at least N probes; then the first turns up and the others go on. And N."""
    k, window = draw(st.integers(2, 5)), draw(st.integers(3, 12))
    fall, rise = draw(st.integers(window, 3 * window)), window + draw(st.integers(0, 10))
    rate = np.array(draw(st.lists(st.floats(1e-4, 0.02), min_size=k, max_size=k)))
    bend = draw(st.floats(0.3, 1.0))
    ratio = 0.2 + 0.8 * np.exp(-rate * np.arange(fall + rise)[:, None] ** bend)
    up = draw(st.floats(1e-3, 0.05))
    ratio[fall:, 0] = ratio[fall, 0] + up * np.arange(rise)
    return ratio, window


@settings(deadline=None)
@given(falling_then_rising())
def test_one_rising_task_has_the_smallest_acs_and_less_than_its_share(case):
    ratio, window = case
    k = ratio.shape[1]
    weights, explained = run(CoBa(window=window, warmup=1), ratio)
    turned = [t for t in range(window, len(ratio)) if explained[t]["slope"][0] > 0]
    assert turned
    for t in turned:
        assert (explained[t]["slope"][1:] < 0).all()
        assert explained[t]["acs"][0] < explained[t]["acs"][1:].min()
        assert weights[t][0] < 1 / k


# --- any curves, any settings

any_loss = st.one_of(
    st.just(np.nan), st.just(0.0), st.just(0.7), st.floats(0, 1e3), st.floats(0, 1e300)
)


@settings(deadline=None)
@given(
    data=st.data(),
    k=st.integers(1, 5),
    window=st.none() | st.integers(1, 12),
    warmup=st.integers(1, 12),
)
@pytest.mark.parametrize("divergence", ["abs", "signed", "released"])
@pytest.mark.parametrize("slope", ["ols", "panel", "auto"])
def test_weights_are_finite_and_sum_to_one(divergence, slope, data, k, window, warmup):
    n = data.draw(st.integers(1, 25))
    losses = data.draw(arrays(np.float64, (n, k), elements=any_loss))
    steps = np.cumsum(data.draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n)))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    gate = data.draw(st.sampled_from([None, 1.0, 2.5]))
    tau = data.draw(st.sampled_from([1e-3, 5.0, 1e3]))
    balancer = CoBa(window, warmup, tau, divergence, slope, gate)
    weights, _ = run(balancer, losses, steps.tolist(), groups)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)


# --- semantics, one by one


def curves(t, rates=(0.05, 0.02, 0.01)):
    return 0.3 + 0.7 * np.exp(-np.array(rates) * np.arange(t)[:, None])


def test_first_probe_is_the_base():
    ratio, loss = curves(30), curves(30) * [2.0, 5.0, 0.5]
    plain, _ = run(CoBa(window=8, warmup=3), ratio)
    scaled, _ = run(CoBa(window=8, warmup=3), loss)
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", [[4.0, 14.0, 4.5], [4.0, np.nan, np.nan]])
def test_a_base_in_the_signals_stands_for_the_first_probe(base):
    loss, base = curves(30) * [4, 7, 9], np.array(base)
    own = np.where(np.isnan(base), loss[0], base)
    _, explained = run(CoBa(window=8, warmup=3), loss, base=base)
    steps = np.arange(22, 30)
    slope = np.polyfit(steps, loss[steps] / own, 1)[0]
    np.testing.assert_allclose(explained[-1]["slope"], slope, rtol=1e-10)
    # The first probe that it sees makes no difference then.
    _, later = run(CoBa(window=8, warmup=3), loss[10:], steps=range(10, 30), base=own)
    np.testing.assert_allclose(later[-1]["slope"], slope, rtol=1e-10)


def test_slopes_use_true_step_numbers():
    steps = np.array([0, 3, 10, 11, 40, 47])
    ratio = 1 - 0.01 * steps[:, None] * [1, 2]
    _, explained = run(CoBa(window=4, warmup=1), ratio, steps.tolist())
    for each in explained[1:]:
        np.testing.assert_allclose(each["slope"], [-0.01, -0.02], rtol=1e-12)


def test_slopes_keep_their_digits_at_large_steps():
    steps = 10**12 + 7 * np.arange(20)
    _, explained = run(
        CoBa(window=20, warmup=1), 1 - 1e-6 * np.arange(20)[:, None] * [7, 14], steps.tolist()
    )
    np.testing.assert_allclose(explained[-1]["slope"], [-1e-6, -2e-6], rtol=1e-9)


def test_absent_task_is_fitted_at_its_own_steps():
    ratio = 1 - 0.01 * np.arange(20)[:, None] * [1.0, 2.0]
    ratio[np.arange(20) % 3 > 0, 1] = np.nan
    _, explained = run(CoBa(window=9, warmup=1), ratio)
    np.testing.assert_allclose(
        [each["slope"] for each in explained[6:]], np.tile([-0.01, -0.02], (14, 1)), rtol=1e-12
    )


def test_task_with_fewer_than_two_observations_in_the_window_has_slope_zero():
    ratio = curves(20)
    ratio[5:, 1] = np.nan
    _, explained = run(CoBa(window=4, warmup=1), ratio)
    assert explained[7]["slope"][1] == 0 and explained[-1]["slope"][1] == 0
    assert explained[5]["slope"][1] < 0


def test_unseen_task_gets_its_share_and_leaves_the_others_alone():
    ratio = curves(30)
    late = ratio.copy()
    late[:20, 2] = np.nan
    weights, explained = run(CoBa(window=8, warmup=3), late)
    alone, _ = run(CoBa(window=8, warmup=3), ratio[:, :2])
    np.testing.assert_allclose(weights[:20, 2], 1 / 3)
    np.testing.assert_allclose(weights[:20, :2], alone[:20] * 2 / 3, atol=1e-12)
    assert np.isnan(explained[19]["rcs"][2]) and np.isnan(explained[20]["slope"][2])
    assert explained[21]["slope"][2] < 0


def test_warmup_is_in_steps_and_ends_at_its_step():
    ratio = curves(12)
    weights, _ = run(CoBa(window=4, warmup=20), ratio, steps=range(0, 60, 5))
    assert (weights[:4] == 1 / 3).all() and (weights[4:] != 1 / 3).all()


def test_without_a_probe_the_weights_stay_and_warmup_still_ends():
    ratio = list(curves(10)) + [None] * 10
    weights, explained = run(
        CoBa(window=8, warmup=12), [np.ones(3) if r is None else r for r in ratio]
    )
    state = CoBa(window=8, warmup=12).init(3)
    balancer, seen = CoBa(window=8, warmup=12), []
    for step, row in enumerate(ratio):
        state, now, explain = balancer.update(state, Signals(step=step, valid_loss=row))
        seen.append(now)
        assert (explain == {}) == (row is None)
    assert (np.array(seen[:12]) == 1 / 3).all()
    direct, _ = run(CoBa(window=8, warmup=1), ratio[:10])
    for now in seen[12:]:
        np.testing.assert_array_equal(now, direct[-1])
    assert weights.shape == (20, 3) and explained[0]


@pytest.mark.parametrize("divergence", ["abs", "signed", "released"])
@pytest.mark.parametrize("level", [1.0, 0.7, 0.1 + 0.2, 1e-9])
def test_plateau_gives_equal_weights(divergence, level):
    losses = np.full((60, 3), level) * [1, 3, 7]
    weights, explained = run(
        CoBa(window=20, warmup=5, divergence=divergence), losses, base=np.array([1.3, 1.7, 1.9])
    )
    np.testing.assert_allclose(weights, 1 / 3, atol=1e-15)
    assert (explained[-1]["slope"] == 0).all()


def test_plain_panel_where_groups_do_not_come_twice(caplog):
    ratio = curves(20)
    _, explained = run(
        CoBa(window=6, warmup=1, slope="panel"), ratio, groups=[i % 4 for i in range(20)]
    )
    assert (
        len(caplog.messages) == 1
        and "window of 6 probes that does not hold every group" in caplog.text
    )
    _, plain = run(CoBa(window=6, warmup=1), ratio)
    for each, other in zip(explained, plain, strict=True):
        assert (each["panel"] == 0).all()
        np.testing.assert_array_equal(each["slope"], other["slope"])


@pytest.mark.parametrize(
    ("window", "groups", "times"), [(6, 12, 1), (7, 4, 1), (8, 4, 0), (1, None, 0), (1, 1, 0)]
)
def test_a_window_too_small_for_panel_slopes_is_logged_once(caplog, window, groups, times):
    run(
        CoBa(window=window, warmup=1), curves(20), groups=groups and [i % groups for i in range(20)]
    )
    assert len(caplog.messages) == times


def test_panel_sees_through_groups_of_different_difficulty():
    level = np.array([0.8, 1.3, 1.0, 0.4])[np.arange(24) % 4][:, None]
    ratio = level - 0.01 * np.arange(24)[:, None] * [1.0, 3.0]
    groups = [i % 4 for i in range(24)]
    _, explained = run(
        CoBa(window=10, warmup=1, slope="panel"), ratio, groups=groups, base=np.ones(2)
    )
    np.testing.assert_allclose(
        [each["slope"] for each in explained[9:]], np.tile([-0.01, -0.03], (15, 1)), rtol=1e-9
    )
    assert all((each["panel"] == 1).all() for each in explained[7:])


@pytest.mark.parametrize("groups", [None, [i % 4 for i in range(20)]])
def test_auto_is_panel_with_groups_and_plain_without(groups):
    rng = np.random.default_rng(0)
    ratio = 1 + rng.random((20, 3))
    found, _ = run(CoBa(window=10, warmup=1), ratio, groups=groups)
    wanted, _ = run(
        CoBa(window=10, warmup=1, slope="panel" if groups else "ols"), ratio, groups=groups
    )
    other, _ = run(CoBa(window=10, warmup=1, slope="ols"), ratio, groups=groups)
    np.testing.assert_array_equal(found, wanted)
    assert (found == other).all() == (groups is None)


@pytest.mark.parametrize(
    ("settings", "groups"), [({}, None), ({"slope": "ols"}, 10), ({"divergence": "released"}, 10)]
)
def test_default_window_is_the_published_one_otherwise(settings, groups):
    rng, steps = np.random.default_rng(1), range(0, 1250, 5)
    ratio, group = 1 + rng.random((250, 3)), groups and [i % groups for i in range(250)]
    found, wanted, other = (
        run(CoBa(window=n, **settings), ratio, steps, group)[0] for n in (None, 200, 199)
    )
    np.testing.assert_array_equal(found, wanted)
    assert (found != other).any()


@pytest.mark.parametrize(
    ("every", "groups", "wanted"),
    [
        (1, 10, {19: 19, 25: 25, 200: 200, 230: 200}),
        (4, 10, {5: 5, 15: 15, 29: 29, 50: 50, 51: 50, 230: 50}),
        (7, 10, {19: 19, 29: 29, 30: 30, 31: 30, 230: 30}),  # three rounds are 210 steps
        (50, 10, {15: 15, 20: 20, 25: 20, 230: 20}),  # two rounds, however long they take
        (4, 1, {30: 30, 50: 50, 51: 50, 230: 50}),
        (1, 12, {100: 100, 230: 192}),  # 17 rounds would be 204 probes
        (1, 70, {230: 140}),
        (1, 150, {199: 199, 230: 200}),  # the most there are: not two rounds, so the slope is plain
    ],
)
def test_default_window_is_whole_rounds_of_the_groups(every, groups, wanted):
    """{probes so far: probes in the window}, told from the slopes and from what ACS divides by."""
    rng, n = np.random.default_rng(2), 231
    ratio, group = 1 + rng.random((n, 3)), np.arange(n) % groups
    steps = np.arange(n) * every
    _, explained = run(CoBa(warmup=1), ratio, steps.tolist(), group.tolist(), base=np.ones(3))
    slopes = np.array([each["slope"] for each in explained])
    for probes, length in wanted.items():
        w = slice(probes - length, probes)
        is_panel = length >= 2 * groups
        expected, _ = least_squares(steps[w], ratio[w], group[w] if is_panel else np.zeros(length))
        np.testing.assert_allclose(slopes[probes - 1], expected, rtol=1e-9)
        assert (explained[probes - 1]["panel"] == is_panel).all()
        acs = np.exp(
            -slopes[probes - 1] / np.nanmean(np.abs(slopes[w]), axis=0)
        )  # nan: the first probe has no slope
        np.testing.assert_allclose(explained[probes - 1]["acs"], acs / acs.sum(), rtol=1e-9)


def test_panel_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"panel slopes at step 3: found no Signals\.valid_group"):
        run(CoBa(slope="panel"), np.ones((1, 2)), steps=[3])


def test_standard_error_is_the_textbook_one():
    rng = np.random.default_rng(3)
    x, y = np.sort(rng.uniform(0, 9, 12)), rng.normal(size=(12, 2))
    group = np.arange(12) % 3.0
    for groups in (np.zeros(12), group):
        design = np.column_stack([x, *(groups == g for g in np.unique(groups))]).astype(float)
        beta, rest, _, _ = np.linalg.lstsq(design, y, rcond=None)
        scale = np.linalg.inv(design.T @ design)[0, 0] / (12 - design.shape[1])
        slope, error = least_squares(x, y, groups)
        np.testing.assert_allclose(slope, beta[0], rtol=1e-10)
        np.testing.assert_allclose(error, np.sqrt(rest * scale), rtol=1e-10)
    assert np.isinf(least_squares(x[:2], y[:2], np.zeros(2))[1]).all()


def test_gate_turns_noise_into_equal_weights_and_leaves_trends_alone():
    rng = np.random.default_rng(0)
    noise = 0.5 + 0.01 * rng.normal(size=(300, 3))
    plain, _ = run(CoBa(window=30, warmup=10), noise)
    gated, explained = run(CoBa(window=30, warmup=10, gate=2.0), noise)
    spread = lambda weights: np.abs(weights[40:] - 1 / 3).mean()  # noqa: E731
    assert spread(gated) < spread(plain) / 5
    assert explained[-1]["gate"].shape == (3,)
    trend = curves(100) + 1e-6 * rng.normal(size=(100, 3))
    np.testing.assert_allclose(
        run(CoBa(20, 10, gate=2.0), trend)[0], run(CoBa(20, 10), trend)[0], atol=0.02
    )


def train_beside(valid, train, every=1, **keywords):
    """The last weights and explanation of CoBa, fed with the training losses (T, K) too."""
    coba = CoBa(window=12, warmup=1, slope="ols", **keywords)
    state, explain = coba.init(valid.shape[1]), {}
    for step, row in enumerate(valid):
        state, weights, found = coba.update(
            state,
            Signals(
                step=step,
                valid_loss=row if step % every == 0 else None,
                train_loss=train[step - 1] if step and coba.forgetting else None,
            ),
        )
        explain = found or explain
    return weights, explain


def turning(rise, fall=20, steps=33, k=3):
    """(T, K) losses that fall; the first one then rises by ``rise`` a step."""
    losses = np.tile(1 - 0.02 * np.arange(steps)[:, None], k) + [0, 0.1, 0.2]
    losses[fall:, 0] = losses[fall, 0] + rise * np.arange(steps - fall)
    return losses


@pytest.mark.parametrize("every", [1, 2])
def test_forgetting_gives_where_both_losses_rise(every):
    steps = 20 + 12 * every + 1
    valid, train = turning(0.01, steps=steps), turning(0.02, steps=steps)
    without, plain = train_beside(valid, train, every)
    given, explain = train_beside(valid, train, every, forgetting=True)
    assert plain["slope"][0] > 0 and explain["forgotten"][0] > 0
    assert given[0] > without[0] and explain["acs"][0] > plain["acs"][0]
    np.testing.assert_array_equal(explain["forgotten"][1:], 0)
    np.testing.assert_array_equal(explain["slope"], plain["slope"])
    np.testing.assert_array_equal(explain["rcs"], plain["rcs"])


def test_forgetting_leaves_overfitting_alone():
    valid, train = turning(0.01), turning(-0.02)
    np.testing.assert_array_equal(
        train_beside(valid, train, forgetting=True)[0], train_beside(valid, train)[0]
    )


def test_forgetting_is_the_training_slope_beyond_its_error():
    """Against numpy's least squares of the means between probes, in units of the first probe."""
    rng, every, n = np.random.default_rng(4), 3, 12
    steps = np.arange(n) * every
    valid = np.tile(2.0 + 0.01 * np.arange(steps[-1] + 1)[:, None], 2) * [1, 3]
    train = 1 + 0.02 * np.arange(len(valid))[:, None] + 0.05 * rng.random((len(valid), 2))
    _, explain = train_beside(valid, train, every, forgetting=True)
    means = np.array([train[t - every : t].mean(axis=0) for t in steps[1:]]) / valid[0]
    design = np.column_stack([steps[1:], np.ones(n - 1)])
    beta, rest, _, _ = np.linalg.lstsq(design, means, rcond=None)
    error = np.sqrt(rest / (n - 3) * np.linalg.inv(design.T @ design)[0, 0])
    assert (beta[0] > error).all()
    np.testing.assert_allclose(explain["forgotten"], beta[0] - error, rtol=1e-9)


def test_forgetting_reads_training_losses_and_is_saved_only_where_it_is_on():
    assert CoBa().needs == Signal.VALID_LOSS and "forgetting" not in CoBa().settings()
    assert CoBa(forgetting=True).needs == Signal.VALID_LOSS | Signal.TRAIN_LOSS
    assert CoBa(forgetting=True).settings()["forgetting"] is True
    with pytest.raises(ValueError, match="CoBa forgetting: found true beside divergence: released"):
        CoBa(divergence="released", forgetting=True)
    with pytest.raises(ValueError, match="CoBa forgetting: found 1, wanted true or false"):
        CoBa(forgetting=1)


def test_panel_slopes_have_a_fraction_of_the_plain_error_on_a_recorded_run():
    benchmark = runpy.run_path(str(GOLDEN.parent.parent / "benchmarks" / "slopes.py"))
    recording = benchmark["Recording"].load(GOLDEN / "recorded_run.npz", "rows")
    published = {
        (28, 4): (0.00075, 0.00067, 0.00071, 0.00032),
        (28, 8): (0.00043, 0.00032, 0.00042, 0.00011),
        (14, 8): (0.00167, 0.00129, 0.00094, 0.00048),
    }
    for (probes, rows), want in published.items():
        found = benchmark["errors"](recording, probes, rows)
        estimators = ("plain", "paired", "fixed subset", "panel")
        np.testing.assert_allclose([found[name] for name in estimators], want, rtol=0.16)
        assert 2.3 < found["plain"] / found["panel"] < 4


def test_state_grows_by_eight_bytes_a_probe():
    balancer, sizes = CoBa(window=50, warmup=10), {}
    state = balancer.init(4)
    for step in range(4001):
        state, _, _ = balancer.update(
            state, Signals(step=step, valid_loss=np.full(4, 1 / (1 + step)))
        )
        if step in (1000, 4000):
            sizes[step] = sum(array.nbytes for array in state.values())
    assert sizes[4000] - sizes[1000] <= 8 * 3000 * 9 / 8 + 8 * 16
    assert state["entries"] == 4000 and len(state["ratio"]) < 80


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"window": 0}, "CoBa window: found 0, wanted a whole number >= 1"),
        ({"window": 2.5}, "CoBa window: found 2.5"),
        ({"warmup": 0}, "CoBa warmup: found 0"),
        ({"warmup": True}, "CoBa warmup: found True"),
        ({"tau": 0}, "CoBa tau: found 0, wanted a finite number > 0"),
        ({"tau": float("nan")}, "CoBa tau: found nan"),
        ({"tau": "5"}, "CoBa tau: found '5'"),
        ({"gate": -1.0}, "CoBa gate: found -1.0"),
        (
            {"divergence": "sum"},
            "CoBa divergence: found 'sum', wanted one of abs, signed, released",
        ),
        ({"slope": "theil"}, "CoBa slope: found 'theil', wanted one of auto, ols, panel"),
    ],
)
def test_settings_out_of_range(keywords, text):
    with pytest.raises(ValueError, match=text):
        CoBa(**keywords)
