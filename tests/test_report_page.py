"""The report as a file: what is read of a run, what a figure holds, what stands side by side. The browser's part is in
test_report_browser.py."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import recorded
import runs
from scipy import stats

from mtl import process
from mtl.compare import statistics
from mtl.output import checkpoint, manifest
from mtl.output.trackers import Console
from mtl.report import compare, figures, page, record, tracker


def figure(found: list[figures.Figure], id: str) -> figures.Figure:
    (one,) = [one for one in found if one.id == id]
    return one


def named(one: figures.Figure) -> dict[str, list]:
    return {series.name: series.y for series in one.series}


# What is read


def test_the_chosen_checkpoint_is_that_of_the_least_mean(tmp_path):
    found = record.read(recorded.write(tmp_path / "run"))
    macro = [np.mean([recorded.losses(k, t) for k in range(2)]) for t in range(0, 61, 10)]
    assert found.chosen == record.Chosen(30, pytest.approx(min(macro)), "macro")
    assert found.chosen_losses().tolist() == [recorded.losses(k, 30) for k in range(2)]
    assert compare.spread_of(found) == pytest.approx(np.std([20, 40]) / 60)


def change(run: Path, **evaluate: str) -> Path:
    about = json.loads((run / "run.json").read_text())
    about["config"]["evaluate"] |= evaluate
    (run / "run.json").write_text(json.dumps(about))
    return run


def test_it_is_judged_by_what_the_config_says(tmp_path):
    run = change(recorded.write(tmp_path / "run"), best="math")
    assert record.read(run).chosen == record.Chosen(40, recorded.losses(1, 40), "math")
    assert record.read(change(run, best="accuracy")).chosen is None, "only the run knows"
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    state = {"run": {"best": {"step": 10, "value": 0.75}}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert record.read(run).chosen == record.Chosen(10, 0.75, "accuracy")


def test_averaged_weights_may_have_been_chosen(tmp_path):
    run = recorded.write(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval/macro" in line and line["step"] == 50:
            line |= {"eval/average/macro": 0.5, "eval/average/code/loss": 0.25}
            line |= {"eval/average/math/loss": 0.75}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = record.read(run)
    assert found.chosen == record.Chosen(50, 0.5, "macro", "average")
    assert found.chosen_losses().tolist() == [0.25, 0.75]
    assert "chosen: 50, average" in figures.of_run(found)[0].lines[0]


def test_warnings_name_what_is_wrong(tmp_path):
    run = recorded.write(tmp_path / "run", until=45, git="abc-dirty")
    (run / "log.txt").write_text("packed\nwarning: versions differ\nWARNING balancers: window\n")
    (run / "run.resumed-00000020.json").write_text(
        json.dumps({"steps": 80, "versions": {"torch": "2.14"}})
    )
    assert record.read(run).warnings() == [
        "warning: versions differ",
        "WARNING balancers: window",
        "Not over: step 45 of 80.",
        "Resumed at step 20, with torch 2.13 -> 2.14",
        "The code had changes that no git revision holds.",
        "code: the last loss is 20 % above its best (step 20): it overfits",
    ]
    assert record.read(recorded.write(tmp_path / "short", until=20, steps=20)).warnings() == []


# Figures


def test_every_figure_of_a_run(tmp_path):
    found = figures.of_run(record.read(recorded.write(tmp_path / "run")))
    ids = [one.id for one in found]
    assert ids == [
        "loss", "weights", "explain-slope", "explain-rcs", "explain-df", "draws", "tokens", "speed", "memory",
    ]  # fmt: skip
    assert {one.span for one in found} == {(0, 60)} and {one.group for one in found} == {""}
    assert all(one.lines == [(30, "chosen: 30")] for one in found)
    loss = figure(found, "loss")
    assert loss.x == list(range(0, 61, 10)) and loss.marks == [(0, 2), (1, 4)]
    for k, task in enumerate(recorded.TASKS):
        ratios = [recorded.losses(k, t) / recorded.losses(k, 0) for t in loss.x]
        assert named(loss)[task] == pytest.approx(ratios, rel=1e-5)
    weights = figure(found, "weights")
    assert weights.kind == "area" and len(weights.x) == 60
    assert named(weights)["math"] == pytest.approx([2 / 3] * 60, rel=1e-5)
    draws = named(figure(found, "draws"))
    assert draws["code"][:4] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2], rel=1e-5)
    assert draws["math (planned)"] == [0.5] * 60
    assert named(figure(found, "tokens"))["math"] == [20 * (t + 1) for t in range(60)]
    assert named(figure(found, "speed"))["tokens per second"] == [100 + t for t in range(60)]
    assert named(figure(found, "memory")) == {"host": [1.5] * 7}
    assert named(figure(found, "explain-df")) == {"df": [0.5] * 60}
    assert named(figure(found, "explain-slope"))["math"] == [-0.02] * 60


def test_the_memory_of_a_device_is_a_curve_of_its_own(tmp_path):
    lines = (recorded.write(tmp_path / "run") / "metrics.jsonl").read_text()
    lines = lines.replace(
        '"memory/host_gib": 1.5', '"memory/host_gib": 1.5, "memory/device_gib": 3'
    )
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    memory = figure(figures.of_run(record.read(tmp_path / "run")), "memory")
    assert named(memory) == {"host": [1.5] * 7, "device": [3.0] * 7}


def test_a_long_run_is_thinned_to_means():
    x, values = np.arange(4000), np.arange(4000.0)[:, None]
    values = np.hstack([values, np.full_like(values, np.nan)])
    values[1, 0] = np.nan
    few, means = figures.thin(x, values)
    assert len(few) == len(means) == 1334 <= figures.MOST and few[:3] == [0, 3, 6]
    assert means[:3, 0].tolist() == [1.0, 4.0, 7.0] and means[-1, 0] == 3999
    assert np.isnan(means[:, 1]).all()


# Side by side


def test_runs_are_named_by_what_differs_and_seeds_go_together(tmp_path):
    many = [
        recorded.write(tmp_path / f"{n}/run", seed=seed, balancer=balancer, scale=scale)
        for n, (seed, balancer, scale) in enumerate(
            [(0, "Equal", 1.0), (1, "Equal", 1.0), (0, {"name": "CoBa", "tau": 3}, 0.5)]
        )
    ]
    (side,) = compare.sides(many)
    assert list(side.runs) == ["Equal, seed 0", "Equal, seed 1", "CoBa (tau 3), seed 0"]
    assert side.groups == {
        "Equal": ["Equal, seed 0", "Equal, seed 1"],
        "CoBa (tau 3), seed 0": ["CoBa (tau 3), seed 0"],
    }
    assert side.differences == {
        "balancer": ["Equal", "Equal", {"name": "CoBa", "tau": 3}],
        "train.seed": [0, 1, 0],
    }
    rows = {row["name"]: row["cells"] for row in compare.table(side)}
    assert list(rows) == ["code", "math", "macro", "worst task", "convergence spread"]
    code = [(recorded.losses(0, 30, seed) * scale) for seed, scale in ((0, 1), (1, 1), (0, 0.5))]
    assert [cell["loss"] for cell in rows["code"]] == pytest.approx(code)
    assert [cell["best"] for cell in rows["code"]] == [False, False, True]
    assert [cell["step"] for cell in rows["code"]] == [20, 20, 20]
    gap = recorded.losses(0, 30) / recorded.losses(0, 20) - 1
    assert rows["code"][0]["gap"] == pytest.approx(gap)
    assert rows["worst task"][0]["loss"] == recorded.losses(1, 30)
    seeds = {row["name"]: row["cells"] for row in compare.over_seeds(side)}
    values = [recorded.losses(0, 30, seed) for seed in (0, 1)]
    low, high = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    first, second = seeds["code"]
    assert first == {
        "mean": pytest.approx(np.mean(values)), "low": pytest.approx(low, rel=1e-5),
        "high": pytest.approx(high, rel=1e-5), "seeds": 2,
    }  # fmt: skip
    assert second["low"] is None and second["seeds"] == 1
    both = figures.overlaid(
        {name: [side.runs[one] for one in each] for name, each in side.groups.items()}, "code", "x"
    )
    band, alone = both.series
    assert band.name == "Equal (2 seeds)" and alone.low is None
    at = both.x.index(30)
    assert band.low[at] <= band.y[at] <= band.high[at] and band.low[at] < band.high[at]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_students_interval_is_scipys(n):
    x = np.random.default_rng(n).normal(size=n)
    theirs = stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))
    assert statistics.mean_interval(x) == pytest.approx(theirs, rel=1e-4)


def test_equal_settings_are_told_apart_by_their_folders(tmp_path):
    (side,) = compare.sides([recorded.write(tmp_path / name / "run") for name in ("a", "b")])
    assert list(side.runs) == ["a", "b"] and side.differences == {}
    assert "configurations do not differ" in page.page([side])


def test_runs_of_one_seed_are_not_seeds_of_each_other(tmp_path):
    again = [recorded.write(tmp_path / name / "run", seed=0) for name in ("a", "b")]
    (side,) = compare.sides([*again, recorded.write(tmp_path / "c" / "run", seed=1)])
    assert all(len(each) == 1 for each in side.groups.values()) and len(side.groups) == 3


def test_runs_of_unlike_tasks_stand_apart(tmp_path):
    one, two = (
        recorded.write(tmp_path / "one"),
        recorded.write(tmp_path / "two", tasks=("code", "law")),
    )
    text = page.page(compare.sides([one, two]))
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Tasks code, math", "one", "Tasks code, law", "two",
    ]  # fmt: skip
    assert "What differs" not in text


# The file


def test_the_file_is_whole_and_names_no_other(tmp_path):
    run = recorded.write(tmp_path / "run")
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    (run / "log.txt").write_text(f"warning: {hostile}\n")
    path = page.write([run])
    text = path.read_text()
    assert path == run / "report.html" and len(text) < 200_000
    licence = (page.resources.files("mtl.report") / "assets" / "uPlot.LICENSE").read_text()
    assert licence in text and hostile not in text and "&lt;img src=x" in text
    rest = text.replace("https://github.com/leeoniya/uPlot", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert not re.search(r"https?://|src=\"|<link|@import|url\((?!#)", rest)
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text)
    found = figures.of_run(record.read(run))
    assert json.loads(data) == json.loads(json.dumps([one.plain() for one in found]))
    assert Counter(re.findall(r'<figure id="(.*?)"', text)) == Counter(one.id for one in found)
    assert "torch" in text and "abc" in text and "seed: 0" in text


def test_a_missing_record_is_said(tmp_path):
    run = recorded.write(tmp_path / "run")
    (run / "run.json").unlink()
    text = page.page(compare.sides([run]))
    assert "No run.json: configuration, versions and revision are unknown." in text


def test_a_start_that_no_pass_betters_is_no_checkpoint(tmp_path):
    run = recorded.write(tmp_path / "run", until=0)
    (text,) = re.findall("chosen checkpoint.*?by macro([^<]*)", page.page(compare.sides([run])))
    assert text == ": no later pass was better, and the start has no checkpoint"
    whole = page.page(compare.sides([recorded.write(tmp_path / "whole")]))
    assert re.findall("chosen checkpoint.*?by macro([^<]*)", whole) == [""]


def test_a_damaged_replay_is_named(tmp_path):
    run = recorded.write(tmp_path / "run")
    (run / "replay.json").write_text('{"about": ')
    with pytest.raises(ValueError, match=f"{run}/replay.json: found no JSON .*Call that once more"):
        page.page(compare.sides([run]))


# While it runs


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_tracker_writes_at_every_nth_pass_and_at_the_end(tmp_path, monkeypatch, capsys):
    run, written = recorded.write(tmp_path / "run"), []
    monkeypatch.setattr(page, "write", lambda folders: written.append(step))
    one = tracker.PageTracker(run, steps=60, every=3)
    for line in lines_of(run):
        step = line["step"]
        one.log(step, line)
    assert written == [0, 20, 50], "the first pass, then every third"
    step = "end"
    one.close()
    assert written[-1] == "end" and capsys.readouterr().err == f"report: {run / 'report.html'}\n"


def test_without_a_number_it_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    run, written, now = recorded.write(tmp_path / "run"), [], [0.0]

    def write(folders):
        now[0] += 1.0  # it takes a second
        written.append(step)

    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr(tracker.time, "monotonic", lambda: now[0])
    one = tracker.PageTracker(run, steps=60)
    for step in range(0, 100, 5):
        now[0] += 30.0
        one.log(step, {"eval/macro": 1.0})
    assert written == [0, 20, 40, 60, 80]
    step = 100
    one.close()
    assert written[-1] == 100


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "two"])
def test_every_is_a_whole_number_from_one(every, tmp_path):
    said = f"every: found {every!r}, wanted a whole number >= 1"
    with pytest.raises(ValueError, match=f"report: {said}"):
        tracker.PageTracker(tmp_path, steps=1, every=every)
    with pytest.raises(ValueError, match=f"console: {said}"):
        Console(tmp_path, steps=1, every=every)


def test_that_it_cannot_be_written_is_a_warning_once(tmp_path, capsys):
    run = recorded.write(tmp_path / "run")
    (run / "report.html").mkdir()
    one = tracker.PageTracker(run, steps=60, every=1)
    for line in lines_of(run):
        one.log(line["step"], line)
    one.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {run / 'report.html'} could not be written: ")


def test_what_a_run_tells_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_told", ["batches are packed"])
    one = tracker.PageTracker(tmp_path, steps=60, start=20)
    logging.getLogger("balancers.coba").warning("a small window")
    logging.getLogger("balancers.coba").info("nothing")
    one.say("step 30/60  saved")
    monkeypatch.setattr(page, "write", lambda folders: None)
    one.close()
    logging.getLogger("balancers.coba").warning("later")
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "resumed at step 20",
        "batches are packed",
        "WARNING balancers.coba: a small window",
        "step 30/60  saved",
    ]


def test_a_run_leaves_a_report_and_none_ends_it(tmp_path):
    yaml = runs.write(tmp_path)
    run = yaml.parent / "run"
    ended = runs.train(yaml, "train.steps=4", "evaluate.every=2").well()
    assert f"report: {run / 'report.html'}" in ended.err
    text = (run / "report.html").read_text()
    assert "4 of 4, finished" in text and "saved" in (run / "log.txt").read_text()
    (data,) = re.findall(r'id="figures">(.*?)</script>', text)
    loss = next(one for one in json.loads(data) if one["id"] == "loss")
    passes = [line for line in runs.metrics(run) if "eval/macro" in line]
    assert loss["x"] == [0, 2, 4]
    for series in loss["series"]:
        values = np.array([line[f"eval/{series['name']}/loss"] for line in passes])
        assert series["y"] == pytest.approx(values / values[0], rel=1e-5)
    other = yaml.parent / "other"
    (other / "report.html").mkdir(parents=True)
    manifest.mark(other, checkpoint.RUN)
    ended = runs.train(yaml, "train.steps=4", f"output={other}", resume=True).well()
    assert "could not be written" in ended.err and (other / "model").is_dir()


# Colors

MACHADO = {  # Machado, Oliveira, Fernandes 2009, severity 1: linear RGB -> what is seen
    "normal": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]),
}  # fmt: skip


def linear(color: str) -> np.ndarray:
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = xyz @ rgb.clip(0, 1) / [0.95047, 1, 1.08883]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme, paper", [("light", "#ffffff"), ("dark", "#16181d")])
def test_curves_differ_for_every_eye_and_stand_out(theme, paper):
    script = (page.resources.files("mtl.report") / "assets" / "report.js").read_text()
    (row,) = re.findall(rf"{theme}: \[(.*?)\]", script)
    colors = re.findall(r"#\w{6}", row)
    assert len(colors) == 6
    for seen in MACHADO.values():
        labs = [lab(seen @ linear(color)) for color in colors]
        apart = [np.linalg.norm(a - b) for n, a in enumerate(labs) for b in labs[:n]]
        assert min(apart) > 15  # CIE76; 2.3 is just noticeable
    bright = [linear(color) @ [0.2126, 0.7152, 0.0722] for color in (paper, *colors)]
    ratios = [(max(b, bright[0]) + 0.05) / (min(b, bright[0]) + 0.05) for b in bright[1:]]
    assert min(ratios) > 3  # WCAG 1.4.11


def test_settings_are_shown_with_a_name_and_without():
    parts = {"name": "Apart", "parts": {"a": ["x", "y"]}, "balancer": {"name": "CoBa", "window": 5}}
    assert compare.show(parts) == "Apart (parts (a [x, y]), balancer CoBa (window 5))"
    assert compare.show("Equal") == "Equal" and compare.show({}) == ""
