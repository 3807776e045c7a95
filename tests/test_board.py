"""The table of tasks under a run's bar, and bars of long work: on a terminal (pyte plays one), and in a log."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from mtl import process
from mtl.output import trackers
from mtl.output.board import NARROW, Board

pyte = pytest.importorskip("pyte", reason="pyte is not installed")

PASSES = [{"a": 2.0, "b": 4.0}, {"a": 1.0, "b": 5.0}, {"a": 1.5, "b": 5.5}]


def passed(losses: dict[str, float], **done: bool) -> dict[str, float]:
    values = {f"eval/{task}/loss": loss for task, loss in losses.items()}
    values |= {f"patience/{task}/done": float(is_done) for task, is_done in done.items()}
    return {**values, "eval/macro": sum(losses.values()) / len(losses), "eval/average/a/loss": 9.0}


def trained(step: int, **weights: float) -> dict[str, float]:
    values = {"train/loss": 1.0, "train/tokens_per_second": 10.0, "time/left_seconds": 60.0}
    for task, weight in weights.items():
        values |= {f"train/{task}/weight": weight, f"draws/{task}/planned": 1 / len(weights)}
        values[f"draws/{task}/epoch"] = (step + 1) / 4
    return values


def rows(board: Board) -> list[list[str]]:
    return [line.split(maxsplit=7) for line in board.lines()]


def test_each_column(tmp_path):
    board = Board()
    board.take(passed(PASSES[0]))
    assert rows(board)[1] == ["a", "2.000", "2.000", "-", "-", "-", "-", "at best"]
    board.take(trained(0, a=0.75, b=0.25))
    board.take(passed(PASSES[1]))
    board.take(trained(1, a=0.6, b=0.4))
    assert rows(board) == [
        ["task", "loss", "best", "trend", "weight", "share", "epoch", "state"],
        ["a", "1.000", "1.000", "-50.0%", "0.600", "50%", "0.5", "at best"],
        ["b", "5.000", "4.000", "+25.0%", "0.400", "50%", "0.5", "1 past"],
    ]
    board.take(passed(PASSES[2], a=False, b=True))
    assert [row[-1] for row in rows(board)[1:]] == ["1 past", "done"]
    board.take(trained(2, a=1.0, b=0.0))
    assert [row[-1] for row in rows(board)[1:]] == ["1 past", "dropped"]
    board.take({**trained(3, a=0.9, b=0.1), "train/b/kl": 0.01})
    assert [row[-1] for row in rows(board)[1:]] == ["1 past", "anchored"]


@pytest.mark.parametrize("loss", [0.001, 2.0, 98765.4321])
@pytest.mark.parametrize("name", ["a", "a_task_with_a_long_name", "another_task_with_a_long_name"])
def test_no_line_is_wider_than_sixty(loss, name):
    board = Board()
    for factor in (1, 30):
        board.take(passed({name: loss * factor, "b": 1.0}))
        board.take(trained(10_000, **{name: 1234.5, "b": -0.5}))
    lines = board.lines()
    assert max(map(len, lines)) <= NARROW and len({line.rindex(" ") for line in lines}) <= 4
    wide = board.lines(120)
    assert wide[1].startswith(name) and max(map(len, wide)) <= 120


def test_a_log_has_the_table_after_every_pass(tmp_path, capsys):
    console = trackers.Console(tmp_path, steps=3)
    for step, losses in enumerate(PASSES):
        console.log(step, passed(losses))
        console.log(step, trained(step, a=0.5, b=0.5))
    console.close()
    text = capsys.readouterr().err
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    at = lines.index("step 1/3  validation: macro 3.0000")
    assert [line.split()[0] for line in lines[at : at + 4]] == ["step", "task", "a", "b"]
    assert lines[at + 2] == "  a     1.000  1.000 -50.0%  0.500   50%   0.2 at best"
    assert lines[at + 4].startswith("step 2/3  loss 1.000")


def test_a_resumed_run_knows_the_bests_of_before(tmp_path, capsys):
    first = trackers.Jsonl(tmp_path, steps=3)
    for step, losses in enumerate(PASSES[:2]):
        first.log(step, passed(losses))
    first.close()
    console = trackers.Console(tmp_path, steps=3, start=1)
    console.log(2, passed(PASSES[2]))
    assert "a     1.500  1.000 +50.0%" in capsys.readouterr().err


def on_terminal(code: str, columns: int, lines: int, **more: str) -> list[list[str]]:
    """What a terminal of this size shows after each write of a process that runs `code`: the screens."""
    end, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (lines, columns))
    # Of the outer terminal, which would win over the size of this one.
    apart = ("COLUMNS", "LINES", "JPY_PARENT_PID")
    environment = {k: v for k, v in os.environ.items() if k not in apart}
    environment |= {"TERM": "xterm", **more}
    command = [sys.executable, __file__, code]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    screen, shown = pyte.Screen(columns, lines), []
    stream = pyte.ByteStream(screen)
    while True:
        try:
            text = os.read(end, 65536)
        except OSError:  # the process has ended
            break
        if not text:
            break
        stream.feed(text)
        shown.append([line.rstrip() for line in screen.display])
    os.close(end)
    assert child.wait() == 0, shown[-1:]
    return shown


RUN = """
import time
console = trackers.Console(None, steps=3)
for step, losses in enumerate(PASSES):
    console.log(step, passed(losses))
    console.log(step, trained(step, a=0.75, b=0.25))
    time.sleep(0.15)  # tqdm shows at most ten times a second
"""


KILLED = "import os\nos._exit(0)"  # what stands there stays


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_has_the_table_under_the_bar(columns):
    screen = on_terminal(RUN + KILLED, columns, 24)[-1]
    (at,) = [n for n, line in enumerate(screen) if line.startswith("task")]
    assert "/3 [" in screen[at - 1] and "loss 1.000" in screen[at - 1]
    assert screen[at + 1] == "a     1.500  1.000 +50.0%  0.750   50%   0.8 1 past"
    assert screen[at + 2] == "b     5.500  4.000 +10.0%  0.250   50%   0.8 2 past"
    assert sum(line.startswith("a ") for line in screen) == 1, "one table, in place"
    assert any(line.startswith("step 1/3  validation: macro 3.0000") for line in screen)


def test_a_low_terminal_has_as_much_of_it_as_fits():
    screen = on_terminal(RUN + KILLED, 60, 5)[-1]
    assert sum(line.startswith("task") for line in screen) == 1
    assert not any(line.startswith("b ") for line in screen)


def test_the_last_table_stays():
    screen = on_terminal(RUN + "console.close()\nprint('later')", 60, 24)[-1]
    (at,) = [n for n, line in enumerate(screen) if line.startswith("task")]
    assert screen[at + 1].startswith("a     1.500") and "later" in screen[at + 3 :]


@pytest.mark.parametrize("given", [{"JPY_PARENT_PID": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_writes_over_no_line_has_a_log(given):
    """Such as a notebook's `!command`: its page would keep every table."""
    screen = on_terminal(RUN, 60, 40, **given)[-1]
    assert sum(line.strip().startswith("task ") for line in screen) == len(PASSES)
    assert "step 1/3  validation: macro 3.0000" in screen
    assert sum("step/s" in line for line in screen) == 0, "no bar"


BAR = """
import time
process.SHORT = 0.05
with process.bar("encode a (train)", 200, "row") as bar:
    for _ in range(20):
        bar.update(10)
        time.sleep(0.03)
"""


def test_long_work_has_a_bar_with_the_time_left():
    shown = on_terminal(BAR, 60, 5)
    lines = [line for screen in shown for line in screen if line.startswith("encode a (train)")]
    assert lines and all("/200 [" in line and "<" in line for line in lines)
    assert shown[-1] == [""] * 5, "it goes when the work is done"
    assert on_terminal(BAR.replace("0.05", "60"), 60, 5) == [], "short work has none"


def test_it_has_none_in_a_log_and_in_other_processes(monkeypatch, capsys):
    monkeypatch.setattr(process, "SHORT", 0)
    with process.bar("save", 2, "part") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    assert on_terminal(BAR, 60, 5, LOCAL_RANK="1") == []
    assert on_terminal(BAR, 60, 5, JPY_PARENT_PID="1") == [], "a notebook would keep every line"


if __name__ == "__main__":  # the process on the terminal
    exec(sys.argv[1])
