"""Losses of model folders: those of the training run's own pass, whatever the world, on either split."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import runs
import toys

from mtl import plugins, process
from mtl.compare import evaluation
from mtl.config import ConfigError
from mtl.distributed import comm
from mtl.models.errors import ModelError

PROGRAM = runs.ROOT / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    """The tasks, with test rows: a task's validation rows twice, so a mean is the same."""
    path = runs.write(tmp_path_factory.mktemp("evaluate"))
    for task in ("copy", "chat", "prose"):
        rows = (path.parent / f"{task}.validation.jsonl").read_text()
        (path.parent / f"{task}.test.jsonl").write_text(rows + rows)
    return path


def with_test_rows(yaml: Path) -> list[str]:
    return [
        f"tasks.{task}.test={yaml.parent}/{task}.test.jsonl" for task in ("copy", "chat", "prose")
    ]


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    code = process.exit_code(runpy.run_path(str(PROGRAM))["main"])
    return code, *capsys.readouterr()


def test_the_losses_are_those_of_the_runs_own_pass(yaml):
    output = yaml.parent / "run"
    runs.train(yaml, "train.steps=6", f"output={output}").well()
    config = plugins.read(str(yaml))
    evaluate = evaluation.evaluator(config, evaluation.rows(config, "validation"))
    passes = [line for line in runs.metrics(output) if "eval/macro" in line]
    for folder, line in (
        (yaml.parent / "model", passes[0]),
        (output / "checkpoints" / "step-00000006" / "model", passes[-1]),
    ):
        summary = evaluate(folder).summary(list(config.tasks))
        for name in ("copy", "chat", "prose"):
            assert summary[name] == pytest.approx(line[f"eval/{name}/loss"], rel=1e-5)
        assert summary["macro"] == pytest.approx(line["eval/macro"], rel=1e-5)


def test_rows_that_are_held_out_are_those_of_the_run(yaml):
    held, output = "tasks.copy.validation=25%", yaml.parent / "held"
    runs.train(yaml, "train.steps=1", held, f"output={output}").well()
    config = plugins.read(str(yaml), [held])
    data = evaluation.rows(config, "validation")
    summary = evaluation.evaluator(config, data)(yaml.parent / "model").summary(list(config.tasks))
    first = next(line for line in runs.metrics(output) if "eval/macro" in line)
    assert summary["copy"] == pytest.approx(first["eval/copy/loss"], rel=1e-5)
    assert 0 < len(data.tasks[0].validation) < 24


def test_halves_are_parts_of_the_whole(yaml):
    evaluate, names = evaluation.halves(str(yaml))
    config = plugins.read(str(yaml))
    whole = evaluation.evaluator(config, evaluation.rows(config, "validation"))
    one, two = evaluate(yaml.parent / "model"), whole(yaml.parent / "model")
    assert names == ["copy", "chat", "prose"] and one.sums.shape == (3, 2)
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert (one.tokens.sum(1) == two.tokens.sum(1)).all() and (one.tokens > 0).all()


def test_one_row_cannot_be_halved(yaml):
    (yaml.parent / "single.jsonl").write_text('{"text": "abc"}\n')
    config = plugins.read(str(yaml), [f"tasks.prose.validation={yaml.parent}/single.jsonl"])
    with pytest.raises(ConfigError, match="tasks.prose.validation: found one row"):
        evaluation.evaluator(config, evaluation.rows(config, "validation"), halves=True)


def test_program_writes_a_table_and_json(yaml, tmp_path, monkeypatch, capsys):
    model, sets = yaml.parent / "model", [x for t in with_test_rows(yaml) for x in ("--set", t)]
    toys.save(toys.tiny_llama(seed=3), tmp_path / "other")
    given = ["--config", yaml, model, tmp_path / "other", "--json", tmp_path / "x.json"]
    code, out, err = run(monkeypatch, capsys, *given, *sets, "--split", "test")
    assert code == 0, err
    head, first, second = out.strip().splitlines()[-3:]
    assert head.split()[-5:] == ["copy", "chat", "prose", "macro", "token"]
    assert first.startswith(str(model)) and second.startswith(str(tmp_path / "other"))
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["split"] == "test" and record["unit"] == "nats per target token"
    losses = record["models"][str(model)]["losses"]
    assert first.split()[1:4] == [f"{losses[name]:.4f}" for name in ("copy", "chat", "prose")]

    # Every row twice: the same means, twice the tokens.
    code, *_ = run(monkeypatch, capsys, "--config", yaml, model, "--json", tmp_path / "v.json")
    validation = json.loads((tmp_path / "v.json").read_text())["models"][str(model)]
    assert losses == pytest.approx(validation["losses"], rel=1e-5)
    tokens = record["models"][str(model)]["tokens"]
    assert tokens == {name: 2 * n for name, n in validation["tokens"].items()}


def test_without_test_rows_the_split_is_refused(yaml, monkeypatch, capsys):
    code, _, err = run(
        monkeypatch, capsys, "--config", yaml, yaml.parent / "model", "--split", "test"
    )
    assert code == 1
    assert "tasks.copy.test: found nothing, wanted rows to evaluate on" in err


def test_a_model_that_is_not_there_is_named(yaml, tmp_path, monkeypatch, capsys):
    """Not the YAML's own model, which has done nothing."""
    gone = tmp_path / "checkpoints" / "step-00000030"
    code, _, err = run(monkeypatch, capsys, "--config", yaml, gone)
    comm.leave()  # the program fails within its group, whose port others would meet
    assert code == 1 and f"error: {gone}: found no such folder and no such model on the hub" in err


def test_a_starting_model_that_is_not_there_is_named(monkeypatch):
    """Its name comes from the YAML, as text."""

    def gone(*_: object) -> None:
        raise ModelError("no such model")

    monkeypatch.setattr(evaluation, "_load", gone)
    with pytest.raises(ModelError, match="^mine/gone: found no such folder and no such model"):
        evaluation.opener(None, None)("mine/gone")


def test_two_processes_give_the_same(yaml, tmp_path):
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--standalone",
        str(PROGRAM), "--config", str(yaml), str(yaml.parent / "model"),
        "--json", str(tmp_path / "two.json"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **forks.ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config = plugins.read(str(yaml))
    evaluate = evaluation.evaluator(config, evaluation.rows(config, "validation"))
    alone = evaluate(yaml.parent / "model").summary(list(config.tasks))
    (found,) = json.loads((tmp_path / "two.json").read_text())["models"].values()
    assert found["losses"] == pytest.approx(alone, rel=1e-5)


def test_training_does_not_read_test_rows(yaml):
    """A test source that is not there hurts nobody but the evaluation."""
    output = yaml.parent / "unread"
    missing = "tasks.copy.test=/nowhere/test.jsonl"
    runs.train(yaml, "train.steps=2", missing, f"output={output}").well()
    config = plugins.read(str(yaml), [missing])
    with pytest.raises(ConfigError, match="tasks.chat.test: found nothing"):
        evaluation.rows(config, "test")
