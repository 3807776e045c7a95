"""A run that is killed goes on from its newest complete checkpoint as if nothing had happened, bit for bit."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtl import process
from mtl.distributed.engine import _refuse
from mtl.output import manifest
from mtl.output.files import run_record, run_records
from mtl.train import schedule

OURS = "objective=outside:causal_lm"  # the usual one, from a module that can kill
LORA = ["model.lora.r=4", "model.lora.dropout=0.3"]
# The balancer's probe is not due at the step resumed from, and the checkpoint there is not that of an evaluation.
BETWEEN = ["checkpoint.every=5", "evaluate.every=4", "evaluate.probe.every=2"]
# It is due there, of group 1, and the full pass before has read it.
READ = ["evaluate.probe.every=2", "evaluate.probe.examples=1"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("resume"))


def newest(output: Path) -> Path:
    return output / "checkpoints" / (output / "checkpoints" / "latest").read_text()


def assert_same(one: Path, other: Path) -> None:
    """Two runs left the same numbers: every logged line, every tensor of the last checkpoint and the exported model."""
    assert runs.untimed(one) == runs.untimed(other)
    last = "checkpoints/step-00000012"
    averages = ["average.safetensors", "average/*.safetensors"] * (one / last / "average").is_dir()
    inside = [f"{last}/{x}" for x in ("model/*.safetensors", "state.safetensors", *averages)]
    for file in ("model/*.safetensors", *inside):
        tensors = [load_file(next(run.glob(file))) for run in (one, other)]
        assert tensors[0].keys() == tensors[1].keys() and tensors[0]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(
                tensor, tensors[1][name], rtol=0, atol=0, equal_nan=True, msg=f"{file}: {name}"
            )
    states = [json.loads((newest(run) / "state.json").read_text()) for run in (one, other)]
    for state in states:
        del state["run"]["metrics_bytes"]  # the text of times
    assert states[0] == states[1]


def assert_each_step_once(output: Path, steps: int = 12) -> None:
    lines = runs.metrics(output)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(steps))
    evaluated = [line["step"] for line in lines if "eval/macro" in line]
    assert len(set(evaluated)) == len(evaluated) and evaluated[0] == 0 and evaluated[-1] == steps


CASES = {
    "full, ZeRO 2": (2, ["engine.zero=2"], 6),
    "full, ZeRO 3": (2, ["engine.zero=3", *BETWEEN], 5),
    "LoRA, ZeRO 2": (2, ["engine.zero=2", *LORA, *BETWEEN], 5),
    "LoRA, ZeRO 3": (2, ["engine.zero=3", *LORA, *READ], 6),
    "bf16, ZeRO 2": (2, ["engine.zero=2", "model.precision=bf16", *READ], 6),
    "average, ZeRO 3": (2, ["engine.zero=3", "average.decay=0.9", *BETWEEN], 5),
    "average of the last, bf16, ZeRO 2": (
        2,
        ["engine.zero=2", "model.precision=bf16", "average.last=2", "checkpoint.bests=each"],
        6,
    ),
    "average, LoRA": (1, [*LORA, "engine.zero=1", "average.device=cpu", *BETWEEN], 5),
    "one process, ZeRO 0, weight decay": (1, ["engine.zero=0", "optimizer.weight_decay=0.1"], 6),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_the_middle_of_a_step(yaml, case):
    world, settings, resumed = CASES[case]
    settings = [OURS, *settings]
    at_once, killed = (yaml.parent / f"{case} {how}" for how in ("at once", "killed"))
    expected = (
        {"EXPECT_PARTITIONED": "1"} if "engine.zero=3" in settings and "LoRA" not in case else {}
    )
    runs.train(yaml, *settings, f"output={at_once}", world=world, **expected).well()
    assert_each_step_once(at_once)
    saved_after = next(
        line
        for line in runs.metrics(at_once)
        if line["step"] == resumed - 1 and "train/loss" in line
    )
    assert len({value for tag, value in saved_after.items() if tag.endswith("/weight")}) == 3, (
        "CoBa is past its warm-up"
    )

    died = runs.train(
        yaml, *settings, f"output={killed}", world=world, MISFORTUNE=f"kill step 7 {world - 1}"
    )
    # A rank that sees its peer's connection close may end by itself before it is killed.
    assert -9 in died.codes and all(died.codes) and len(died.codes) == world
    assert newest(killed).name == f"step-{resumed:08d}"
    assert (
        runs.metrics(killed)[-1]["step"] == 6
        and runs.untimed(killed) == runs.untimed(at_once)[: len(runs.metrics(killed))]
    )

    ended = runs.train(
        yaml, *settings, f"output={killed}", world=world, resume=True, **expected
    ).well()
    assert f"resuming from {newest(killed).parent / f'step-{resumed:08d}'}" in ended.err
    assert_each_step_once(killed)
    assert_same(at_once, killed)


@pytest.fixture(scope="module")
def whole(yaml) -> Path:
    """A run on one process with three checkpoints, of which one is kept beside the best."""
    output = yaml.parent / "whole"
    runs.train(yaml, OURS, *SAVING, f"output={output}").well()
    return output


SAVING = ["engine.zero=1", "checkpoint.every=4", "checkpoint.keep=1", "evaluate.every=100"]


@pytest.mark.parametrize("where", ["shards", "model", "pointer", "prune"])
def test_killed_while_saving(yaml, whole, where):
    """Half a checkpoint of step 8 lies there; only once `latest` has moved does the run go on from it."""
    output = yaml.parent / where
    assert runs.train(
        yaml, OURS, *SAVING, f"output={output}", MISFORTUNE=f"kill {where} 8 0"
    ).codes == [-9]
    left = {path.name for path in (output / "checkpoints").glob("step-*")}
    assert left == {"step-00000004", "step-00000008"}
    complete = 8 if where == "prune" else 4
    assert newest(output).name == f"step-{complete:08d}"
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", resume=True).well()
    assert f"step-{complete:08d}\n" in ended.err.partition("resuming from")[2]
    assert_each_step_once(output)
    assert_same(whole, output)
    assert {path.name for path in (output / "checkpoints").glob("step-*")} == {"step-00000012"}


def test_killed_while_saving_in_place_of_the_checkpoint_that_latest_names(yaml):
    """It is cleared first, and the run goes on from the one that --resume=STEP named."""
    output, settings = yaml.parent / "in place", [OURS, "checkpoint={every: 2, keep: 9}"]
    settings += ["train.steps=4", "evaluate.every=100"]
    runs.train(yaml, *settings, f"output={output}").well()
    before = runs.untimed(output)
    settings.append(f"output={output}")
    died = runs.train(yaml, *settings, resume=2, MISFORTUNE="kill shards 4 0")
    assert died.codes == [-9] and newest(output).name == "step-00000002"
    assert "step-00000002\n" in runs.train(yaml, *settings, resume=True).well().err
    assert runs.untimed(output) == before and newest(output).name == "step-00000004"
    # What the start from step 4 wrote down goes with the steps that are taken back.
    runs.train(yaml, *settings, "train.steps=6", resume=True)
    assert [*run_records(output)] == [0, 2, 4]
    runs.train(yaml, *settings, resume=2).well()
    assert [*run_records(output)] == [0, 2] and run_record(output).name.endswith("00000002.json")


def test_half_a_checkpoint_never_takes_a_complete_ones_place(yaml, whole):
    """It lies later than what the resumed run saves next, which must be kept, alone, and be loadable."""
    output = yaml.parent / "half"
    runs.train(yaml, OURS, *SAVING, f"output={output}", MISFORTUNE="kill model 8 0")
    sooner = [*SAVING, "checkpoint.every=6"]
    died = runs.train(
        yaml, OURS, *sooner, f"output={output}", resume=True, MISFORTUNE="kill step 7 0"
    )
    assert died.codes == [-9] and newest(output).name == "step-00000006"
    assert newest(output).is_dir()
    runs.train(yaml, OURS, *sooner, f"output={output}", resume=True).well()
    assert runs.untimed(output) == runs.untimed(whole)


def test_killed_before_any_checkpoint(yaml, whole):
    output = yaml.parent / "early"
    assert runs.train(
        yaml, OURS, *SAVING, f"output={output}", MISFORTUNE="kill step 2 0"
    ).codes == [-9]
    assert len(runs.metrics(output)) == 3 and not (output / "checkpoints").exists()
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", resume=True).well()
    assert f"--resume: no complete checkpoint in {output}; starting at step 0" in ended.err
    assert_same(whole, output)


def test_a_run_stopped_before_any_checkpoint_goes_on_as_itself_only(yaml):
    """A first start may have --resume already, as jobs that are queued again do."""
    output = yaml.parent / "queued"
    started = runs.train(
        yaml, OURS, *SAVING, f"output={output}", resume=True, MISFORTUNE="kill step 2 0"
    )
    assert started.codes == [-9] and (output / "run.json").is_file()
    before = runs.contents(output)
    other = runs.train(yaml, OURS, *SAVING, f"output={output}", "train.seed=7", resume=True)
    assert (
        other.codes == [1]
        and f"{output}/run.json cannot be continued: the run has changed." in other.err
    )
    after = runs.contents(output)
    assert {k: v for k, v in before.items() if k != "run.lock"} == after  # the dead run's lock


def test_a_shard_that_is_missing_ends_both_ranks(yaml, tmp_path):
    output = tmp_path / "run"
    runs.train(yaml, OURS, *SAVING, f"output={output}", "train.steps=4", world=2).well()
    (shard,) = (output / "checkpoints" / "step-00000004" / "engine").glob(
        "*zero_pp_rank_1_*_optim_states.pt"
    )
    shard.unlink()
    ended = runs.train(
        yaml, OURS, *SAVING, f"output={output}", "train.steps=4", world=2, resume=True
    )
    assert ended.codes == [1, 1]
    assert f"{shard}: is missing" in ended.err


def test_the_best_checkpoint_survives_a_kill(yaml):
    """It lies before the one resumed from, nothing later is better, and it is what is exported."""
    diverging = [
        "optimizer.lr=0.1",
        "schedule.warmup=12",
        "evaluate.every=2",
        "checkpoint.every=4",
        "checkpoint.keep=1",
        "balancer={name: Equal}",
    ]
    output = yaml.parent / "best"
    assert runs.train(
        yaml, OURS, *diverging, f"output={output}", MISFORTUNE="kill step 9 0"
    ).codes == [-9]
    ended = runs.train(yaml, OURS, *diverging, f"output={output}", resume=True).well()
    losses = {
        line["step"]: line["eval/macro"] for line in runs.metrics(output) if "eval/macro" in line
    }
    best = min(losses, key=losses.get)
    assert best == 6 and newest(output).name == "step-00000012", losses
    assert f"best model, of step-0000000{best}: " in ended.out
    kept = {path.name: path for path in (output / "checkpoints").glob("step-*")}
    assert kept.keys() == {"step-00000006", "step-00000012"}
    assert (output / "model/model.safetensors").read_bytes() == (
        kept["step-00000006"] / "model/model.safetensors"
    ).read_bytes()


def test_a_finished_run_is_exported_again_and_not_trained(yaml, whole):
    before = runs.contents(whole)
    ended = runs.train(
        yaml, OURS, *SAVING, f"output={whole}", "export.dtype=bf16", resume=True
    ).well()
    after = runs.contents(whole)
    told = "log.txt", "report.html"  # say that the run was resumed
    assert after["log.txt"].startswith(before["log.txt"])
    kept = {name for name in before if not name.startswith("model/") and name not in told}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() - before.keys() == {"run.resumed-00000012.json"}
    assert "macro mean" in ended.out
    assert AutoModelForCausalLM.from_pretrained(whole / "model").dtype == torch.bfloat16


def test_a_longer_run_with_a_constant_rate_is_the_long_run(yaml, tmp_path):
    constant = [OURS, "schedule={name: constant, warmup: 2}", "evaluate.every=4"]
    runs.train(yaml, *constant, f"output={tmp_path}/long").well()
    output = f"output={tmp_path}/grown"
    runs.train(yaml, *constant, "train.steps=8", output).well()
    ended = runs.train(yaml, *constant, output, resume=True).well()
    assert "step-00000008 is of a run of 8 steps, which now has 12: from here on" in ended.err
    assert_same(tmp_path / "long", tmp_path / "grown")
    shorter = runs.train(yaml, *constant, "train.steps=10", output, resume=True)
    assert shorter.codes == [1]
    assert "steps of the run: checkpoint 12, now 10" in shorter.err


def test_a_longer_run_follows_the_rate_of_its_new_length_from_where_it_goes_on(yaml, tmp_path):
    output = f"output={tmp_path}/run"
    runs.train(yaml, OURS, "train.steps=6", output).well()
    runs.train(yaml, OURS, output, resume=True).well()
    rates = [line["train/lr"] for line in runs.metrics(tmp_path / "run") if "train/lr" in line]
    cosine = [schedule.lr(t, peak=1e-3, steps=6 if t < 6 else 12) for t in range(12)]
    assert rates == pytest.approx(cosine, rel=1e-12, abs=1e-18)


class Foreign:
    """What a pickle may hold and DeepSpeed never writes."""


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_checkpoint_that_could_run_code_is_refused(tmp_path, kind):
    file = tmp_path / "mp_rank_00_model_states.pt"
    content = {"module": torch.zeros(1), "ds_version": Foreign()}
    torch.save(content, file) if kind == "torch" else file.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt: .*refused") as caught:
        _refuse(tmp_path, 0)
    assert kind == "pickle" or f"holds ['{Foreign.__module__}.Foreign']" in str(caught.value)


def test_a_checkpoint_that_could_run_code_ends_the_run(yaml, whole, tmp_path):
    """Before anything of it is loaded, on both ranks, whichever of them meets the file."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    torch.save(
        {"x": Foreign()}, newest(output) / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    manifest.seal(newest(output))
    before = runs.contents(output)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", resume=True)
    assert ended.codes == [1]
    assert (
        "test_resume.Foreign'], which DeepSpeed never writes and which could run code when loaded"
        in ended.err
    )
    after = runs.contents(output)
    assert {k: v for k, v in before.items() if k != "run.lock"} == after  # the dead run's lock


def test_deepspeed_launch_killed_and_resumed(yaml, tmp_path):
    """The same with the real launcher: a rank killed ends the launch, and one word more on the command line goes on."""
    deepspeed = ["deepspeed", "--num_gpus", "2", "--master_port", str(process.free_port())]
    at_once, killed = tmp_path / "at once", tmp_path / "killed"
    runs.train(yaml, OURS, *LORA, f"output={at_once}", world=2).well()
    died = runs.launch(
        deepspeed, yaml, OURS, *LORA, f"output={killed}", MISFORTUNE="kill model 12 1"
    )
    assert died.codes != [0] and newest(killed).name == "step-00000006"
    runs.launch(deepspeed, yaml, OURS, *LORA, f"output={killed}", resume=True).well()
    assert_each_step_once(killed)
    assert_same(at_once, killed)
