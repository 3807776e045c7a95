"""launch/report.py: runs are named by what differs, compared where their tasks are the same, and a torn line is found."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recorded
import runs
from hypothesis import given
from hypothesis import strategies as st

from mtl.output import report

PROGRAM = str(runs.ROOT / "launch" / "report.py")


def write(folder: Path, tasks: str = "ab", scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    losses = {f"eval/{task}/loss": scale * n for n, task in enumerate(tasks, 1)}
    weights = {f"train/{task}/weight": 1 / len(tasks) for task in tasks}
    lines = [
        {"step": 0, "eval/macro": 1.5 * scale, **losses},
        {"step": 0, "train/loss": 1.0, **weights},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def call(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    assert runpy.run_path(PROGRAM)["main"]() is None


def test_runs_of_equal_names_are_all_shown(tmp_path, monkeypatch, capsys):
    """By the last part of their paths there would be one."""
    folders = [write(tmp_path / f"s{n}" / "run", scale=n + 1) for n in range(2)]
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, *folders)
    assert (tmp_path / "report.html").is_file()
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line in ("s0", "s1", "run")] == ["s0", "s1"]
    firsts = [line.split()[1] for line in out if line.startswith("a ")]
    assert firsts == ["1.000", "2.000"]


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/s0/run/out", "x/s1/run/out"], ["s0", "s1"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
        (["a/r", "r"], ["a/r", "r"]),
        (["./runs/a/", "runs/c/../b"], ["a", "b"]),
    ],
)
def test_names(paths, names, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = report.names_of([Path(path) for path in paths])
    if "r" in paths:  # their shared folder is the current one
        names = [f"{tmp_path.name}/{name}" for name in names]
    assert found == names


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=4).map("/".join), min_size=1, unique=True)
)
def test_different_paths_have_different_names(paths):
    names = report.names_of([Path("/top") / path for path in paths])
    assert len(set(names)) == len(paths) and all(names)


def test_a_report_may_be_put_into_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "pages").mkdir()
    call(monkeypatch, recorded.write(tmp_path / "run"), "--out", tmp_path / "pages")
    assert (tmp_path / "pages/report.html").read_text().startswith("<!doctype html>")


def test_the_same_run_twice_is_an_error(tmp_path):
    run = write(tmp_path / "run")
    with pytest.raises(ValueError, match="found this run twice"):
        report.histories([run, tmp_path / "x" / ".." / "run"])


def test_unlike_tasks_are_an_error_that_says_which(tmp_path):
    one, two = write(tmp_path / "one", "ab"), write(tmp_path / "two", "ac")
    with pytest.raises(ValueError, match="^two: found a run of a, c, wanted .* of one, a, b"):
        report.figure(report.histories([one, two]), tmp_path / "figure.png")


def test_tasks_in_another_order_keep_their_names(tmp_path, monkeypatch):
    """The figure's labels are the first run's; the second run's curves follow them."""
    plt = pytest.importorskip("matplotlib.pyplot")
    found = report.histories([write(tmp_path / "one", "ab"), write(tmp_path / "two", "ba")])
    for name, order in (("one", [0, 1]), ("two", [1, 0])):
        found[name] = replace(
            found[name],
            eval_steps=np.arange(2),
            eval_losses=np.array([[4.0, 4.0], [1.0, 2.0]])[:, order],
            weights=np.array([[0.1, 0.9]])[:, order],
            averages=np.full(2, np.nan),
        )
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.figure(found, tmp_path / "figure.png")
    (figure,) = drawn
    curves = [
        {line.get_label(): line.get_ydata()[-1] for line in axes.get_lines()}
        for axes in figure.axes[:2]
    ]
    assert [(ends["a"], ends["b"]) for ends in curves] == [(0.25, 0.5)] * 2
    weights = [[line.get_ydata()[-1] for line in axes.get_lines()] for axes in figure.axes[2:4]]
    assert weights == [[0.1, 0.9]] * 2


def test_the_lowest_macro_loss_of_every_run_is_within_the_frame(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    found = report.histories([write(tmp_path / "one", "ab"), write(tmp_path / "two", "ab")])
    for name, last in (("one", 1.0), ("two", 2.5)):
        found[name] = replace(
            found[name],
            eval_steps=np.arange(4),
            eval_losses=np.array([[9.0, 9.0], [3.0, 3.0], [2.8, 2.8], [last, last]]),
            weights=np.full((1, 2), 0.5),
            averages=np.full(4, np.nan),
        )
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.figure(found, tmp_path / "figure.png")
    for axes in drawn[0].axes[4:6]:
        low, high = axes.get_ylim()
        assert low == pytest.approx(1.0 - 0.1 * 1.9, abs=1e-5) and 2.9 < high < 9.0


def test_a_torn_line_names_file_and_line(tmp_path):
    run = write(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/lo')
    with pytest.raises(ValueError, match=r"run/metrics\.jsonl:3: found a torn line"):
        report.read(run)
