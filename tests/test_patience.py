"""When a task is done, what becomes of its weight, and when the run ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.output.state import RunState
from mtl.train.patience import Patience, hold

NAMES = ["a", "b"]
NAN = np.nan


def observe(
    patience: Patience, passes: list[list[float]], state: RunState | None = None
) -> tuple[RunState, list[list[str]]]:
    state = state or RunState(weights=np.array([0.75, 0.25]))
    return state, [patience.observe(state, np.array(losses), NAMES) for losses in passes]


FALLING_AND_FLAT = [[3, 1], [2, 1.5], [1, 1.25]]


def test_log_names_a_task_once_and_again_when_it_goes_on():
    patience = Patience(2)
    state, told = observe(patience, [*FALLING_AND_FLAT, [0.9, 1.1], [0.8, 0.5]])
    assert told == [[], [], ["b is done: its lowest loss is 1.0000, full passes since: 2"], [],
                    ["b goes on after all, with a loss of 0.5000"]]  # fmt: skip
    assert not patience.done(state).any() and np.isnan(state.held).all()
    np.testing.assert_array_equal(state.lowest, [0.8, 0.5])


def test_freeze_keeps_the_part_of_the_weights_it_had():
    patience = Patience(2, "freeze")
    state, told = observe(patience, FALLING_AND_FLAT)
    assert told[-1] == [
        "b is done: its lowest loss is 1.0000, full passes since: 2; its part of the weights stays 0.250"
    ]
    np.testing.assert_array_equal(state.held, [NAN, 0.25])
    state.weights = np.array([0.5, 0.5])
    state, told = observe(patience, [[0.9, 0.1]], state)
    assert told == [[]] and patience.done(state).tolist() == [False, True], (
        "what is done stays done"
    )
    np.testing.assert_array_equal(state.held, [NAN, 0.25])


def test_drop_and_the_end_of_the_run():
    patience = Patience(1, "drop")
    state, told = observe(patience, [[3, 1], [2, 1]])
    assert told[-1] == [
        "b is done: its lowest loss is 1.0000, full passes since: 1; its weight is now 0"
    ]
    assert not patience.done(state).all()
    state, _ = observe(patience, [[2, 0.5]], state)
    assert patience.done(state).all()


def test_anchor_keeps_a_part_until_the_task_improves_again():
    patience = Patience(2, "anchor", keep=0.4)
    state = RunState(weights=np.array([0.75, 0.25]))
    seen = []
    for step, losses in enumerate([[3, 1], [2, 1.5], [1, 1.25], [0.9, 1.1], [0.8, 0.9]]):
        state.step = 10 * step
        told = patience.observe(state, np.array(losses), NAMES)
        seen.append((state.held.copy(), state.anchored.copy(), patience.done(state).tolist(), told))
    free = [NAN, NAN]
    for held, anchored, done, told in seen[:2]:
        np.testing.assert_array_equal([held, anchored], [free, free])
        assert done == [False, False] and told == []
    held, anchored, done, told = seen[2]
    np.testing.assert_array_equal([held, anchored], [[NAN, 0.4 * 0.25], [NAN, 0]])
    assert done == [False, True] and told == [
        "b is done: its lowest loss is 1.0000, full passes since: 2; its part of the weights is now "
        "0.100, and its loss the divergence from its own best"
    ]
    np.testing.assert_array_equal(hold(held, np.array([1.0, 1.0])), [1.8, 0.2])
    np.testing.assert_array_equal(seen[3][1], [NAN, 0])
    held, anchored, done, told = seen[4]
    np.testing.assert_array_equal([held, anchored], [free, free])
    assert done == [False, False] and told == ["b goes on after all, with a loss of 0.9000"]
    np.testing.assert_array_equal(state.best_at, [40, 40])


def test_it_does_not_matter_for_its_part_which_task_was_done_first():
    """Each of four keeps a quarter of the quarter that it had; the last has what the others gave up."""
    patience, names = Patience(1, "anchor"), list("abcd")
    weights = np.full(4, 0.25)
    state = RunState(weights=weights)
    for step, losses in enumerate([[1] * 4, [1, 0.9, 0.9, 0.9], [1, 1, 0.8, 0.8], [1, 1, 1, 0.7]]):
        state.step = step
        patience.observe(state, np.array(losses), names)
        state.weights = hold(state.held, weights)
    np.testing.assert_allclose(state.weights, [0.0625, 0.0625, 0.0625, 0.8125])
    # Draws, in any shares: the same rule.
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    held = np.where(patience.kept(state) < 1, patience.kept(state) * shares, NAN)
    np.testing.assert_allclose(hold(held, shares), [0.025, 0.05, 0.075, 0.85])


@pytest.mark.parametrize("action", ["freeze", "drop", "anchor"])
def test_times_of_another_run(action):
    """Task b is done from step 10 on and stays so, though its loss falls."""
    patience, state = Patience(None, action, times=(25.0, 10.0)), RunState(weights=np.ones(2) / 2)
    seen = []
    for step in (0, 10, 20, 30):
        state.step = step
        told = patience.observe(state, np.array([2.0, 1.0]) - 0.01 * step, NAMES)
        seen.append((patience.done(state).tolist(), len(told)))
    assert seen == [([False, False], 0), ([False, True], 1), ([False, True], 0), ([True, True], 1)]
    if action == "anchor":
        np.testing.assert_array_equal(state.anchored, [30, 10])


def test_the_margin():
    state, _ = observe(Patience(1, margin=0.1), [[1, 1], [0.95, 0.85]])
    np.testing.assert_array_equal(state.stalled, [1, 0])
    np.testing.assert_array_equal(state.lowest, [1, 0.85])


def test_before_the_first_pass_nothing_is_done():
    assert not Patience(1).done(RunState()).any()


@pytest.mark.parametrize(
    "held, weights, wanted",
    [
        ([NAN, NAN, NAN], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        ([NAN, 0.0, NAN], [0.5, 0.3, 0.2], [5 / 7, 0, 2 / 7]),
        ([NAN, 0.4, NAN], [0.5, 0.3, 0.2], [0.6 * 5 / 7, 0.4, 0.6 * 2 / 7]),
        ([0.2, 0.4, NAN], [0.5, 0.3, 0.2], [0.2, 0.4, 0.4]),
        ([NAN, 0.4, NAN], [5.0, 3.0, 2.0], [6 * 5 / 7, 4, 6 * 2 / 7]),
        ([NAN, 0.5, NAN], [0.0, 1.0, 0.0], [0.25, 0.5, 0.25]),
        ([NAN, 1.0, NAN], [0.5, 0.3, 0.2], [0, 1, 0]),
        ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
        ([NAN, 0.0, NAN], [-0.5, 1.7, -0.2], [-0.5, 0, -0.2]),
    ],
)
def test_weights_around_held_tasks(held, weights, wanted):
    np.testing.assert_allclose(hold(np.array(held), np.array(weights)), wanted, atol=1e-15)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=6))
def test_the_sum_stays(tasks):
    weights = np.array([w + 0.01 for w, _ in tasks])
    done = np.array([d for _, d in tasks])
    done[0] = False
    held = np.where(done, weights / weights.sum(), NAN)
    (
        np.testing.assert_allclose(hold(held, weights), weights, rtol=1e-9),
        "held at what they are: nothing changes",
    )
    np.testing.assert_allclose(
        hold(np.where(done, 0.0, NAN), weights).sum(), weights.sum(), rtol=1e-9
    )
