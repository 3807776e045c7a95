"""A step whose loss or gradient is not finite, at each stage: the run stops, passes over the batch, or goes back."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import toys
from safetensors.torch import load_file

from mtl.output import manifest
from mtl.report import record, replay

OURS = [
    "objective=outside:causal_lm",
    "checkpoint={every: 1, keep: 20}",
    "optimizer.lr=1e-2",
    "train.steps=6",
    "evaluate.probe.every=1",  # the balancer's state moves at each step
]
ROW, AT = 12, 3  # the row of `copy` that is poison, and the step whose batch has it
SKIP, BACK = (f"train.not_finite.action={action}" for action in ("skip", "back"))
SLOW = pytest.mark.slow
LAYOUTS = {
    "ZeRO 0": ["engine.zero=0"],
    "ZeRO 2": ["engine.zero=2"],
    "ZeRO 3": ["engine.zero=3"],
    "bf16, ZeRO 1": ["engine.zero=1", "model.precision=bf16"],
    "bf16, ZeRO 2": ["engine.zero=2", "model.precision=bf16"],
}


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    """A run of 6 steps, one of whose rows of `copy` is poison. It comes once, on one of the ranks."""
    path = runs.write(tmp_path_factory.mktemp("incidents"))
    rows = path.parent / "copy.train.jsonl"
    lines = rows.read_text().splitlines()
    lines[ROW - 1] = json.dumps({"prompt": f"{toys.UNUSED} =", "completion": " x"})
    rows.write_text("\n".join(lines) + "\n")
    return path


def train(yaml: Path, name: str, *settings: str, **more) -> tuple[Path, runs.Ended]:
    output = yaml.parent / name
    return output, runs.train(yaml, *OURS, *settings, f"output={output}", world=2, **more)


def skipped(yaml: Path, layout: str = "ZeRO 2", poison: str = "gradient"):
    """A run that passed over the batch with the row; its folder and how it ended."""
    return _skipped(yaml, layout, poison)


@functools.cache
def _skipped(yaml: Path, layout: str, poison: str) -> tuple[Path, runs.Ended]:
    output, ended = train(yaml, f"{layout} {poison}", *LAYOUTS[layout], SKIP, POISON=poison)
    return output, ended.well()


def passed(output: Path) -> list[int]:
    return [line["step"] for line in runs.metrics(output) if "train/passed_over" in line]


def state(output: Path, step: int) -> dict:
    return json.loads((output / f"checkpoints/step-{step:08d}/state.json").read_text())["run"]


def tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    """The model, the optimizer's state and the run's arrays in a checkpoint."""
    folder = output / f"checkpoints/step-{step:08d}"
    found = load_file(folder / "model/model.safetensors") | load_file(folder / "state.safetensors")
    for file in sorted((folder / "engine").glob("*.pt")):
        for name, each in walk(torch.load(file, weights_only=False)):
            found[f"{file.name} {name}"] = each
    return found


def walk(value, at=""):
    if isinstance(value, torch.Tensor):
        yield at, value
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(each, f"{at}.{key}")


def assert_same(one: Path, other: Path, steps: tuple[int, int] = (6, 6)) -> None:
    left, right = (tensors(output, step) for output, step in zip((one, other), steps, strict=True))
    assert left.keys() == right.keys() and any("exp_avg" in name for name in left), left.keys()
    for name, each in left.items():
        torch.testing.assert_close(each, right[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("poison", ["gradient", "loss"])
@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=[SLOW] * (one == "bf16, ZeRO 2")) for one in LAYOUTS]
)
def test_a_batch_that_is_skipped_leaves_no_trace(yaml, layout, poison):
    settings, name = LAYOUTS[layout], f"{layout} {poison}"
    output, ended = skipped(yaml, layout, poison)
    assert passed(output) == [AT] == state(output, 6)["passed"]
    assert_same(output, output, (AT, AT + 1))  # model, optimizer, balancer
    what = "the loss of copy (inf) is not finite" if poison == "loss" else "the gradient norm is "
    assert f"step {AT}/6  {what}" in ended.err and "(1 of at most 10)" in ended.err
    assert f"copy.train.jsonl:{ROW}" in ended.err.partition("  rows of copy: ")[2].splitlines()[0]
    assert ("  rows of chat: " in ended.err) == (poison == "gradient")
    if poison == "loss":
        assert_same(output, skipped(yaml, layout)[0])
        return

    # The same as a run that knows of the batch and does not look at it.
    known = shutil.copytree(output, yaml.parent / f"{name} known")
    record = known / f"checkpoints/step-{AT - 1:08d}/state.json"
    content = json.loads(record.read_text())
    content["run"]["passed"] = [AT]
    record.write_text(json.dumps(content))
    manifest.seal(record.parent)
    train(yaml, known.name, *settings, resume=AT - 1)[1].well()
    assert_same(output, known)
    assert runs.untimed(output) == runs.untimed(known)


def test_a_run_that_skipped_goes_on_after_a_kill(yaml):
    whole, killed = skipped(yaml)[0], yaml.parent / "killed"
    settings = [SKIP, "checkpoint.every=2"]
    _, died = train(yaml, "killed", *settings, POISON="gradient", MISFORTUNE="kill step 5 1")
    assert -9 in died.codes and passed(killed) == [AT]
    train(yaml, "killed", *settings, POISON="gradient", resume=True)[1].well()
    assert_same(whole, killed)
    assert runs.untimed(whole) == runs.untimed(killed)


def test_a_run_goes_back_to_its_checkpoint(yaml):
    """It takes step 2 once more, and then is the run that skipped."""
    back, ended = train(yaml, "back", BACK, "checkpoint.every=2", POISON="gradient")
    told = f"back to {back}/checkpoints/step-00000002, to pass over this batch (1 of at most 10)"
    assert ended.well().err.count(told) == 1
    assert_same(skipped(yaml)[0], back)
    assert runs.untimed(skipped(yaml)[0]) == runs.untimed(back) and state(back, 6)["passed"] == [AT]


def test_a_run_killed_after_it_went_back_does_not_meet_the_batch_again(yaml):
    """No checkpoint knows of the batch yet: the next save is where the run dies."""
    settings = [BACK, "checkpoint.every=2"]
    strange = {"POISON": "gradient", "MISFORTUNE": "kill shards 4 0"}
    back, died = train(yaml, "back, killed", *settings, **strange)
    assert -9 in died.codes and died.err.count("back to ") == 1
    assert (back / "checkpoints/latest").read_text() == "step-00000002"
    noted = back / "passed.json"
    for torn in ("", "[3]", '{"passed over": ["3"]}'):
        whole = noted.read_text()
        noted.write_text(torn)
        _, refused = train(yaml, "back, killed", *settings, resume=True)
        assert refused.codes == [1, 1] and f"{noted}: is damaged (" in refused.err
        noted.write_text(whole)
    _, ended = train(yaml, "back, killed", *settings, resume=True, POISON="gradient")
    assert "back to " not in ended.well().err
    assert f"the batches of steps {AT} are passed over: the run went back for them" in ended.err
    assert_same(skipped(yaml)[0], back)
    assert runs.untimed(skipped(yaml)[0]) == runs.untimed(back) and state(back, 6)["passed"] == [AT]


def test_a_run_resumed_at_a_step_goes_back_to_that_step(yaml):
    """Until the first save `latest` names a checkpoint of the run that was left behind."""
    back = shutil.copytree(skipped(yaml)[0], yaml.parent / "left behind")
    assert (back / "checkpoints/latest").read_text() == "step-00000006"
    settings = [BACK, "checkpoint.every=6"]
    _, ended = train(yaml, back.name, *settings, POISON="gradient", resume=2)
    assert ended.well().err.count(f"back to {back}/checkpoints/step-00000002, to pass over") == 1
    assert_same(skipped(yaml)[0], back)
    assert runs.untimed(skipped(yaml)[0]) == runs.untimed(back)


RUIN = {"MISFORTUNE": "ruin step 4 all"}  # nan in place of the weights, in memory


def test_going_back_mends_weights_that_were_harmed_in_memory(yaml):
    output, ended = train(yaml, "mended", "checkpoint.every=2", BACK, **RUIN)
    assert passed(ended.well() and output) == [4] and "checkpoints/step-00000004, to" in ended.err
    found = load_file(output / "model/model.safetensors").values()
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("zero", [0, 2])
def test_weights_that_are_not_finite_are_not_saved(yaml, zero):
    """Passing over batches does not mend them."""
    settings = [f"engine.zero={zero}", SKIP, "balancer=Equal"]  # which reads no probe
    output, ended = train(yaml, f"lost {zero}", *settings, **RUIN)
    assert ended.codes == [1, 1] and "step 5: weights that are not finite: " in ended.err
    assert (output / "checkpoints/latest").read_text() == "step-00000004"
    assert not (output / "checkpoints/step-00000005").exists()


def test_a_run_passes_over_so_many_batches_and_no_more(yaml):
    settings = [SKIP, "train.not_finite.most=1", "checkpoint.every=6", "balancer=Equal"]
    output, ended = train(yaml, "most", *settings, **RUIN)
    assert ended.codes == [1, 1] and passed(output) == [4]
    assert "1 batches were passed over before (train.not_finite.most)" in ended.err


def test_a_probe_that_is_not_finite_blames_no_batch(yaml):
    """It is read before the batch is."""
    output, ended = train(yaml, "probe", SKIP, "checkpoint.every=6", **RUIN)
    told = "validation at step 5: the loss of copy (nan), chat (nan), prose (nan) is not finite"
    assert ended.codes == [1, 1] and told in ended.err
    assert passed(output) == [4], "the batch at which the weights were harmed, and no later one"
    assert ended.err.count("rows of copy: ") == 1


def test_a_validation_loss_that_is_not_finite_ends_the_run(yaml):
    """Whatever task judges the run: a loss of nan is not that of a task which is absent."""
    rows = yaml.parent / "poison.validation.jsonl"
    poison = {"prompt": f"{toys.UNUSED} =", "completion": " x"}
    toys.write_rows(rows, [*([{"prompt": "ab =", "completion": " ab"}] * 7), poison])
    settings = [f"tasks.copy.validation={rows}", "evaluate.best=chat"]
    output, ended = train(yaml, "nan", *settings, POISON="validation")
    assert ended.codes == [1, 1] and not (output / "checkpoints").exists()
    assert "validation at step 0: the loss of copy (nan) is not finite" in ended.err


def test_a_run_that_may_not_pass_over_a_batch_ends_with_its_rows(yaml):
    output, ended = train(yaml, "stopped", POISON="gradient")
    assert ended.codes == [1, 1] and "Traceback" not in ended.err
    assert f"error: step {AT}: the gradient norm is " in ended.err
    assert f"copy.train.jsonl:{ROW}" in ended.err.partition("  rows of copy: ")[2].splitlines()[0]
    assert not passed(output) and runs.metrics(output)[-1]["step"] == AT - 1
    # The policy may change when the run goes on.
    train(yaml, "stopped", SKIP, POISON="gradient", resume=True)[1].well()
    assert_same(output, skipped(yaml)[0])


def test_there_may_be_no_checkpoint_to_go_back_to(yaml):
    settings = [BACK, "checkpoint.every=null"]
    _, ended = train(yaml, "nothing", *settings, POISON="loss")
    assert ended.codes == [1, 1]
    assert "There is no checkpoint yet to go back to." in ended.err


def test_gradients_that_a_balancer_reads_may_not_be_finite(yaml):
    output, ended = train(yaml, "gram", "balancer=GradNorm", SKIP, POISON="gram")
    assert passed(ended.well() and output) == [AT]
    assert f"step {AT}/6  the gradient of copy is not finite: this batch" in ended.err
    assert_same(output, output, (AT, AT + 1))


def test_a_loss_that_leaps_is_a_warning_with_its_rows(yaml):
    """Also after a kill: the running median goes on where it was."""
    settings = ["train.spike=1.0005", "optimizer.lr=1e-6", "checkpoint.every=6", "train.steps=12"]
    output, died = train(yaml, "spike", *settings, MISFORTUNE="kill step 8 1")
    output, ended = train(yaml, "spike", *settings, resume=True)
    first = [each for each in leaps(died.err) if each[0] < 6]
    found, expected = first + leaps(ended.well().err), []
    lines = [line for line in runs.metrics(output) if "train/loss" in line]
    for task in ("copy", "chat", "prose"):
        losses = [line[f"train/{task}/loss"] for line in lines]
        medians = [np.median(losses[:t]) for t in range(5, 12)]
        above = zip(range(5, 12), losses[5:], medians, strict=True)
        expected += [(t, task) for t, loss, median in above if loss > 1.0005 * median]
    assert sorted(found) == sorted(expected) and 2 < len(found) < 21
    assert ended.err.count("  rows of ") == len(leaps(ended.err))


def leaps(err: str) -> list[tuple[int, str]]:
    found = re.findall(r"^step (\d+)/12  warning: the loss of (\w+) is ", err, re.M)
    return [(int(t), task) for t, task in found]


def test_a_replay_passes_over_the_same_batch(yaml):
    """The update after it knows the losses of the one before it."""
    run = record.read(skipped(yaml)[0])
    found = replay.replay(run, {"name": "DWA", "period": 1})
    losses = run.column(run.steps, "train", "loss")
    after = found.steps.tolist().index(AT + 1)
    assert found.steps[after - 1] == AT - 1
    ratio = np.exp(losses[after - 1] / losses[after - 2] / 2)
    assert found.weights[after] == pytest.approx(ratio / ratio.sum(), rel=1e-12)
    assert np.ptp(found.weights[after]) > 1e-4
