"""launch/replay.py: the run's own balancer gives the run's own weights back, to the last bit; others what they give
on the recorded losses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded
import runs

from balancers import CoBa, Holder, Signals
from mtl.report import figures, record, replay

PROGRAM = str(runs.ROOT / "launch" / "replay.py")
TASKS = ["copy", "chat", "prose"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with CoBa, one with FAMO in a group and with a weight, one with Equal."""
    yaml = runs.write(tmp_path_factory.mktemp("runs"))
    base = ("train.steps=16", "evaluate.every=4", "evaluate.probe.every=2", "checkpoint.every=null")
    runs.train(
        yaml, *base, "balancer={name: CoBa, window: 4, warmup: 3}", "tasks.chat.loss_weight=2.0",
        f"output={yaml.parent / 'coba'}", world=2,
    ).well()  # fmt: skip
    grouped = ("tasks.copy.group=g", "tasks.chat.group=g")
    runs.train(yaml, *base, *grouped, "balancer=FAMO", f"output={yaml.parent / 'famo'}").well()
    runs.train(yaml, *base, "balancer=Equal", f"output={yaml.parent / 'equal'}").well()
    return yaml.parent


def call(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["coba", "famo", "equal"])
def test_a_runs_own_balancer_gives_its_own_weights(name, folder):
    run = record.read(folder / name)
    found = replay.replay(run, replay.asked(run, None, []))
    assert found.steps.tolist() == list(range(16)) and found.notes == []
    assert (found.weights == found.recorded).all()
    if name != "equal":
        assert np.ptp(found.weights, axis=0).min() > 0, "they move"


def test_other_settings_give_what_the_balancer_gives(folder):
    run = record.read(folder / "coba")
    given = replay.asked(run, "coba", ["--tau", "0.5", "--warmup=2"])
    assert given == {"name": "CoBa", "window": 4, "warmup": 2, "tau": 0.5}
    found = replay.replay(run, given)
    holder, expected = Holder(CoBa(window=4, warmup=2, tau=0.5), TASKS, [1, 2, 1]), []
    for line in run.steps:
        probe = {}
        if "probe/group" in line:
            probe = {"valid_group": int(line["probe/group"])}
            for what, where in (("valid_loss", "loss"), ("valid_base", "base")):
                probe[what] = [line[f"probe/{task}/{where}"] for task in TASKS]
        expected.append(holder.update(Signals(step=line["step"], **probe)).copy())
    assert (found.weights == np.array(expected)).all()
    assert (found.weights[4:] != found.recorded[4:]).any()


def test_losses_of_the_step_before_reach_methods_that_read_them(folder):
    """DWA weighs by the ratio of the losses of two steps before: equal at first, then not."""
    run = record.read(folder / "equal")
    found = replay.replay(run, replay.asked(run, "dwa", ["--period", "1"]))
    losses = run.column(run.steps, "train", "loss")
    ratio = losses[3] / losses[2]
    expected = np.exp(ratio / 2) / np.exp(ratio / 2).sum()
    assert found.weights[4] == pytest.approx(expected, rel=1e-12)
    assert found.recorded[4] == pytest.approx(np.full(3, 1 / 3))


def test_without_probes_full_passes_stand_in_and_it_is_said(folder):
    run = record.read(folder / "equal")
    found = replay.replay(run, {"name": "CoBa", "window": 3, "warmup": 1})
    assert len(found.notes) == 1 and "recorded no probes" in found.notes[0]
    holder, expected = Holder(CoBa(window=3, warmup=1), TASKS), []
    for t in range(16):
        valid = {}
        if t % 4 == 0:
            valid = {"valid_loss": run.losses[t // 4], "valid_base": run.losses[0]}
        expected.append(holder.update(Signals(step=t, **valid)).copy())
    assert (found.weights == np.array(expected)).all() and np.ptp(found.weights) > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--balancer", "GradNorm"], "GradNorm reads products of gradients"),
        (["--balancer", "famo"], "FAMO reads each batch's loss after its update"),
        (["--balancer", "cobra"], "--balancer: found cobra, wanted one of Apart"),
        (["--balancer", "coba", "--tua", "3"], "its keywords do not fit"),
        (["--balancer", "coba", "--tau"], "found '--tau', wanted --SETTING VALUE"),
        (["--balancer", "coba", "tau=3"], "found 'tau', wanted --SETTING VALUE"),
        (["--balancer", "coba", "--tau", "-1"], "CoBa tau: found -1, wanted a finite number > 0"),
    ],
)
def test_what_cannot_be_replayed_is_said(arguments, said, folder):
    ended = call(folder / "equal", *arguments)
    assert ended.returncode == 1 and said in ended.stderr, ended.stderr
    assert not (folder / "equal" / "replay.json").exists()


def test_the_program_needs_no_model_and_the_report_shows_it(folder, tmp_path):
    target = tmp_path / "replay.json"
    ended = call(folder / "coba", "--balancer", "coba", "--tau", "3", "--json", target)
    assert ended.returncode == 0, ended.stderr
    assert replay.CAVEAT in ended.stdout and f"written: {target}" in ended.stdout
    written = json.loads(target.read_text())
    run = record.read(folder / "coba")
    found = replay.replay(run, written["balancer"])
    assert written["balancer"]["tau"] == 3 and written["about"] == replay.CAVEAT
    assert np.array(written["weights"]).tolist() == found.weights.tolist()
    mean = [part.mean() for part in np.array_split(found.weights[:, 0], 5)]
    (row,) = [line for line in ended.stdout.splitlines() if "replayed" in line][:1]
    assert row.split()[1:] == [f"{m:.3f}" for m in mean]
    (shown,) = [one for one in figures.of_run(run, replayed=written) if one.id == "replayed"]
    assert shown.series[0].y == pytest.approx(found.weights[:, 0].tolist(), rel=1e-5)


def test_nothing_heavy_is_imported(tmp_path):
    run = recorded.write(tmp_path / "run")
    code = (
        f"import runpy, sys\nsys.argv = ['replay.py', {str(run)!r}]\n"
        f"runpy.run_path({PROGRAM!r})['main']()\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]", found.stderr
    assert (run / "replay.json").is_file()
