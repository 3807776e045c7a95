"""launch/choose.py: what a finished run has to choose from, and the best of it exported."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

from mtl import process
from mtl.compare import evaluation
from mtl.merging import sources
from mtl.merging.average import average
from mtl.merging.merge import merge
from mtl.merging.select import select
from mtl.output import report

PROGRAM = str(runs.ROOT / "launch" / "choose.py")
TASKS = ["copy", "chat", "prose"]
# Every task is at its best in another step (tests/test_kept.py).
SETS = [
    "optimizer.lr=0.1", "schedule.warmup=12", "evaluate.every=1", "balancer=Equal",
    "checkpoint={bests: each, keep: 1}", "average={decay: 0.5}", "batch.packing=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    path = runs.write(tmp_path_factory.mktemp("choice"))
    for task in TASKS:
        rows = (path.parent / f"{task}.validation.jsonl").read_text()
        (path.parent / f"{task}.test.jsonl").write_text(rows + rows)
    runs.train(path, *SETS).well()
    return path


def choose(monkeypatch, capsys, yaml: Path, *sets: str) -> tuple[int, str, str]:
    given = [part for one in (*SETS, *sets) for part in ("--set", one)]
    monkeypatch.setattr(sys, "argv", ["choose.py", "--config", str(yaml), *given])
    code = process.exit_code(runpy.run_path(PROGRAM)["main"])
    return code, *capsys.readouterr()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def passes(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in runs.metrics(run) if "eval/macro" in line}


def by_hand(run: Path, name: str, folder: Path) -> Path:
    """Where the model of a line is, the merges made once more."""
    if name.startswith("best single"):
        return run / "bests" / f"step-{int(name.rpartition(' ')[2]):08d}"
    if name.startswith("average, step"):
        return run / "checkpoints" / f"step-{int(name.rpartition(' ')[2]):08d}" / "average"
    method = {"average": average, "select": select}[name.partition(" ")[0]]
    base = str(run.parent / "model")
    merge(base, sources.bests(run), partial(method), folder, force=True)
    return folder


def test_the_best_is_exported_and_all_are_shown(yaml, tmp_path, monkeypatch, capsys):
    run = yaml.parent / "run"
    tests = [f"tasks.{task}.test={yaml.parent}/{task}.test.jsonl" for task in TASKS]
    code, out, err = choose(monkeypatch, capsys, yaml, *tests)
    assert code == 0, err
    record = json.loads((run / "choice.json").read_text())
    models, logged = record["models"], passes(run)
    single, averaged, *merges = models
    assert merges == ["average of task bests", "select of task bests"]
    step = min(logged, key=lambda s: logged[s]["eval/macro"])
    assert single == f"best single checkpoint, step {step}" and averaged.startswith("average, step")
    at = {single: "eval", averaged: "eval/average"}
    for name, group in at.items():
        line = logged[int(name.rpartition(" ")[2])]
        for rows in ("validation", "reported"):  # the test rows: those of validation twice
            for task in TASKS:
                found = models[name][rows][task]
                assert found == pytest.approx(line[f"{group}/{task}/loss"], rel=1e-4), (name, rows)
    figures = {name: one["validation"]["macro"] for name, one in models.items()}
    assert record["chosen"] == min(figures, key=figures.get) and record["rows"] == "test"
    model = by_hand(run, record["chosen"], tmp_path / "merged")
    exported = weights(run / "model")
    assert exported.keys() == weights(model).keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights(model).items())
    shown = out.splitlines()
    assert [line[2:].split("  ")[0] for line in shown[-6:-2]] == list(models)
    marked = [line for line in shown if line.startswith("* ")]
    assert len(marked) == 1 and f"{models[record['chosen']]['reported']['copy']:.3f}" in marked[0]
    assert shown[-2:] == [
        f"exported: {record['chosen']}: {run / 'model'}",
        f"report: {run / 'report.html'}",
    ]
    assert "average of task bests" in (run / "report.html").read_text()
    assert not list(run.glob(".choice.*"))


def test_without_test_rows_halves_choose_and_report(yaml, monkeypatch, capsys):
    run = yaml.parent / "run"
    code, out, err = choose(monkeypatch, capsys, yaml)
    assert code == 0, err
    record = json.loads((run / "choice.json").read_text())
    assert record["rows"] == "the half of validation that did not choose"
    chosen = {name: one["chosen by"] for name, one in record["models"].items()}
    assert record["chosen"] == min(chosen, key=chosen.get)
    for one in record["models"].values():
        whole, halves = one["validation"]["macro"], (one["chosen by"], one["reported"]["macro"])
        assert min(halves) != max(halves) and whole == pytest.approx(sum(halves) / 2, rel=0.3)
    history = report.read(run)
    assert history.choice == record and report.choice(record) in out
    assert history.averages.tolist() == [
        line["eval/average/macro"] for line in passes(run).values()
    ]


def test_losses_below_one_nat_keep_the_sign_of_their_logarithm(yaml, monkeypatch, capsys):
    """`log` may be below 0; the least is chosen, and shown as it is."""
    halved = evaluation.ValidationResult.summary

    def small(self, names):
        found = halved(self, names)
        return {**found, "log": found["log"] - 9}

    monkeypatch.setattr(evaluation.ValidationResult, "summary", small)
    assert choose(monkeypatch, capsys, yaml, "evaluate.best=log")[0] == 0
    record = json.loads((yaml.parent / "run/choice.json").read_text())
    chosen = {name: one["chosen by"] for name, one in record["models"].items()}
    assert max(chosen.values()) < 0 and record["chosen"] == min(chosen, key=chosen.get)


def test_the_figure_has_merges_and_average(yaml, tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    assert choose(monkeypatch, capsys, yaml)[0] == 0
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.figure({"run": report.read(yaml.parent / "run")}, tmp_path / "figure.png")
    labels = [line.get_label() for line in drawn[0].axes[-1].get_lines()]
    merges = ["average of task bests", "select of task bests"]
    assert labels == ["trained weights", "their average", *merges]


def test_a_run_without_bests_has_nothing_to_choose_from(yaml, monkeypatch, capsys):
    code, out, _ = choose(monkeypatch, capsys, yaml, "checkpoint.bests=null", "average=null")
    assert code == 0 and "nothing to choose from" in out


def test_an_unfinished_run_is_an_error(yaml, monkeypatch, capsys):
    code, _, err = choose(monkeypatch, capsys, yaml, f"output={yaml.parent}/none")
    assert code == 1 and "found no finished run" in err
