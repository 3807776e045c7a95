"""docs/extend.md: its files run as printed, and do what the page says."""

import csv
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import runs
import torch
import toys

import mtl
from mtl import process

PAGE = (runs.ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = {
    name: text
    for text, name in re.findall(r"```(?:python|yaml)\n(# ([\w/]+\.\w+)\n.*?)```", PAGE, re.DOTALL)
}
PARTS = ("format", "objective", "loader", "tracker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's files, a model and rows: the more a, the more stars."""
    root = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    toys.save(toys.tiny_llama(), root / "model")
    draw = random.Random(0)
    for task, most in (("books", 5), ("films", 10)):
        for side, rows in (("train", 48), ("valid", 64)):
            texts = ["".join(draw.choices("ab", k=10)) for _ in range(rows)]
            made = [{"review": each, "stars": each.count("a") * most / 10} for each in texts]
            if side == "train":
                made[7:8] = [{"review": "aaaa", "stars": most + 1}]
            lines = "".join(json.dumps(row) + "\n" for row in made)
            (root / f"{task}.{side}.jsonl").write_text(lines)
    return root


@pytest.fixture(scope="module")
def ended(folder):
    return runs.train(folder / "x.yaml", "cache=cache", world=2, allow=["mine"]).well()


def test_the_page_prints_every_file():
    assert list(FILES) == [*(f"mine/{part}.py" for part in PARTS), "x.yaml"]
    assert all(len(line) <= 100 for text in FILES.values() for line in text.splitlines())


def test_the_printed_files_train(folder, ended):
    lines = runs.metrics(folder / "runs/stars")
    passes = [line for line in lines if "eval/error" in line]
    assert [line["step"] for line in passes] == [0, 6, 12]
    assert passes[-1]["eval/error"] < passes[0]["eval/error"]
    assert passes[0]["eval/error"] == pytest.approx(
        (passes[0]["eval/books/error"] + passes[0]["eval/films/error"]) / 2
    )
    assert "stars: found 11, wanted a number up to 10" in ended.err


def test_the_tracker_has_the_numbers_of_the_log_and_resumes(folder, ended):
    path = folder / "runs/stars/validation.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    logged = {
        (line["step"], tag): value
        for line in runs.metrics(folder / "runs/stars")
        for tag, value in line.items()
        if tag.startswith("eval/")
    }
    assert {(int(r["step"]), r["tag"]): float(r["value"]) for r in rows} == logged
    name = {"__name__": "mine.tracker"}
    exec(FILES["mine/tracker.py"], name)
    name["Csv"](output=path.parent, steps=12, start=6)
    kept = list(csv.DictReader(path.read_text().splitlines()))
    assert kept == [row for row in rows if int(row["step"]) <= 6]


def test_what_it_exports_is_opened_by_its_class(folder, ended, monkeypatch):
    """And guesses as the run measured at its end."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(ValueError, match=r"mine\.loader:Scorer.*allow_code=\['mine'\]"):
        mtl.load("runs/stars/model")
    model = mtl.load("runs/stars/model", allow_code=["mine"])
    rows = [json.loads(line) for line in (folder / "books.valid.jsonl").read_text().splitlines()]
    ids = torch.tensor([toys.tokenizer()(row["review"])["input_ids"] for row in rows])
    guess = model(ids, torch.ones_like(ids)).tolist()
    off = [abs(one - row["stars"] / 5) for one, row in zip(guess, rows, strict=True)]
    passes = [line for line in runs.metrics(folder / "runs/stars") if "eval/error" in line]
    best = min(passes, key=lambda line: line["eval/error"])
    assert sum(off) / len(off) == pytest.approx(best["eval/books/error"], rel=1e-4)
    card = (folder / "runs/stars/model/README.md").read_text()
    assert "mtl.load(\".\", allow_code=['mine'])" in card and "pipeline_tag" not in card
    note = json.loads((folder / "runs/stars/model/loader.json").read_text())
    assert note == {"loader": "mine.loader:scorer", "keywords": {}, "class": "mine.loader:Scorer"}


def test_the_page_checks_too(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    arguments = ["--config", "x.yaml", "--set", "cache=cache", "--allow-code", "mine"]
    arguments += ["--set", "output=runs/other"]
    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    program = runpy.run_path(str(runs.ROOT / "launch" / "check.py"), run_name="check")
    code = process.exit_code(program["main"])
    out, err = capsys.readouterr()
    assert code == 0 and "nothing stands in the way of a run" in out, out + err
    assert "unknown: the model has no configuration" in out
    assert re.search(r"[ab]{10} -> 0\.\d\d", out), out
