"""The commands of a study of replicas, and small ones, of which one is killed and run to its end."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import forks
import pytest
import runs
from safetensors.torch import load_file

from mtl.compare import replicas
from mtl.config import load, parse

EXPERIMENT = ["--config", "x.yaml"]
PROGRAMS = runs.ROOT / "launch"
TEXT = """
model: {name: base}
tasks: {a: {train: x, validation: x, format: text}}
train: {steps: 5}
output: x
"""


def study(out: Path, text: str = TEXT, **changes: object) -> replicas.ReplicaStudy:
    given = dict(config=parse(text), experiment=EXPERIMENT, launcher=["deepspeed"], programs=PROGRAMS, out=out,
                 scheme="rotate", of=3, epochs="first", methods=["average", "ties"], split="test")  # fmt: skip
    return replicas.ReplicaStudy(**{**given, **changes})


def test_the_commands_in_order(tmp_path):
    commands = study(tmp_path).commands()
    for i in range(3):
        command = next(commands)
        assert command[:4] == ["deepspeed", str(PROGRAMS / "train.py"), *EXPERIMENT]
        order = f'{{"scheme": "rotate", "replica": {i}, "of": 3, "epochs": "first"}}'
        assert f"train.order={order}" in command and f"output={tmp_path}/replica-{i}" in command
        assert command[-1] == "--resume"
        parse(TEXT, overrides=[f"train.order={order}"])
    long = next(commands)
    assert {"train.steps=15", "checkpoint.keep=3", "checkpoint.every=100"} < set(long)
    with pytest.raises(ValueError, match="found 0 checkpoints, wanted 3"):
        next(commands)

    for step in (5, 10, 15, 20):
        (tmp_path / f"long/checkpoints/step-{step:08d}/model").mkdir(parents=True)
    (tmp_path / "merged-ties").mkdir()
    *_, average, tail, evaluate = study(tmp_path).commands()
    models = [f"{tmp_path}/replica-{i}/model" for i in range(3)]
    assert average[2:] == ["--base", "base", "--models", *models, "--method", "average",
                           "--out", f"{tmp_path}/merged-average"]  # fmt: skip
    last = [f"{tmp_path}/long/checkpoints/step-{s:08d}/model" for s in (10, 15, 20)]
    assert tail[5:8] == last and tail[-1] == f"{tmp_path}/tail"
    others = [
        f"{tmp_path}/{name}" for name in ("long/model", "merged-average", "merged-ties", "tail")
    ]
    assert evaluate[2:] == [*EXPERIMENT, *models, *others, "--split", "test",
                            "--json", f"{tmp_path}/losses.json"]  # fmt: skip


def test_epochs_are_multiplied_as_well(tmp_path):
    text = TEXT.replace("steps: 5", "epochs: 1.5")
    long = list(islice(study(tmp_path, text).commands(), 4))[3]
    assert "train.epochs=4.5" in long


def test_what_cannot_be_studied(tmp_path):
    with pytest.raises(ValueError, match="--of: found 1, wanted 2 or more"):
        study(tmp_path, of=1)
    with pytest.raises(ValueError, match="export.which: found none, wanted best"):
        study(tmp_path, TEXT + "export: {which: none}")


def test_a_command_that_fails_ends_the_study():
    with pytest.raises(ValueError, match="exit code 3: "):
        replicas.run(iter([["sh", "-c", "exit 3"], ["false"]]), lambda text: None)


def test_replicas_train_from_one_start_to_different_models(tmp_path):
    yaml = runs.write(tmp_path)
    made = study(tmp_path / "out", of=2, config=load(str(yaml)))
    for command in islice(made.commands(), 2):
        sets = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
        runs.train(yaml, *sets).well()
    first, second = (runs.untimed(output) for output in made.replicas)
    assert first[0] == second[0], "the same start, the same validation rows"
    tokens = [
        {k: v for k, v in line.items() if k.endswith("loss")} for line in (first[1], second[1])
    ]
    assert tokens[0] != tokens[1]
    one, other = (load_file(output / "model/model.safetensors") for output in made.replicas)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_that_was_killed_goes_on_to_its_end(tmp_path):
    """The long run dies at its step 9; the same command finishes the study from there."""
    yaml, out = runs.write(tmp_path), tmp_path / "out"
    command = [sys.executable, str(PROGRAMS / "replicas.py"), "--config", str(yaml), "--of", "2"]
    command += ["--out", str(out), "--methods", "average", "select", "--allow-code", "outside"]
    for each in ("train.steps=6", "checkpoint.every=3", "objective=outside:causal_lm"):
        command += ["--set", each]
    paths = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    environment = {**runs.without_a_launcher(), **forks.ENVIRONMENT, "PYTHONPATH": paths}

    def study(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, cwd=tmp_path
        )

    died = study(MISFORTUNE="kill step 9 0")
    assert died.returncode == 1 and "exit code -9: " in died.stderr, died.stderr
    assert (out / "long/checkpoints/latest").read_text() == "step-00000009"
    assert {path.name for path in out.iterdir()} == {"replica-0", "replica-1", "long"}
    ended = study()
    assert ended.returncode == 0, ended.stderr
    assert "resuming from" in ended.stderr
    models = json.loads((out / "losses.json").read_text())["models"]
    merged = ["merged-average", "merged-select"]
    names = ["replica-0/model", "replica-1/model", "long/model", *merged, "tail"]
    assert list(models) == [str(out / name) for name in names]
    tail = json.loads((out / "tail" / "merge.json").read_text())["models"]
    assert [Path(one).parent.name for one in tail] == ["step-00000009", "step-00000012"]

    found = json.loads((out / "imbalance.json").read_text())
    made = [str(out / name) for name in (*merged, "tail", "long/model")]
    assert list(found) == ["replicas", "by chance", *made]
    # Two replicas of a rotation, each centred by their mean: what is high in one is low in the other.
    curve = found["replicas"]["curve"]
    assert len(curve) == 8 and curve[:4] == pytest.approx([-x for x in curve[4:]], abs=1e-9)
    assert found["replicas"]["interval"][0] <= found["replicas"]["interval"][1]
    assert "spearman" in ended.stdout and "by chance" in ended.stdout
