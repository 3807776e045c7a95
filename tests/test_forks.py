"""Processes that tests fork: what they return, and that none is left behind."""

import os
import signal
import threading
import time
from pathlib import Path

import forks
import pytest


def ends(code: int) -> None:
    raise SystemExit(code)


def dies(number: int) -> None:
    if number:
        os.kill(os.getpid(), number)
    time.sleep(600)


def stays(folder: str) -> None:
    Path(folder, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_each_rank_has_its_code(tmp_path):
    assert forks.fork("test_forks:ends", [0, 3], tmp_path, {}) == [0, 3]


def test_a_rank_that_dies_takes_the_others_along(tmp_path):
    codes = forks.fork("test_forks:dies", [0, signal.SIGSEGV], tmp_path, {})
    assert codes == [-signal.SIGKILL, -signal.SIGSEGV]


def test_a_call_that_is_cut_short_leaves_no_process_and_no_answer(tmp_path):
    class Late(Exception):
        pass

    def late(*_: object) -> None:
        raise Late

    def interrupt() -> None:
        while len([*tmp_path.glob("*.pid")]) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, late)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(Late):
            forks.fork("test_forks:stays", [str(tmp_path)] * 2, tmp_path, {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    deadline = time.monotonic() + 60
    for path in tmp_path.glob("*.pid"):
        while (pid := path.read_text()) and Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"{path.name}: it lives"
            time.sleep(0.05)
    assert forks.fork("test_forks:ends", [7], tmp_path, {}) == [7]
