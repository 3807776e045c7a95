"""The report of a run while it runs: reload the page to see where it stands."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from balancers.maths import whole
from mtl import process
from mtl.output.trackers import LOG
from mtl.report import page

PART = 0.01  # of a run's time that reports may take, where `every` is not given


class PageTracker:
    """`report.html` in the run's folder, and `log.txt`: what the run told.

    Written after full validation passes and at the end. That it cannot be written is a warning.

    Args:
        every: full passes between two reports; None: after each, as long as reports take less than
            a hundredth of the time.
    """

    def __init__(self, output: Path, steps: int, start: int = 0, every: int | None = None):
        if every is not None:
            whole("report: every", every)
        self.output, self.every, self.passes = Path(output), every, 0
        self.took, self.ended = 0.0, time.monotonic()  # of the last report
        self.problems: set[str] = set()
        self.log_file = (self.output / LOG).open("a", encoding="utf-8")
        if start:
            self.say(f"resumed at step {start}")
        # What was told before there was a tracker.
        for text in process.told():
            self.say(text)
        # Warnings of libraries and balancers, which no tracker hears of.
        self.handler = logging.StreamHandler(self.log_file)
        self.handler.setLevel(logging.WARNING)
        self.handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self.handler)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "eval/macro" not in values:
            return
        self.passes += 1
        since = time.monotonic() - self.ended
        due = self.took < PART * since if self.every is None else self.passes % self.every == 0
        if due or self.passes == 1:
            self._write()

    def say(self, text: str) -> None:
        self.log_file.write(f"{text}\n")
        self.log_file.flush()

    def close(self) -> None:
        logging.getLogger().removeHandler(self.handler)
        self.log_file.close()
        if self._write():
            process.tell(f"report: {self.output / page.NAME}")

    def _write(self) -> bool:
        """Whether it could."""
        began = time.monotonic()
        problem = page.attempt(self.output)
        self.ended = time.monotonic()
        self.took = self.ended - began
        if problem is not None and problem not in self.problems:  # once each
            self.problems.add(problem)
            process.tell(f"warning: {problem}")
        return problem is None
