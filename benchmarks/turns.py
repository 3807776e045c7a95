"""Several programs measured side by side on one machine: one computes while the others sleep on a
pipe.

A contender is a process that prepares, says so in a line of JSON, and then takes as many optimizer
steps as each line it is sent asks for. This file imports nothing but the standard library: it also
runs in the peers' environment.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Turns:
    """The contender's side. Call `ready` once, `step` at the end of each optimizer step.

    Args:
        commands, answers: where lines are read and written. Without them standard input and output,
            and whatever else the process prints goes to standard error.
    """

    def __init__(self, commands: TextIO | None = None, answers: TextIO | None = None):
        if answers is None:
            answers = os.fdopen(os.dup(1), "w")
            os.dup2(2, 1)
        self._commands, self._answers = commands or sys.stdin, answers

    def ready(self, **about: Any) -> None:
        """Say what was prepared, and wait for the first turn."""
        self._answer(about)

    def step(self, loss: float, tokens: int, **more: float) -> None:
        """One step is done; the turn's last one answers and waits for the next turn.

        Args:
            loss: nats per target token of this step's batch.
            tokens: target tokens in it.
            more: numbers to be added up over the turn.
        """
        self._losses.append(loss)
        self._tokens += tokens
        for name, value in more.items():
            self._more[name] = self._more.get(name, 0.0) + value
        self._left -= 1
        if not self._left:
            seconds = time.perf_counter() - self._began
            cpu = time.process_time() - self._cpu
            self._answer(
                {
                    "seconds": seconds,
                    "cpu": cpu,
                    "tokens": self._tokens,
                    "losses": self._losses,
                    **self._more,
                }
            )

    def _answer(self, values: Mapping[str, Any]) -> None:
        print(json.dumps({**values, "peak_mib": peak_mib()}), file=self._answers, flush=True)
        line = self._commands.readline()
        if not line.strip():
            sys.exit(0)  # the driver has gone, or has had enough
        self._left, self._tokens, self._losses, self._more = int(line), 0, [], {}
        self._began, self._cpu = time.perf_counter(), time.process_time()


class Contender:
    """The driver's side: a running process. Use as a context manager."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cwd: Path,
    ):
        self.name, self._log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **environment}, cwd=cwd,
            )  # fmt: skip
        self.about: dict[str, Any] = self._answer()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def take(self, steps: int) -> dict[str, Any]:
        """Let it take some steps: `seconds`, `cpu` (seconds of all its threads), target `tokens`,
        `losses` (one a step), `peak_mib`, and what else it adds up.
        """
        with suppress(BrokenPipeError):  # it has ended, and `_answer` says so
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            end = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(
                f"{self.name} ended early (code {self._process.wait()}); the end of "
                f"{self._log}:\n{end}"
            )
        return json.loads(line)


def peak_mib() -> float:
    """The most memory this process ever held, MiB: on the GPU where torch runs on one, else
    resident.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
