"""A study's runs: each a process of the ordinary program, then one that reads the test rows.

OUT/results/KIND.ARM.SEED.json says that a run is finished and holds what is reported of it; the
run's own folder, OUT/KIND/ARM/seed-N, goes away with its checkpoints then.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtl import plugins
from mtl.compare.cost import forward_equivalents, pilot_cost
from mtl.compare.study import PLACE, Study, StudyError, Trial
from mtl.output import provenance
from mtl.output.files import write_json
from mtl.output.report import History
from mtl.output.report import read as read_history

Say = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """What runs a study's runs.

    Args:
        study: what is run.
        out: the folder of runs and results.
        programs: the folder of `train.py` and `evaluate.py`.
        threads: OMP threads of a run.
        keep: leave the finished runs' folders.
    """

    study: Study
    out: Path
    programs: Path
    threads: int = 1
    keep: bool = False

    def path(self, run: Trial) -> Path:
        return self.out / "results" / f"{run.kind}.{run.arm}.{run.seed}.json"

    def result(self, run: Trial) -> dict[str, Any] | None:
        """What is known of a finished run; None where it is not finished.

        Raises:
            StudyError: the study says something else of this run by now.
        """
        path = self.path(run)
        if not path.is_file():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["key"] != self.study.key(run):
            raise StudyError(
                f"{path}: found the result of other settings than {self.study.path} or "
                f"{self.study.base} has now for {run.name}. Move it away, or put these back."
            )
        return result

    def perform(self, run: Trial) -> dict[str, Any]:
        """Train, or go on with it, read the test rows, write the result.

        Raises:
            StudyError: a program failed, and its log is named; or a test loss is 0 or not finite.
        """
        folder, began = self.out / run.name, time.monotonic()
        overrides = [self._filled(run, each) for each in self.study.overrides(run)]
        overrides.append(f"output={folder / 'run'}")
        experiment = ["--config", self.study.base]
        experiment += [part for each in overrides for part in ("--set", each)]
        experiment += [part for each in self.study.allow_code for part in ("--allow-code", each)]
        # --resume goes on where an earlier attempt ended, and begins where there is none.
        self._start(folder, "train", *experiment, "--resume")
        history = read_history(folder / "run")
        config = plugins.read(self.study.base, overrides, self.study.allow_code)
        models = self._models(run, folder / "run", history, config.model.name)
        losses = folder / "test.json"
        named = list(dict.fromkeys(models.values()))
        self._start(folder, "evaluate", *experiment, "--split", "test", "--json", losses, *named)
        found = json.loads(losses.read_text(encoding="utf-8"))["models"]
        test = {what: found[model]["losses"] for what, model in models.items()}
        names, steps = history.tasks, _steps(history)
        reported = {what: {task: test[what][task] for task in names} for what in ("best", "last")}
        if f"own {names[0]}" in test:
            reported["own"] = {task: test[f"own {task}"][task] for task in names}
        _refuse_degenerate(reported, losses)
        result = {
            **asdict(run),
            "key": self.study.key(run),
            "tasks": names,
            "test": reported,
            "steps": {"run": config.train.steps or steps["last"], **steps},
            "cost": forward_equivalents(
                config, steps["last"], self.study.allow_code, history.teacher_rows
            )
            + pilot_cost(config),
            "seconds": round(time.monotonic() - began),
            "weights": _by_task(names, history.weights.mean(0)),
            "validation": {
                "steps": history.eval_steps.tolist(),
                **_by_task(names, history.eval_losses.T),
            },
            "versions": provenance.versions(),
            "git": provenance.git_revision(),
        }
        write_json(self.path(run), result)
        if not self.keep:
            shutil.rmtree(folder)
        return result

    def _filled(self, run: Trial, override: str) -> str:
        """An override with what stands for another arm's result filled in: `{results}` and `{seed}`
        make its path, `{mean:ARM}` and `{moved:ARM}` are its mean weights.
        """
        override = PLACE.sub(lambda place: self._weights(run, place), override)
        return override.replace("{results}", str(self.out / "results")).replace(
            "{seed}", str(run.seed)
        )

    def _weights(self, run: Trial, place: re.Match[str]) -> str:
        arm = place["arm"]
        other = replace(run, arm=arm, overrides=self.study.arms["arms"][arm])
        result = self.result(other)
        if result is None:
            raise StudyError(
                f"found no {self.path(other)}, wanted the finished run whose weights {place[0]} is"
            )
        found = result["weights"]
        values = list(found.values())
        if place["which"] == "moved":
            values = [values[-1], *values[:-1]]
        return json.dumps(dict(zip(found, values, strict=True)))

    def _models(self, run: Trial, output: Path, history: History, base: str) -> dict[str, str]:
        """The folders to read: of the best and the last checkpoint; of the arm that gives the
        headroom each task's best step too.
        """
        # Names have eight digits, so the highest name is the last step.
        last = max((output / "checkpoints").glob("step-*"))
        average = last / "average"
        found = {"best": output / "model", "last": average if average.is_dir() else last / "model"}
        if (run.kind, run.arm) != ("arms", self.study.equal):
            return {what: str(folder) for what, folder in found.items()}
        for task, step in _steps(history)["own"].items():
            # Step 0 is the model that the run started from, which no folder of the run keeps.
            found[f"own {task}"] = output / "bests" / f"step-{step:08d}" if step else Path(base)
        return {what: str(folder) for what, folder in found.items()}

    def _start(self, folder: Path, program: str, *arguments: str | Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{program}.log"
        command = [sys.executable, str(self.programs / f"{program}.py"), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = lines[-1] if lines else ""
            raise StudyError(f"{program}.py ended with exit code {code}; see {log}: {last}")


def perform(runner: Runner, runs: list[Trial], say: Say) -> list[str]:
    """Run what is not finished, in order. Returns what went wrong: an arm that failed is left out
    from then on, and the others go on.
    """
    problems: dict[tuple[str, str], str] = {}
    for number, run in enumerate(runs, 1):
        arm = (run.kind, run.arm)
        if arm in problems or runner.result(run) is not None:
            continue
        say(f"{number}/{len(runs)}  {run.name}  {' '.join(run.overrides)}")
        try:
            result = runner.perform(run)
        except StudyError as error:
            problems[arm] = f"{run.name}: {error}"
            say(problems[arm])
            continue
        score = float(np.mean(np.log(list(result["test"]["best"].values()))))
        say(f"{number}/{len(runs)}  {run.name}  mean ln L {score:.4f}, {result['seconds']} s")
    return list(problems.values())


def _steps(history: History) -> dict[str, Any]:
    """The last step, that of least mean log loss, and each task's own best; the first of equals,
    as the run itself judges. Of the trained weights, whatever an average had.
    """
    at, losses = history.eval_steps, history.eval_losses
    best = int(at[np.log(losses).mean(1).argmin()])
    return {"last": int(at[-1]), "best": best, "own": history.best_steps}


def _refuse_degenerate(test: Mapping[str, Mapping[str, float]], path: Path) -> None:
    for which, losses in test.items():
        for task, loss in losses.items():
            # G is a mean of logs: one such loss would be all of it.
            if not 0 < loss < np.inf:
                raise StudyError(
                    f"{path}: found {loss} for {task} ({which}), wanted a loss above 0 that is "
                    "finite. Look at the run's log and at the task's test rows."
                )


def _by_task(names: list[str], values: np.ndarray) -> Mapping[str, Any]:
    # Digits, not decimals: a small loss must not become 0, whose log is -inf.
    short = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])
    return {name: short(row).tolist() for name, row in zip(names, values, strict=True)}


def slurm(runner: Runner, program: Path) -> str:
    """An sbatch script: one task of the array a run, then `--report` by hand."""
    count = len(runner.study.runs())
    options = [str(runner.study.path), "--out", str(runner.out), "--threads", str(runner.threads)]
    options += [part for each in runner.study.allow_code for part in ("--allow-code", each)]
    options += ["--keep"] * runner.keep
    command = shlex.join([sys.executable, str(program), *options])
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name={runner.study.path.stem} --array=1-{count} --ntasks=1\n"
        f"#SBATCH --cpus-per-task={runner.threads} --output=slurm-%A-%a.out\n"
        "# For GPUs add --gpus-per-task=1. Submitted again it goes on where it was; then:\n"
        f"#   {command} --report\n"
        f'cd "${{SLURM_SUBMIT_DIR:?submit this with sbatch}}"\n'
        f'exec {command} --number "$SLURM_ARRAY_TASK_ID"\n'
    )
