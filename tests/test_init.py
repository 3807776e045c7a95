"""`mtl init`: a YAML to begin with from the data files, which the program itself accepts."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import runs

from mtl import plugins
from mtl.check import starter
from mtl.config import load, parse

ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    },
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "chat_rounds": {
        "chat_rounds": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]
    },
}


def write(path: Path, row: dict, count: int = 3) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text((json.dumps(row) + "\n") * count)
    return path


def init(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["init.py", *map(str, arguments)])
    runpy.run_path(str(runs.ROOT / "launch" / "init.py"))["main"]()


@pytest.mark.parametrize("form", ROWS)
def test_formats_are_recognised(form, tmp_path):
    assert starter.recognise(str(write(tmp_path / "x.jsonl", ROWS[form]))) == form


@pytest.mark.parametrize(
    "file, task, side",
    [
        ("data/code.train.jsonl", "code", "train"),
        ("code_val.json.gz", "code", "validation"),
        ("en-fr.test.parquet", "en-fr", "test"),
        ("code/train-00000-of-00002.parquet", "code", "train"),
        ("valid.code.jsonl", "code", "validation"),
        ("training_notes.jsonl", "notes", "train"),
        ("code.jsonl", "code", ""),
        ("data/code.train.csv", "code", "train"),
        ("code_dev.tsv.gz", "code", "validation"),
        ("naïve task.jsonl", "na_ve_task", ""),
    ],
)
def test_tasks_are_named_by_files(file, task, side):
    assert starter.name(file) == (task, side)


def test_the_yaml_is_one_that_the_program_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("data/code.train.jsonl"), ROWS["prompt_completion"])
    write(Path("data/code.valid.jsonl"), ROWS["prompt_completion"])
    write(Path("data/chat.jsonl"), ROWS["messages"])
    write(Path("data/chat.dev.jsonl"), ROWS["messages"])
    init(
        monkeypatch,
        "data/code.train.jsonl",
        "data/chat.jsonl",
        "data/chat.dev.jsonl",
        "--out",
        "x.yaml",
    )
    config = load("x.yaml")
    found = {
        name: (list(task.train), list(task.validation), task.format.name)
        for name, task in config.tasks.items()
    }
    assert found == {
        "code": (["data/code.train.jsonl"], ["data/code.valid.jsonl"], "prompt_completion"),
        "chat": (["data/chat.jsonl"], ["data/chat.dev.jsonl"], "messages"),
    }
    assert "mtl check --config x.yaml" in capsys.readouterr().out
    before = Path("x.yaml").read_text()
    with pytest.raises(ValueError, match="x.yaml: found a file, wanted a new name"):
        init(monkeypatch, "data/code.train.jsonl", "--out", "x.yaml")
    assert Path("x.yaml").read_text() == before
    init(monkeypatch, "data/code.train.jsonl", "data/chat.jsonl", "--out", "new/folder/x.yaml")
    assert Path("new/folder/x.yaml").read_text() == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        init(monkeypatch, "data/code.train.jsonl", "--out", ".")
    assert "--out: found ., a folder, wanted a file's name" in capsys.readouterr().err
    init(monkeypatch, "data/code.train.jsonl", "data/chat.jsonl")
    assert capsys.readouterr().out == before


def test_a_test_file_is_for_reports_and_chooses_nothing(tmp_path):
    files = [write(tmp_path / f"code.{side}.jsonl", ROWS["text"]) for side in ("train", "test")]
    (task,) = parse(starter.starter([str(file) for file in files]), "x.yaml").tasks.values()
    assert (task.train, task.validation, task.test) == ((str(files[0]),), 0.05, (str(files[1]),))


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    odd = write(tmp_path / "odd.jsonl", {"question": "q"})
    lone = write(tmp_path / "lone.valid.jsonl", ROWS["text"])
    mixed = write(tmp_path / "mixed.train.jsonl", ROWS["text"])
    write(tmp_path / "mixed.valid.jsonl", ROWS["alpaca"])
    with pytest.raises(ValueError) as error:
        starter.starter([str(odd), str(lone), str(mixed)])
    first, second, third = str(error.value).splitlines()
    assert first.startswith(f"{odd}: found rows with the keys question, wanted one of the formats")
    assert second.startswith(f"{lone}: found no train file of the task lone")
    assert third.startswith("task mixed: ") and "wanted one format in a task" in third


def test_rows_are_held_out_where_no_file_has_validation_rows(tmp_path):
    lone = write(tmp_path / "lone.train.jsonl", ROWS["text"])
    (task,) = parse(starter.starter([str(lone)]), "x.yaml").tasks.values()
    assert (task.train, task.validation) == ((str(lone),), 0.05)


def test_rows_of_pairs_get_their_objective_and_what_is_left_to_choose_is_said(tmp_path):
    rows = {
        "pairs": {"prompt": "q", "chosen": " a", "rejected": " b"},
        "labels": {"text": "t", "label": "good"},
        "options": {"question": "q", "options": ["a", "b"], "answer": 0, "knowledge": [{"text": "k"}]},
        "plain": {"text": "t"},
    }
    files = [str(write(tmp_path / f"{name}.train.jsonl", row)) for name, row in rows.items()]
    text = starter.starter(files)
    (tmp_path / "x.yaml").write_text(text)
    tasks = plugins.read(str(tmp_path / "x.yaml")).tasks
    assert tasks["pairs"].objective.name == tasks["pairs"].format.name == "preference"
    assert all(tasks[name].objective is None for name in ("labels", "options", "plain"))
    assert "# labels: nothing reads its `label`. For a classifier: model.loader:" in text
    assert "# options: its rows are dropped unless model.loader and objective are kpe" in text
    assert text.count("\n# ") == 3 + 1 and "# plain" not in text
