"""Balancers around balancers: schedules, bounds, groups; and the balancer in the documentation."""

import re
from pathlib import Path

import numpy as np
import pytest
from contract import CHECKS, stream
from hypothesis import given
from hypothesis import strategies as st

from balancers import (
    GLS,
    LBTW,
    Apart,
    Balancer,
    Bounded,
    CoBa,
    Equal,
    GradNorm,
    Grouped,
    Holder,
    Scheduled,
    Signal,
    Signals,
    Static,
    Tokens,
    TorchJD,
    make,
)

DOCS = Path(__file__).parent.parent / "docs" / "balancers.md"


def run(balancer, signals, tasks=("a", "b", "c")):
    held = Holder(balancer, tasks)
    return np.array([held.update(each) for each in signals]), held


def test_scheduled_warms_up_blends_and_freezes():
    coba = CoBa(window=10, warmup=1)
    inner, _ = run(coba, stream(3, 60, coba.needs))
    outer, _ = run(Scheduled(coba, warmup=20, blend=0.25, freeze=40), stream(3, 60, coba.needs))
    np.testing.assert_allclose(outer[:20], 1 / 3)
    np.testing.assert_allclose(outer[20:40], 0.25 * inner[20:40] + 0.75 / 3)
    np.testing.assert_array_equal(outer[40:], np.tile(outer[39], (20, 1)))


def test_scheduled_keeps_a_scale():
    signals = [Signals(t, train_loss=[1.0, 2.0, 8.0]) for t in range(2)]
    inner, _ = run(GLS(), signals)
    outer, _ = run(Scheduled(GLS(), warmup=1), signals)
    np.testing.assert_allclose(outer[0], inner[0].mean())
    np.testing.assert_array_equal(outer[1], inner[1])


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=6), st.floats(0, 1), st.floats(0, 1))
def test_bounded_keeps_the_bounds_with_the_least_mixing(given_weights, low, high):
    k = len(given_weights)
    floor, ceiling = low / k, 1 / k + high * (1 - 1 / k)
    plain = np.array(given_weights) / sum(given_weights)
    weights, held = run(
        Bounded(Static(given_weights), floor, ceiling), [Signals(0)], tasks=range(k)
    )
    assert (weights[0] >= floor - 1e-12).all() and (weights[0] <= ceiling + 1e-12).all()
    mixed = held.explain["mixed"]
    np.testing.assert_allclose(weights[0], (1 - mixed) * plain + mixed / k, atol=1e-12)
    slack = min(weights[0].min() - floor, ceiling - weights[0].max())
    assert mixed == 0 or abs(slack) < 1e-12


def test_bounded_bounds_shares_of_a_scale():
    weights, _ = run(Bounded(GLS(), floor=0.25), [Signals(1, train_loss=[1.0, 1.0, 100.0])])
    inner, _ = run(GLS(), [Signals(1, train_loss=[1.0, 1.0, 100.0])])
    np.testing.assert_allclose(weights.sum(), inner.sum())
    np.testing.assert_allclose(weights[0, 2] / weights.sum(), 0.25)


def test_grouped_counts_as_one():
    weights, _ = run(Grouped("Equal", {"pair": ["a", "c"]}), [Signals(0)])
    np.testing.assert_allclose(weights[0], [0.25, 0.5, 0.25])
    weights, _ = run(Grouped(Tokens(), {"pair": ["a", "c"]}), [Signals(0, tokens=[10, 60, 30])])
    np.testing.assert_allclose(weights[0], [0.2, 0.6, 0.2])
    weights, _ = run(Grouped(Static({"pair": 3, "b": 1}), {"pair": ["a", "c"]}), [Signals(0)])
    np.testing.assert_allclose(weights[0], [0.375, 0.25, 0.375])


def test_grouped_reads_the_mean_of_its_tasks():
    coba = CoBa(window=10, warmup=5, slope="ols")  # the merged probes below name no group
    signals = list(stream(3, 80, coba.needs))
    outer, held = run(Grouped(coba, {"pair": ["a", "c"]}), signals)
    merged = [
        Signals(s.step, valid_loss=[(s.valid_loss[0] + s.valid_loss[2]) / 2, s.valid_loss[1]])
        for s in signals
    ]
    inner, plain = run(coba, merged, tasks=("pair", "b"))
    np.testing.assert_allclose(
        outer, np.stack([inner[:, 0] / 2, inner[:, 1], inner[:, 0] / 2], axis=1)
    )
    np.testing.assert_array_equal(held.explain["slope"], plain.explain["slope"][[0, 1, 0]])


def test_grouped_fills_an_absent_member_with_its_last_loss():
    rows = [[4.0, 1.0, 2.0], [np.nan, 1.0, 1.0], [np.nan, 1.0, np.nan]]
    signals = [Signals(t + 1, train_loss=row) for t, row in enumerate(rows)]
    _, held = run(Grouped(LBTW(alpha=1.0), {"pair": ["a", "c"]}), signals[:2])
    np.testing.assert_allclose(held.explain["ratio"], [2.5 / 3, 1, 2.5 / 3])
    held.update(signals[2])
    np.testing.assert_allclose(held.explain["ratio"], [2.5 / 3, 1, 2.5 / 3])


def test_grouped_gradient_is_the_mean():
    jacobian = np.random.default_rng(0).normal(size=(3, 4))
    merged = np.stack([(jacobian[0] + jacobian[2]) / 2, jacobian[1]])
    _, held = run(
        Grouped(GradNorm(), {"pair": ["a", "c"]}), [Signals(0, gram=jacobian @ jacobian.T)]
    )
    np.testing.assert_allclose(held.explain["norm"], np.linalg.norm(merged, axis=1)[[0, 1, 0]])


@pytest.mark.parametrize("shares", [None, {"one": 3, "two": 1}])
def test_apart_is_a_balancer_for_each_part(shares):
    coba, tasks = CoBa(window=10, warmup=5), "abcde"
    parts = {"one": ["d", "a"], "two": ["b", "e", "c"]}
    signals = list(stream(5, 80, coba.needs, absent=0.1))
    weights, held = run(Apart(coba, parts, shares), signals, tasks)
    for name, members in (("one", [0, 3]), ("two", [1, 2, 4])):
        share = 0.5 if shares is None else shares[name] / 4
        only = [
            Signals(s.step, valid_loss=s.valid_loss[members], valid_group=s.valid_group)
            for s in signals
        ]
        alone, single = run(coba, only, [tasks[i] for i in members])
        np.testing.assert_allclose(weights[:, members], share * alone, rtol=1e-12)
        np.testing.assert_allclose(weights[:, members].sum(axis=1), share, rtol=1e-12)
        for what, value in single.explain.items():
            np.testing.assert_array_equal(
                held.explain[what][members], np.broadcast_to(value, len(members))
            )


def test_apart_hands_each_part_its_block_of_the_gramian():
    jacobian = np.random.default_rng(0).normal(size=(4, 6)) * [[1], [2], [3], [4]]
    gram = jacobian @ jacobian.T
    _, held = run(
        Apart(GradNorm(), {"x": ["a", "c"], "y": ["b", "d"]}), [Signals(0, gram=gram)], "abcd"
    )
    np.testing.assert_allclose(held.explain["norm"], np.sqrt(np.diag(gram)), rtol=1e-12)


def test_apart_of_single_tasks_is_a_constant_and_a_scale_becomes_a_share():
    signals = [Signals(1, train_loss=[1.0, 3.0, 8.0])]
    weights, held = run(Apart(GLS(), {"x": ["a", "b"], "y": ["c"]}, {"x": 0.2, "y": 0.8}), signals)
    inner, _ = run(GLS(), [Signals(1, train_loss=[1.0, 3.0])], "ab")
    np.testing.assert_allclose(weights[0], [*0.2 * inner[0] / inner[0].sum(), 0.8], rtol=1e-12)
    assert all(np.isnan(each[2]) for each in held.explain.values())
    weights, held = run(Apart("GLS", {"x": ["a"], "y": ["b"], "z": ["c"]}), signals)
    np.testing.assert_array_equal(weights[0], np.full(3, 1 / 3))
    assert held.state_dict()["arrays"].keys() == {"weights"}


def test_wrappers_nest_and_come_from_mappings():
    spec = {
        "name": "Scheduled",
        "balancer": {"name": "Bounded", "balancer": "Equal", "floor": 0.1},
        "warmup": 2,
    }
    balancer = make(spec)
    assert isinstance(balancer, Scheduled) and isinstance(balancer.balancer.balancer, Equal)
    settings = Holder(balancer, ["a", "b"]).state_dict()["meta"]["settings"]
    assert settings["balancer"]["settings"]["balancer"]["method"] == "balancers.equal:Equal"
    assert make(balancer) is balancer


def test_wrappers_pass_on_what_the_inner_balancer_needs_and_promises():
    outer = Scheduled(Grouped(TorchJD("UPGrad"), {"pair": ["a", "b"]}))
    assert outer.needs == Signal.GRAM and not outer.sums_to_one and not outer.non_negative


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: make("Coba"), "balancer 'Coba': wanted a Balancer, or one of the names .*CoBa"),
        (lambda: make(3), "balancer 3: wanted"),
        (
            lambda: make({"name": "CoBa", "windw": 3}),
            "balancer CoBa: its keywords do not fit: .*windw",
        ),
        (lambda: Scheduled("Equal", warmup=-1), "Scheduled warmup: found -1"),
        (
            lambda: Scheduled("Equal", blend=2),
            r"Scheduled blend: found 2, wanted a number in \[0, 1\]",
        ),
        (
            lambda: Scheduled("Equal", warmup=5, freeze=5),
            "Scheduled freeze: found 5, wanted a step after",
        ),
        (lambda: Bounded("Equal", floor=-0.1), "Bounded floor: found -0.1"),
        (
            lambda: Bounded(TorchJD("IMTLG")),
            "Bounded balancer: found TorchJD, whose weights may be negative",
        ),
        (
            lambda: Holder(Bounded("Equal", floor=0.4), "abc"),
            "wanted floor <= 1/K <= ceiling, which is 0.3333 for 3",
        ),
        (lambda: Grouped("Equal", {"g": "ab"}), "Grouped groups: found {'g': 'ab'}, wanted"),
        (
            lambda: Holder(Grouped("Equal", {"g": ["a", "z"]}), "abc"),
            r"wanted tasks of \['a', 'b', 'c'\]",
        ),
        (
            lambda: Holder(Grouped("Equal", {"g": ["a"], "h": ["a"]}), "abc"),
            "each in one group at most",
        ),
        (
            lambda: Holder(Grouped("Equal", {"b": ["a"]}), "abc"),
            "no group with the name of a task outside it",
        ),
        (lambda: Grouped("Equal", {"g": ["a"]}).init(2), "Grouped: found no task names"),
        (
            lambda: Apart(TorchJD("IMTLG"), {"x": ["a"]}),
            "Apart balancer: found TorchJD, whose weights may be negative",
        ),
        (lambda: Apart("Equal", {"x": "ab"}), "Apart parts: found {'x': 'ab'}, wanted part names"),
        (lambda: Apart("Equal", {}), "Apart parts: found {}, wanted part names"),
        (
            lambda: Apart("Equal", {"x": ["a"], "y": ["b"]}, {"x": 1}),
            r"Apart shares: found {'x': 1}, wanted a number for each of the parts \['x', 'y'\]",
        ),
        (
            lambda: Apart("Equal", {"x": ["a"]}, {"x": 0}),
            "Apart shares: part 'x': found 0, wanted a finite number > 0",
        ),
        (
            lambda: Holder(Apart("Equal", {"x": ["a"], "y": ["b"]}), "abc"),
            r"Apart parts: found tasks in no part, \['c'\]",
        ),
        (
            lambda: Holder(Apart("Equal", {"x": ["a", "b"], "y": ["b", "c"]}), "abc"),
            r"Apart parts: found tasks that are listed twice, \['b'\]",
        ),
        (
            lambda: Holder(Apart("Equal", {"x": ["a", "b", "c", "z"]}), "abc"),
            r"Apart parts: found unknown tasks, \['z'\]",
        ),
        (lambda: Apart("Equal", {"x": ["a"]}).init(1), "Apart: found no task names"),
        (lambda: Static({"a": 1}).init(1), "found a mapping but no task names"),
    ],
)
def test_refusals(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_balancer_in_the_documentation_is_under_the_contract(check):
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
        if "class " in block
    )
    names = {}
    exec(code, names)  # noqa: S102
    kind = next(
        each
        for each in names.values()
        if isinstance(each, type)
        and each.__module__ == "builtins"
        and issubclass(each, Balancer)
        and each is not Balancer
    )
    check(lambda tasks: kind())
