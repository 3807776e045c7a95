"""What a run keeps beside its checkpoints: every task's best model, and the average of its weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from mtl.losses.objective import Measure, ratio
from mtl.output import bests, manifest
from mtl.output.report import read
from mtl.output.state import RunState
from mtl.train.loop import _judge

OURS = "objective=outside:causal_lm"
# Every task is at its best in another step: copy and prose at 5, chat at 8.
DIVERGING = ["optimizer.lr=0.1", "schedule.warmup=12", "evaluate.every=1", "balancer=Equal"]
EACH = ["checkpoint.bests=each", "checkpoint.every=5", *DIVERGING]
TASKS = ["copy", "chat", "prose"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("kept"))


def state_of(output: Path) -> dict:
    newest = (output / "checkpoints" / "latest").read_text()
    return json.loads((output / "checkpoints" / newest / "state.json").read_text())["run"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def each(yaml) -> Path:
    """Every checkpoint is kept, to compare with."""
    output = yaml.parent / "each"
    more = ["checkpoint.every=2", "checkpoint.keep=9"]
    runs.train(yaml, OURS, *EACH, *more, f"output={output}").well()
    return output


def test_every_task_has_its_best_model(each):
    found, single = state_of(each)["bests"], state_of(each)["single"]
    losses = {
        line["step"]: [line[f"eval/{name}/loss"] for name in TASKS]
        for line in runs.metrics(each)
        if "eval/macro" in line
    }
    steps = list(losses)
    for k, name in enumerate(TASKS):
        best = steps[int(np.argmin([losses[s][k] for s in steps]))]
        assert found[name] == {"step": best, "value": losses[best][k]}
    macro = [float(np.mean(losses[s])) for s in steps]
    assert single == {"step": steps[int(np.argmin(macro))], "value": pytest.approx(min(macro))}
    each_best = [*found.values(), single]
    named = {f"step-{best['step']:08d}" for best in each_best if best["step"]}
    assert {path.name for path in (each / "bests").iterdir()} == named
    assert len(named) > 1, found
    for name in named:
        assert_equal(weights(each / "bests" / name), weights(each / "checkpoints" / name / "model"))


@pytest.mark.parametrize("where", ["best", "step"])
def test_killed_and_resumed_the_bests_are_the_same(yaml, each, where):
    """While a best model is written, and after it: nothing half is named, nothing named is lost."""
    output, at_once = yaml.parent / f"killed {where}", yaml.parent / "at once"
    if not at_once.exists():
        runs.train(yaml, OURS, *EACH, f"output={at_once}").well()
    step = min(best["step"] for best in state_of(each)["bests"].values()) if where == "best" else 9
    died = runs.train(yaml, OURS, *EACH, f"output={output}", MISFORTUNE=f"kill {where} {step} 0")
    assert died.codes == [-9]
    left = {path.name for path in (output / "bests").iterdir()}
    if where == "best":
        assert f".step-{step:08d}.tmp" in left and f"step-{step:08d}" not in left
    elif (output / "checkpoints" / "latest").exists():
        assert {
            f"step-{best['step']:08d}" for best in state_of(output)["bests"].values() if best["step"]
        } <= left  # fmt: skip
    runs.train(yaml, OURS, *EACH, f"output={output}", resume=True).well()
    assert runs.contents(output / "bests") == runs.contents(at_once / "bests")
    assert state_of(output)["bests"] == state_of(at_once)["bests"]


def test_gone_back_to_a_step_whose_best_was_replaced_since(yaml, each):
    """At step 4 chat is at its best; step 8 has taken its place. Going on from 4 finds 8 again."""
    output = yaml.parent / "back"
    shutil.copytree(each, output)
    then = json.loads((each / "checkpoints" / "step-00000004" / "state.json").read_text())
    lost = f"step-{then['run']['bests']['chat']['step']:08d}"
    assert not (each / "bests" / lost).exists()
    more = ["checkpoint.every=2", "checkpoint.keep=9", f"output={output}"]
    ended = runs.train(yaml, OURS, *EACH, *more, resume=4).well()
    assert f"bests/{lost}, a task's best model so far, is gone" in ended.err
    assert state_of(output)["bests"] == state_of(each)["bests"]
    assert runs.contents(output / "bests") == runs.contents(each / "bests")


def test_gone_back_and_killed_what_the_newest_checkpoint_names_is_there(yaml, each):
    """From 6 on chat has a best at 7, which `latest`, of step 12, does not know."""
    output = yaml.parent / "back and killed"
    shutil.copytree(each, output)
    named = {path.name for path in (each / "bests").iterdir()}
    more = [OURS, *EACH, "checkpoint.every=2", "checkpoint.keep=9", f"output={output}"]
    died = runs.train(yaml, *more, resume=6, MISFORTUNE="kill step 7 0")
    assert died.codes == [-9] and "step-00000012" == (output / "checkpoints/latest").read_text()
    assert (output / "bests" / "step-00000007").is_dir()
    assert named <= {path.name for path in (output / "bests").iterdir()}
    assert "is gone" not in runs.train(yaml, *more, resume=True).well().err
    assert state_of(output)["bests"] == state_of(each)["bests"]


def test_with_lora_a_best_is_an_adapter(yaml):
    output = yaml.parent / "lora"
    runs.train(yaml, OURS, *EACH, "model.lora.r=4", "engine.zero=3", f"output={output}").well()
    folders = list((output / "bests").iterdir())
    assert folders and all((folder / "adapter_model.safetensors").is_file() for folder in folders)


def test_observe_and_named():
    state = RunState(step=0)
    assert bests.observe(state, ["a", "b"], np.array([2.0, 1.0])) == ["a", "b"]
    assert bests.named(state) == set(), "the model at the start is the base model"
    state.step = 4
    assert bests.observe(state, ["a", "b"], np.array([1.5, np.nan])) == ["a"]
    state.step = 8
    assert bests.observe(state, ["a", "b"], np.array([1.5, 0.5])) == ["b"]
    assert bests.named(state) == {"step-00000004", "step-00000008"}
    assert state.bests["a"] == {"step": 4, "value": 1.5}


def test_prune_removes_what_nothing_names(tmp_path):
    for name in ("step-00000004", "step-00000008", ".step-00000012.tmp"):
        manifest.mark(tmp_path / name, bests.BEST)
        manifest.seal(tmp_path / name)
    theirs = [tmp_path / "step-00000002", tmp_path / "step-00000004" / "notes.txt"]
    theirs[0].mkdir()
    theirs[1].write_text("mine")
    manifest.mark(tmp_path / "step-00000006", bests.BEST)
    bests.prune(tmp_path, ["step-00000008", "step-00000016"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000002", "step-00000004", "step-00000008"}, (
        "not ours, or ours and named"
    )
    assert all(path.exists() for path in theirs)


# A high constant rate: an average is better than any point of the way.
NOISY = ["optimizer={name: sgd, lr: 1.0}", "schedule.name=constant", "balancer=Equal"]
AVERAGE = "average={decay: 0.8, warmup: 3}"


@pytest.fixture(scope="module")
def averaged(yaml) -> Path:
    output = yaml.parent / "averaged"
    runs.train(yaml, OURS, *NOISY, AVERAGE, "export.which=average", f"output={output}").well()
    return output


def test_an_average_leaves_the_run_as_it_is(yaml, averaged):
    plain = yaml.parent / "plain"
    runs.train(yaml, OURS, *NOISY, f"output={plain}").well()
    lines = [
        {tag: x for tag, x in line.items() if not tag.startswith("eval/average")}
        for line in runs.untimed(averaged)
    ]
    assert lines == runs.untimed(plain)
    last = "checkpoints/step-00000012/model"
    assert_equal(weights(averaged / last), weights(plain / last))
    assert read(averaged).tasks == TASKS


def test_the_average_is_measured_and_exported(averaged):
    passes = [line for line in runs.metrics(averaged) if "eval/macro" in line]
    for line in passes:
        values = [line[f"eval/average/{name}/loss"] for name in TASKS]
        assert line["eval/average/macro"] == pytest.approx(np.mean(values), rel=1e-12)
    assert passes[0]["eval/average/macro"] == passes[0]["eval/macro"]
    assert passes[-1]["eval/average/macro"] != passes[-1]["eval/macro"]
    last = averaged / "checkpoints/step-00000012"
    assert_equal(weights(averaged / "model"), weights(last / "average"))
    stored = load_file(last / "average.safetensors")
    exported = weights(last / "average")
    for name, tensor in exported.items():
        assert torch.equal(stored[f"0.{name}"], tensor)
    card = (averaged / "model" / "README.md").read_text()
    assert "its weights averaged along the run" in card
    assert f"{passes[-1]['eval/average/copy/loss']:.4f}" in card


def test_an_average_may_be_the_best(yaml):
    output = yaml.parent / "best"
    ended = runs.train(
        yaml, OURS, *DIVERGING, "average.decay=0.7", "checkpoint.keep=1", f"output={output}"
    ).well()
    passes = [line for line in runs.metrics(output) if "eval/macro" in line]
    found = {
        (line["step"], kind): line[tag]
        for line in passes
        for kind, tag in (("model", "eval/macro"), ("average", "eval/average/macro"))
    }
    step, kind = min(found, key=found.get)
    best = state_of(output)["best"]
    assert (best["step"], best.get("weights", "model")) == (step, kind)
    folder = output / "checkpoints" / f"step-{step:08d}"
    assert_equal(weights(output / "model"), weights(folder / kind))
    assert kind == "average" and f"{folder.name}, averaged weights: " in ended.out


def test_measures_and_their_direction_judge_both_weight_sets():
    accuracy = Measure(ratio)
    run = SimpleNamespace(
        config=SimpleNamespace(
            evaluate=SimpleNamespace(best="a/accuracy"), checkpoint=SimpleNamespace(bests="each")
        ),
        measures={"accuracy": accuracy},
    )
    state = RunState(step=4)
    for step, model, average, best in (
        (4, 0.5, 0.7, {"step": 4, "value": 0.7, "weights": "average"}),
        (8, 0.6, 0.7, {"step": 4, "value": 0.7, "weights": "average"}),
        (12, 0.8, 0.8, {"step": 12, "value": 0.8}),
    ):
        state.step = step
        _judge(run, state, {"model": {"a/accuracy": model}, "average": {"a/accuracy": average}})
        assert state.best == best
        assert state.single == {"step": step, "value": model}
    with pytest.raises(ValueError, match="a/accuracy .evaluate.best. is nan"):
        _judge(run, state, {"model": {"a/accuracy": 0.1}, "average": {}})
