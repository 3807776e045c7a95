"""Draws that follow the balancer or go around a task that is done: what is drawn, what it counts, and resuming."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import test_gram
import toys
from distributed import run_distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_equivalence import NAMES, configuration, parameters, start
from test_resume import assert_each_step_once, assert_same, newest
from test_signals import Memory

from balancers import Holder, make
from mtl import build, plugins
from mtl.config import ConfigError, parse
from mtl.data.mix import GRID, Mix, Round, on_grid
from mtl.distributed import comm
from mtl.output import provenance
from mtl.output.state import RunState
from mtl.train.loop import train as run_loop

# --- rounds: arithmetic

PART = st.sampled_from([0.0, 1e-4, 0.1, 0.3, 1.0]) | st.floats(0.01, 1)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Mix, list[Round]]:
    """A mix, and rounds of it from its first on, each of a few batches."""
    k = draw(st.integers(1, 6))
    some = st.lists(PART, min_size=k, max_size=k).filter(any)
    sizes = draw(st.lists(st.integers(1, 20), min_size=k, max_size=k))
    mix = Mix([f"t{i}" for i in range(k)], sizes, sizes, draw(st.integers(1, 9)), 0)
    found, step = [mix.first], 0
    for _ in range(draw(st.integers(1, 12))):
        step += draw(st.integers(1, 8))
        found.append(mix.next(found[-1], step, np.array(draw(some))))
    return mix, found


def stretches(found: list[Round]) -> list[tuple[Round, range]]:
    """Each round with its steps; the last has five."""
    stops = [*(one.start for one in found[1:]), found[-1].start + 5]
    return [(now, range(now.start, stop)) for now, stop in zip(found, stops, strict=True)]


@settings(deadline=None)
@given(rounds())
def test_counts_stay_near_the_plan_after_any_number_of_rounds(given):
    """The bound that docs/balancers.md proves, with the rounding of debts to the grid beside it."""
    mix, found = given
    planned, k = np.zeros(len(mix.sizes)), len(mix.sizes)
    before, rounding = found[0], len(found) * 2 / GRID
    for now, steps in stretches(found):
        if any(had and not has for had, has in zip(before.shares, now.shares, strict=True)):
            planned = mix.drawn(steps.start, now).astype(float)
        for step in [*steps, steps.stop]:
            drawn = mix.drawn(step, now)
            here = planned + now.parts * (step - steps.start) * mix.examples
            assert drawn.sum() == step * mix.examples
            assert (drawn - here).max() <= (k - 1) / 2 + rounding
            assert (here - drawn).max() <= max(k - 1.5, 0) + rounding
        planned, before = here, now


def test_a_task_left_out_now_and_again_is_not_owed_without_end():
    """With debts kept while it is left out, each turn of this adversary would owe two draws more."""
    mix, eps = Mix(["a", "b", "c", "d"], [9] * 4, [1] * 4, 1, 0), 1e-4
    now, step = mix.first, 3
    for turn in range(20):
        parts = [1.0, 0.0, eps, eps] if turn % 2 else [0.0, 1.0, eps, eps]
        now = mix.next(now, step, np.array(parts))
        step += 20
        assert np.abs(now.owed).max() / GRID <= 3


@settings(deadline=None)
@given(rounds())
def test_no_row_is_skipped_or_read_twice_at_a_seam(given):
    mix, found = given
    seen: list[list[int]] = [[] for _ in mix.sizes]
    for now, steps in stretches(found):
        for step in steps:
            tasks, rows = mix.batch(step, now)
            for task, row in zip(tasks.tolist(), rows.tolist(), strict=True):
                assert now.shares[task] > 0
                seen[task].append(row)
            assert [len(each) for each in seen] == mix.drawn(step + 1, now).tolist()
    for rows, n in zip(seen, mix.sizes, strict=True):
        for first in range(0, len(rows), n):
            assert len(set(rows[first : first + n])) == len(rows[first : first + n])


@settings(deadline=None)
@given(rounds())
def test_a_batch_is_a_function_of_round_and_number(given):
    mix, found = given
    fresh = Mix(mix.names, mix.sizes, mix.sizes, mix.examples, 0)
    forward = [mix.batch(step, now) for now, steps in stretches(found) for step in steps]
    everything = [(now, step) for now, steps in stretches(found) for step in steps]
    backward = [fresh.batch(step, now) for now, step in reversed(everything)][::-1]
    assert [tuple(map(np.ndarray.tolist, one)) for one in forward] == [
        tuple(map(np.ndarray.tolist, one)) for one in backward
    ]


@settings(deadline=None)
@given(rounds())
def test_a_round_draws_in_the_order_of_its_times(given):
    """The reference sorts all draws of the round at once: draw j of a task stands at (j + 1/2 - owed) / share."""
    mix, found = given
    for now, steps in stretches(found):
        n, total = len(steps) * mix.examples, sum(now.shares)
        times = sorted(
            ((j + 0.5) * total - owed) / share
            for share, owed in zip(now.shares, now.owed, strict=True) if share
            for j in range(n)
        )  # fmt: skip
        _, draws = now.draws(0, n)
        mine = [
            ((j - now.drawn[k] + 0.5) * total - now.owed[k]) / now.shares[k]
            for k, j in draws
        ]  # fmt: skip
        np.testing.assert_allclose(mine, times[:n])


def test_a_share_below_one_draw_a_round_is_paid_in_a_later_one():
    """Rounds of one batch of 4: without the debts a share of 1/24 would never be drawn."""
    mix = Mix(["a", "b"], [9, 9], [1, 1], 4, 0)
    now = mix.next(mix.first, 1, np.array([23, 1]))
    for step in range(2, 62):
        now = mix.next(now, step, np.array([23, 1]))
    assert mix.drawn(61, now).tolist() == [2 + 230, 2 + 10]


def test_the_grid():
    assert on_grid(np.array([1.0, 1.0, 2.0])) == (GRID // 4, GRID // 4, GRID // 2)
    thirds = on_grid(np.ones(3))
    assert sum(thirds) == GRID and on_grid(np.array(thirds) / GRID) == thirds


# --- in the loop


def train(folder: str, state: RunState, **overrides: object) -> dict[str, Any]:
    """A run of toy tasks from `state`. What was logged, and of each training forward its step and the targets of each task."""
    given = {
        "engine__zero": 2,
        "optimizer__lr": 0.05,
        "batch__examples": test_gram.EXAMPLES,
        "batch__tokens": 40,
        "batch__max_length": 40,
        "evaluate__every": 100,
        "schedule__name": "constant",
        **overrides,
    }
    config, trained = configuration(folder, **given), start(folder, **given)
    data = build.in_memory(config, toys.tokenizer(), test_gram.TASKS)
    forwards = []
    with tempfile.TemporaryDirectory() as output:
        memory = Memory(Path(output))
        holder = Holder(make(config.balancer.name), NAMES)
        run = build.build(config, data, engine=trained, packed=False, holder=holder, say=memory.say)
        run.checkpoints, run.trackers = memory, [memory] if comm.rank() == 0 else []
        as_usual = run.objective

        class Counted:
            measures: dict = {}

            def __call__(self, forward: Any, batch: Any, k: int) -> Any:
                terms = as_usual(forward, batch, k)
                if getattr(forward, "__func__", None) is type(trained).forward:
                    forwards.append((state.step, terms.counts.tolist()))
                return terms

        run.objective = Counted()
        run_loop(run, state)
    run.batches.close()
    logged = [line for _, line in memory.lines if "train/loss" in line]
    return {"forwards": forwards, "logged": logged, "parameters": parameters(trained)}


def dropped() -> RunState:
    """The second task was done before the first step; its rows are drawn in that one still."""
    zeros = np.zeros(3)
    return RunState(lowest=zeros + np.inf, stalled=zeros, held=np.array([np.nan, 0, np.nan]))


DROP = {"evaluate__patience": "{evaluations: 9, action: drop}", "balancer": "Equal"}
FOLLOW = {"mix": "{shares: equal, follow: balancer, every: 2}", "balancer": "RLW"}


def every_run(folder: str) -> dict[str, Any]:
    return {
        "drop": train(folder, dropped(), **DROP),
        "follow": train(folder, RunState(), **FOLLOW),
        "follow and drop": train(folder, dropped(), **FOLLOW, evaluate__patience=DROP["evaluate__patience"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    folder = toys.save(toys.tiny_llama(), tmp_path_factory.mktemp("model"))
    return {world: run_distributed(every_run, world, folder) for world in (1, 2)}


def test_rows_of_a_dropped_task_are_never_forwarded(results):
    for rank in results[2]:
        for name, before in (("drop", 1), ("follow and drop", 2)):
            seen, logged = rank[name]["forwards"], results[2][0][name]["logged"]
            late = [counts for step, counts in seen if step >= before]
            assert sum(counts[0] for counts in late) > 0 == sum(counts[1] for counts in late)
            assert sum(counts[1] for step, counts in seen if step < before) > 0
            assert [line["train/bees/tokens"] for line in logged[before:]] == [0] * (5 - before)
            for line in logged[before:]:
                assert line["draws/bees/planned"] == line["draws/bees/actual"] == 0
                assert sum(line[f"draws/{task}/actual"] for task in NAMES) == pytest.approx(1)


def test_the_others_get_what_a_dropped_task_had(results):
    """30, 20 and 2 rows in proportion: without the 20, 30 to 2."""
    for line in results[1][0]["drop"]["logged"][1:]:
        assert line["draws/apples/planned"] == pytest.approx(30 / 32, abs=1e-5)
        assert line["draws/cedars/planned"] == pytest.approx(2 / 32, abs=1e-5)
        assert line["train/apples/weight"] == line["train/cedars/weight"] == 0.5


def test_shares_are_the_weights_at_the_rounds_start_and_the_loss_counts_what_is_drawn(results):
    logged = results[1][0]["follow"]["logged"]
    weights = [[line[f"draws/{name}/weight"] for name in NAMES] for line in logged]
    planned = [[line[f"draws/{name}/planned"] for name in NAMES] for line in logged]
    np.testing.assert_allclose(planned[:2], 1 / 3)
    for first in (2, 4):
        floored = np.maximum(weights[first - 1], 1 / 12)
        for step in range(first, min(first + 2, 5)):
            np.testing.assert_allclose(planned[step], floored / floored.sum(), atol=1e-5)
    for line in logged:
        for name in NAMES:
            assert line[f"train/{name}/weight"] == line[f"draws/{name}/actual"]
            assert (line[f"train/{name}/tokens"] > 0) == (line[f"draws/{name}/actual"] > 0)
        loss = sum(line[f"train/{n}/weight"] * line.get(f"train/{n}/loss", 0) for n in NAMES)
        assert line["train/loss"] == pytest.approx(loss)


def test_one_process_and_two_draw_and_train_alike(results):
    for name in results[1][0]:
        one, two = results[1][0][name], results[2][0][name]
        for a, b in zip(one["logged"], two["logged"], strict=True):
            draws = {tag for tag in a if tag.startswith("draws/") or tag.endswith("/tokens")}
            assert {tag: a[tag] for tag in draws} == {tag: b[tag] for tag in draws}
        for key, array in one["parameters"].items():
            np.testing.assert_allclose(two["parameters"][key], array, atol=2e-5, err_msg=key)


# --- resume


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("draws"))


ROUNDS = ["objective=outside:causal_lm", "mix.follow=balancer", "mix.every=4"]


def test_killed_in_the_middle_of_a_round(yaml):
    """Saved at step 5, of the round from 4 to 8; with CoBa, whose weights follow the losses."""
    given = [*ROUNDS, "checkpoint.every=5", "evaluate.every=4", "evaluate.probe.every=2"]
    at_once, killed = (yaml.parent / how for how in ("at once", "killed"))
    runs.train(yaml, *given, f"output={at_once}", world=2).well()
    died = runs.train(yaml, *given, f"output={killed}", world=2, MISFORTUNE="kill step 7 1")
    assert -9 in died.codes and newest(killed).name == "step-00000005"
    runs.train(yaml, *given, f"output={killed}", world=2, resume=True).well()
    assert_each_step_once(killed)
    assert_same(at_once, killed)
    shares = [[line[f"draws/{n}/planned"] for n in ("copy", "chat", "prose")]
              for line in runs.metrics(killed) if "train/loss" in line]  # fmt: skip
    assert shares[4] == shares[7] != shares[8], "CoBa's weights have moved the draws"


def test_a_round_goes_on_at_another_world_size(yaml):
    """RLW's weights are of its seed alone, so draws are alike to the last; parameters to rounding."""
    given = [*ROUNDS, "balancer=RLW", "optimizer.name=sgd", "optimizer.lr=0.05"]
    stayed, moved = (yaml.parent / how for how in ("stayed", "moved"))
    runs.train(yaml, *given, f"output={stayed}", world=2).well()
    died = runs.train(yaml, *given, f"output={moved}", world=2, MISFORTUNE="kill step 7 1")
    assert -9 in died.codes and newest(moved).name == "step-00000006"
    runs.train(yaml, *given, f"output={moved}", world=1, resume=True).well()
    one, other = (
        [line for line in runs.metrics(run) if "train/loss" in line] for run in (stayed, moved)
    )
    for a, b in zip(one, other, strict=True):
        draws = {tag for tag in a if tag.startswith("draws/") or tag.endswith("/tokens")}
        assert {tag: a[tag] for tag in draws} == {tag: b[tag] for tag in draws}
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=5e-6)


def test_killed_right_after_a_drop_that_another_run_told(yaml):
    """`prose` is dropped from step 4 on, and 5 is saved. Without `follow` the drop alone begins a round."""
    told = yaml.parent / "pilot.json"
    own = {"copy": 12, "chat": 12, "prose": 4}
    told.write_text(json.dumps({"steps": {"own": own}}))
    drop = f"evaluate.patience={{from: {told}, action: drop}}"
    given = ["objective=outside:causal_lm", drop, "checkpoint.every=5", "evaluate.every=4"]
    at_once, killed = (yaml.parent / how for how in ("told at once", "told and killed"))
    runs.train(yaml, *given, f"output={at_once}", world=2).well()
    died = runs.train(yaml, *given, f"output={killed}", world=2, MISFORTUNE="kill step 6 1")
    assert -9 in died.codes and newest(killed).name == "step-00000005"

    told.write_text(json.dumps({"steps": {"own": {**own, "prose": 8}}}))
    refused = runs.train(yaml, *given, f"output={killed}", world=2, resume=True)
    assert refused.codes != [0, 0] and f"steps by {told}" in refused.err

    told.write_text(json.dumps({"steps": {"own": own}}))
    runs.train(yaml, *given, f"output={killed}", world=2, resume=True).well()
    assert_each_step_once(killed)
    assert_same(at_once, killed)
    drawn = [line["train/prose/tokens"] for line in runs.metrics(killed) if "train/loss" in line]
    assert min(drawn[:4]) > 0 == max(drawn[4:])


# --- before the first update


def test_a_task_that_was_best_at_the_start_is_held_at_its_part(yaml):
    """The weights of the start are those before the first update, each times its loss_weight."""
    told = yaml.parent / "best at once.json"
    told.write_text(json.dumps({"steps": {"own": {"copy": 0, "chat": 9, "prose": 9}}}))
    for action, kept in ("freeze", 1.0), ("anchor", 0.25):
        patience = f"evaluate.patience={{from: {told}, action: {action}}}"
        output = yaml.parent / f"best at once, {action}"
        given = [patience, "tasks.copy.loss_weight=2", "train.steps=2", f"output={output}"]
        runs.train(yaml, "objective=outside:causal_lm", *given).well()
        found = [line["train/copy/weight"] for line in runs.metrics(output) if "train/loss" in line]
        assert found == pytest.approx([kept * 2 / 4] * 2), action


def test_draws_follow_the_first_weights_where_the_first_batch_is_passed_over(yaml):
    rows = yaml.parent / "poison.jsonl"
    toys.write_rows(rows, [{"prompt": f"{toys.UNUSED} =", "completion": " x"}] * 9)
    given = ["objective=outside:causal_lm", "mix.follow=balancer", "mix.every=1", "train.steps=2"]
    output, skip = yaml.parent / "passed over", "train.not_finite.action=skip"
    given += [f"tasks.copy.train={rows}", skip, "checkpoint.every=null", f"output={output}"]
    runs.train(yaml, *given, POISON="loss").well()
    lines = [line for line in runs.metrics(output) if "train/passed_over" in line]
    assert [line["step"] for line in lines] == [0, 1]


# --- configs

CONFIG = """
model: {name: x}
tasks:
  a: {train: x, validation: x, format: text}
  b: {train: x, validation: x, format: text}
train: {steps: 5}
output: x
"""


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["mix.every=9"], "mix.every: found 9, wanted nothing. It has no meaning without"),
        (["mix.follow=balancer", "mix.floor=0.6"], "mix.floor: found 0.6, wanted at most 0.5"),
        (
            ["mix.follow=balancer", "tasks.b={of: [a], loss: other}"],
            "mix.follow: found balancer, and the task b, which is a loss of other tasks' rows",
        ),
        (
            ["mix.follow=balancer", "train.order={scheme: batch, replica: 0, of: 2}"],
            "train.order.scheme: found batch, wanted rotate or shuffle. With mix.follow",
        ),
        (
            [
                "evaluate.patience={evaluations: 1, action: drop}",
                "train.order={scheme: batch, replica: 0, of: 2}",
            ],
            "train.order.scheme: found batch, wanted rotate or shuffle. With evaluate.patience",
        ),
        (
            ["mix={follow: balancer, shares: epochs}", "tasks.a.epochs=1", "tasks.b.epochs=1"],
            "mix.shares: found epochs, wanted other shares beside mix.follow",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, error):
    with pytest.raises(ConfigError) as caught:
        parse(CONFIG, overrides=overrides)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("balancer", "why"),
    [
        ("GLS", "The scale or the sign of its weights has a meaning"),
        ("Uncertainty", "The scale or the sign of its weights has a meaning"),
        ("Tokens", "Its weights follow the draws"),
        ("{name: Bounded, floor: 0.1, balancer: Tokens}", "Its weights follow the draws"),
        ("CoBa", None),
        ("{name: Apart, parts: {x: [a], y: [b]}, balancer: CoBa}", None),
    ],
)
def test_which_balancers_can_steer(balancer, why):
    config = parse(CONFIG, overrides=["mix.follow=balancer", f"balancer={balancer}"])
    if why is None:
        assert plugins.holder(config).tasks == ("a", "b")
        return
    with pytest.raises(ConfigError, match=f"mix.follow: found balancer, which is .*{why}"):
        plugins.holder(config)


def test_a_checkpoint_of_before_there_were_rounds_is_of_the_same_mix():
    assert provenance.identity(parse(CONFIG), [], 5)["mix"] == {
        "shares": "proportional",
        "temperature": None,
    }
