"""Studies: their YAML, what is said of paired runs, and one of toy runs that is killed and goes on."""

import json
import runpy
import shlex
import sys
from dataclasses import replace
from itertools import product
from math import comb, log
from pathlib import Path

import numpy as np
import pytest
import runs
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mtl import process
from mtl.compare import cost, report, statistics, study
from mtl.compare.runs import Runner, _by_task, _refuse_degenerate, perform, slurm
from mtl.config import load
from mtl.output.report import best_steps

PROGRAMS = runs.ROOT / "launch"
TASKS = ("copy", "chat", "prose")

# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [2, 6, 10, 25])
def test_the_interval_is_scipys(n):
    x = np.random.default_rng(n).normal(0.3, 1, n) ** 3
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    assert statistics.interval(x) == pytest.approx(tuple(theirs), rel=0.02 if n == 2 else 1e-9)
    assert statistics.interval([0.5] * n) == (0.5, 0.5)


def test_p_counts_every_assignment_of_signs():
    x = [0.3, -0.1, 0.4, 0.2, 0.5, 0.1]
    sums = [
        sum(s * v for s, v in zip(signs, x, strict=True)) for signs in product((1, -1), repeat=6)
    ]
    by_hand = sum(abs(one) >= abs(sum(x)) - 1e-12 for one in sums) / 64
    assert statistics.sign_flip(x) == by_hand == 6 / 64
    assert statistics.sign_flip([1.0] * 8) == statistics.least_p(8) == 2 / 2**8
    tails = sum(comb(20, k) for k in range(6)) * 2 / 2**20  # 15 of 20 alike: the sign test
    assert statistics.sign_flip([1.0] * 15 + [-1.0] * 5) == pytest.approx(tails, rel=0.05)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []
    assert statistics.holm([0.01, 0.04], tests=5) == pytest.approx([0.05, 0.16])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lowers_nothing(p):
    adjusted = statistics.holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True)) and max(adjusted) <= 1
    assert [adjusted[i] for i in np.argsort(p)] == sorted(adjusted)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_least_effect_has_students_quantiles(n):
    x = np.random.default_rng(n).normal(0, 0.7, n)
    t = scipy.stats.t(n - 1)
    wanted = (t.ppf(0.975) + t.ppf(0.8)) * x.std(ddof=1) / n**0.5
    assert statistics.least_effect(x) == pytest.approx(wanted, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- study


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The toy experiment with test rows."""
    path = runs.write(tmp_path_factory.mktemp("compare"))
    text = path.read_text()
    for task in TASKS:
        file = path.parent / f"{task}.test.jsonl"
        file.write_text((path.parent / f"{task}.validation.jsonl").read_text())
        line = f"    validation: {path.parent}/{task}.validation.jsonl\n"
        assert line in text
        text = text.replace(line, f"{line}    test: {file}\n")
    path.write_text(text)
    return path


ARMS = {"equal": ["balancer=Equal"], "coba": ["balancer=CoBa"]}


def written(base: Path, folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    plain = {"base": str(base), "seeds": 6, "against": "equal", "arms": ARMS}
    path.write_text(json.dumps({**plain, **changes}))  # JSON is YAML
    return path


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": 6}, "found the key 'seed', wanted base, .*Did you mean seeds"),
        ({"arms": {}}, "arms: found nothing, wanted a mapping from names"),
        (
            {"arms": {"equal": "balancer=Equal"}},
            r"arms.equal: found 'balancer=Equal', wanted a list",
        ),
        (
            {"against": "equl"},
            "against: found 'equl', wanted an arm: equal, coba. Did you mean equal",
        ),
        ({"seeds": 5}, r"found 5, wanted 6 or more: with 5 pairs the least p .* is 0.062"),
        ({"primary": ["equal"]}, "primary: found 'equal', wanted arms that are compared with it"),
        ({"primary": ["cob"]}, "primary: found 'cob', wanted an arm: equal, coba. Did you mean"),
        ({"seeds": "five"}, "seeds: found 'five', wanted a number of seeds"),
        (
            {"tuning": {"seeds": [3, 9], "arms": ARMS}},
            "tuning.seeds: found 3, which is reported too",
        ),
        (
            {"arms": {**ARMS, "cabo": ["balancer=Cabo"], "x": ["train.step=1"]}},
            "(?s)arms.cabo: .*Cabo.*arms.x: .*train.step",
        ),
        (
            {"arms": {"still": ["balancer={name: Static, weights: {mean:coba}}"], **ARMS}},
            r"arms.still: found \{mean:coba\}, wanted an arm above it",
        ),
        ({"set": ["tasks.chat.test=null"]}, r"tasks.chat.test: found nothing, wanted rows that"),
        (
            {"set": ["evaluate.probe={examples: all}"]},
            r"evaluate.probe.examples: found all, wanted batch or a number",
        ),  # of the arm with CoBa
        ({"references": {"seeds": 1, "arms": {"alone": ["x.y=1"]}}}, "references.copy.alone: .*x"),
    ],
)
def test_what_is_wrong_with_a_study(base, tmp_path, changes, said):
    with pytest.raises(study.StudyError, match=said):
        study.read(written(base, tmp_path, **changes))


def test_the_order_of_runs_and_their_settings(base, tmp_path):
    changes = {
        "seeds": [0, 1, 2, 3, 4, 5], "first": ["coba"], "set": ["train.steps=4"],
        "references": {"seeds": [0], "arms": {"alone": ["train.steps=2"]}},
        "tuning": {"seeds": [100], "arms": {"fast": ["optimizer.lr=1e-2"]}},
    }  # fmt: skip
    found = study.read(written(base, tmp_path, **changes))
    names = [run.name for run in found.runs()]
    assert names[:2] == ["tuning/fast/seed-100", "arms/coba/seed-0"]
    assert names[7] == "arms/equal/seed-0" and len(names) == 1 + 12 + 3
    assert names[13:] == [f"references/{task}.alone/seed-0" for task in TASKS]
    coba, alone = found.config(found.runs()[1]), found.config(found.runs()[-1])
    assert (coba.train.steps, coba.balancer.name, coba.evaluate.best) == (4, "CoBa", "log")
    assert list(alone.tasks) == ["prose"] and alone.train.steps == 2
    assert alone.tasks["prose"].test == (f"{base.parent}/prose.test.jsonl",)
    keys = {found.key(run) for run in found.runs()}
    assert len(keys) == len(names)
    assert f"--array=1-{len(names)} " in slurm(Runner(found, tmp_path, PROGRAMS), Path("x.py"))


def test_a_slurm_task_runs_what_was_asked_for(base, tmp_path):
    found = study.read(written(base, tmp_path), ("mine",))
    script = slurm(Runner(found, tmp_path / "an out", PROGRAMS, 3, keep=True), Path("x.py"))
    options = shlex.split(script.splitlines()[-1].removeprefix("exec "))[1:]
    assert options == [
        "x.py", str(found.path), "--out", str(tmp_path / "an out"), "--threads", "3",
        "--allow-code", "mine", "--keep", "--number", "$SLURM_ARRAY_TASK_ID",
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [0.0, float("nan"), float("inf")])
def test_a_test_loss_without_a_log_is_the_arms_own_fault(loss):
    with pytest.raises(study.StudyError, match=rf"t.json: found {loss} for b \(last\), wanted a"):
        _refuse_degenerate({"best": {"a": 1.0}, "last": {"b": loss}}, Path("t.json"))


def test_small_losses_stay_above_zero():
    assert _by_task(["a"], np.array([[3e-7, 1.2345678]])) == {"a": [3e-7, 1.23457]}


def test_cost_in_forwards(base):
    def of(*overrides: str) -> int:
        return cost.forward_equivalents(load(base, overrides), 12)

    trained, probe = 12 * 6 * 3, round(1.25 * 6)  # 12 steps of 6 rows; a probe every 4
    assert of("balancer=Equal") == trained
    assert of() == trained + 3 * probe
    assert of("evaluate.probe={every: 6, examples: 3}") == trained + 2 * 9
    assert cost.forward_equivalents(load(base, ["balancer=Equal"]), 12, (), 55) == trained + 55
    assert of("balancer=FAMO") == trained + 12 * 6
    assert of("balancer=GradNorm") == 2 * trained
    assert of("balancer=GradNorm", "gram.every=4") == trained + 3 * 6 * 3
    assert of("balancer=MetaWeighting") == 2 * trained + 12 * probe * 3


# ------------------------------------------------------------------------------------------------------------- report


def result(runner: Runner, run: study.Trial, best: list[float], own: list[float]) -> None:
    tasks = [run.arm.split(".")[0]] if run.kind == "references" else ["a", "b"]
    test = {"best": best, "last": [2 * x for x in best]}
    if run.arm == "equal":
        test["own"] = own
    made = {
        "key": runner.study.key(run),
        "tasks": tasks,
        "test": {at: dict(zip(tasks, losses, strict=True)) for at, losses in test.items()},
        "steps": {
            "run": 100,
            "last": 100,
            "best": 80,
            "own": dict.fromkeys(tasks, 50) | {tasks[0]: 90},
        },
        "cost": 300 if run.arm == "equal" else 330,
        "weights": dict(zip(tasks, [0.75, 0.25][: len(tasks)], strict=True)),
        "validation": {task: [3.0, loss] for task, loss in zip(tasks, best, strict=True)},
    }
    path = runner.path(run)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made))


def made_up(
    base: Path, folder: Path, arms: dict[str, list[str]], primary: tuple[str, ...] = ()
) -> Runner:
    given = study.Study(
        folder / "s.yaml", str(base), (), {"arms": arms, "references": {}, "tuning": {"slow": []}},
        {"arms": tuple(range(6)), "references": (0,), "tuning": (90, 91)}, (), primary, "equal", "equal",
        False,
    )  # fmt: skip
    return Runner(given, folder, PROGRAMS)


def test_the_table_by_hand(base, tmp_path):
    runner = made_up(base, tmp_path, {**ARMS, "late": ["balancer=Equal"]})
    assert report.write(runner) == []
    assert runner.study.shortfall == (
        "With 6 seeds and 2 arms tested Holm's p cannot be below 0.062 for the first, so no claim "
        "can be made: wanted 7 seeds, or fewer arms under `primary`."
    )
    gains = [0.81, 0.9, 0.79, 0.7, 0.83, 0.8]
    for run in runner.study.runs():
        if run.arm == "late" and run.seed > 3:
            continue
        gain = gains[run.seed] if run.arm == "coba" else 1.0
        result(runner, run, [2.0 * gain, 1.0], [1.0, 1.0])
    paths = report.write(runner)
    found = json.loads(paths[0].read_text())
    equal, coba, late = (found["arms"][arm] for arm in ("equal", "coba", "late"))
    assert equal["G"] == pytest.approx(log(2) / 2)
    assert equal["G_last"] == pytest.approx(log(2) / 2 + log(2))
    assert (equal["macro"], equal["worst"], equal["spread"]) == pytest.approx((1.5, 2.0, 0.2))
    differences = np.log(gains) / 2
    assert coba["differences"] == pytest.approx(differences)
    assert coba["difference"] == pytest.approx(differences.mean())
    # Two arms are tested: `late` counts though it is not finished.
    assert (coba["p"], coba["p_holm"], coba["win_rate"]) == (2 / 64, 4 / 64, 0.5)
    assert coba["interval"] == pytest.approx(statistics.interval(differences), rel=0.02)  # ties
    assert coba["captured"] == pytest.approx(-differences.mean() / (log(2) / 2))
    assert coba["cost_of_equal"] == 1.1
    assert late["pairs"] == 4 and "p" not in late and late["difference"] == 0
    assert found["references"] is None and found["runs"] == {"finished": 18, "all": 20}
    table = paths[1].read_text()
    assert table.splitlines()[2].startswith("| coba | 6 | +0.2")
    assert "at most 4 pairs, which cannot give a p below 0.125: no claim" in table
    assert "18 of 20 runs" in table and "R = 1: no references yet" in table
    assert runner.study.shortfall in table
    assert "Tuning, seeds 90, 91: `slow` +0.3466 (validation)." in table


def test_holms_p_is_over_the_primary_arms(base, tmp_path):
    arms = {name: ["balancer=Equal"] for name in ("equal", "one", "two", "three")}
    for primary, factor in ((), 3), (("two",), 1):
        runner = made_up(base, tmp_path, arms, primary)
        for run in runner.study.runs():
            gain = 1.0 if run.arm == "equal" else 0.9 + 0.01 * run.seed
            result(runner, run, [2.0 * gain, 1.0], [1.0, 1.0])
        found = report.comparison(runner)
        two = found["arms"]["two"]
        assert (two["p"], two["p_holm"]) == (2 / 64, factor * 2 / 64)
        assert ("p_holm" in found["arms"]["one"]) == (not primary)
        assert (runner.study.shortfall is None) == bool(primary)
    assert "p (Holm) is over `two`, which were named before" in report.markdown(found)
    headless = made_up(base, tmp_path, arms)
    headless = replace(headless, study=replace(headless.study, equal="one"))
    assert report.comparison(headless)["arms"]["two"]["captured"] is None, "no own best was read"
    assert [statistics.pairs_for(n) for n in (1, 2, 3, 4, 32)] == [6, 7, 7, 8, 11]


def test_an_arm_reads_anothers_result(base, tmp_path):
    runner = made_up(base, tmp_path, {"equal": ["balancer=Equal"]})
    run = runner.study.runs()[-1]
    given = 'evaluate.patience={from: "{results}/arms.equal.{seed}.json", action: drop}'
    filled = runner._filled(run, given)
    assert filled == f'evaluate.patience={{from: "{tmp_path}/results/arms.equal.5.json", action: drop}}'  # fmt: skip
    result(runner, run, [2.0, 1.0], [1.0, 1.0])
    assert cost.pilot_cost(load(base, [filled])) == 300
    assert cost.pilot_cost(load(base, ["evaluate.patience={from: runs/x, action: drop}"])) == 0
    assert best_steps(runner.path(run)) == {"a": 90, "b": 50}


def test_an_arm_has_the_mean_weights_of_another(base, tmp_path):
    arms = {"equal": ["balancer=Equal"], "coba": ["balancer=CoBa"]}
    arms |= {which: [f"balancer={{name: Static, weights: {{{which}:coba}}}}"] for which in ("mean", "moved")}  # fmt: skip
    runner = made_up(base, tmp_path, arms)
    coba, mean, moved = runner.study.runs()[-3:]
    with pytest.raises(study.StudyError, match=r"coba\.5\.json, wanted the finished run"):
        runner._filled(mean, mean.overrides[0])
    result(runner, coba, [2.0, 1.0], [1.0, 1.0])
    recorded = runner.result(coba)["weights"]
    filled = [load(base, [runner._filled(run, run.overrides[0])]) for run in (mean, moved)]
    given = [each.balancer.model_extra["weights"] for each in filled]
    assert recorded == {"a": 0.75, "b": 0.25}
    assert given == [recorded, {"a": 0.25, "b": 0.75}]


def test_references_are_those_of_the_better_validation_loss(base, tmp_path):
    runner = made_up(base, tmp_path, {"equal": ["balancer=Equal"]})
    for run in runner.study.runs():
        result(runner, run, [2.0, 1.0], [1.0, 1.0])
    alone = {
        f"{task}.{arm}": {0: {"tasks": [task], "validation": {task: [9.0, valid]}, "test": {"best": {task: test}}}}
        for task, arm, valid, test in (("a", "x", 0.5, 4.0), ("a", "y", 0.6, 1.0), ("b", "x", 1, 0.5))
    }  # fmt: skip
    assert report._references((0,), alone) == {"a": 4.0, "b": 0.5}
    assert report._references((0, 1), alone) == {}, "not before every seed is finished"
    assert report._score({"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 0.5}) == pytest.approx(0)


def test_a_result_of_other_settings_is_refused(base, tmp_path):
    runner = made_up(base, tmp_path, {"equal": ["balancer=Equal"]})
    run = runner.study.runs()[-1]
    result(runner, run, [2.0, 1.0], [1.0, 1.0])
    assert runner.result(run)["cost"] == 300
    other = made_up(base, tmp_path, {"equal": ["balancer=Equal", "optimizer.lr=1e-5"]})
    with pytest.raises(study.StudyError, match="the result of other settings than"):
        other.result(other.study.runs()[-1])


def test_the_page_is_what_the_recorded_results_say(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    page = tmp_path / "evidence.md"
    page.write_text(Path("docs/evidence.md").read_text())
    for path in sorted(Path("benchmarks/evidence").glob("*.yaml")):
        recorded = Runner(study.read(path), path.with_suffix(""), PROGRAMS)
        found = report.comparison(recorded)
        if path.stem != "m0" and not found["arms"]:  # not run yet
            continue
        report.insert(page, path.stem, report.markdown(found))
    assert page.read_text() == Path("docs/evidence.md").read_text()
    with pytest.raises(study.StudyError, match="found no line '<!-- m9: written by"):
        report.insert(page, "m9", "")


# ---------------------------------------------------------------------------------------------------------- toy runs


def test_a_study_is_killed_and_goes_on(base, tmp_path, monkeypatch):
    changes = {
        "seeds": 1, "explore": True, "set": ["train.steps=6", "evaluate.every=3", "objective=outside:causal_lm"],
        "arms": {"equal": ["balancer=Equal", "average={decay: 0.5}"]},
    }  # fmt: skip
    given = study.read(written(base, tmp_path, **changes), ["outside"])
    misfortune = ["kill step 4 0"]  # once

    def start(self, folder, program, *arguments):
        """Train in a process that forks, read the test rows in this one."""
        folder.mkdir(parents=True, exist_ok=True)
        said, trainer = [str(one) for one in arguments], {}
        if program == "evaluate":
            monkeypatch.setattr(sys, "argv", ["evaluate.py", *said])
            assert process.exit_code(runpy.run_path(str(PROGRAMS / "evaluate.py"))["main"]) == 0
            return
        overrides = [said[i + 1] for i, one in enumerate(said) if one == "--set"]
        if misfortune:
            trainer["MISFORTUNE"] = misfortune.pop()
        ended = runs.train(base, *overrides, resume=True, **trainer)
        if any(ended.codes):
            raise study.StudyError(f"{program}.py ended with exit code {ended.codes[0]}")

    monkeypatch.setattr(Runner, "_start", start)
    said: list[str] = []
    runner = Runner(given, tmp_path / "out", PROGRAMS)
    first = given.runs()[:1]
    (problem,) = perform(runner, first, said.append)
    assert "arms/equal/seed-0: train.py ended with exit code -9" in problem
    assert runner.result(first[0]) is None and (tmp_path / "out/arms/equal/seed-0").is_dir()
    assert perform(runner, first, said.append) == []
    whole = Runner(given, tmp_path / "whole", PROGRAMS)
    assert perform(whole, first, said.append) == []
    mine, theirs = (one.result(first[0]) for one in (runner, whole))
    # A commit between the two runs is not the study's doing.
    timeless = [{**one, "seconds": 0, "git": None} for one in (mine, theirs)]
    assert timeless[0] == timeless[1], "as if nothing had happened"
    assert not (tmp_path / "out/arms/equal/seed-0").exists(), "a finished run's folder goes"
    assert mine["steps"]["last"] == 6 and mine["cost"] == 6 * 6 * 3
    assert mine["test"]["best"].keys() == set(TASKS)
    assert not any((tmp_path / "out").glob("results/*.tmp"))
    # Test rows are the validation rows here: what the run's own passes found.
    own = {task: min(mine["validation"][task]) for task in TASKS}
    assert mine["test"]["own"] == pytest.approx(own, rel=1e-4)
    said.clear()
    assert perform(runner, first, said.append) == [] and said == [], "nothing is run twice"
