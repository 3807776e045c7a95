"""What merging is worth, row by row, with several seeds: `python benchmarks/merging.py
[--studies m0 quickstart quickstart-lora m0-replicas] [--seeds 6] [--out runs/merging]`.

A seed is a run at a constant rate whose weights are kept at every full pass, one with a cosine
schedule, and merges of the first. Validation rows choose, test rows are read once. A seed's
figures go to benchmarks/results/merging/STUDY-SEED.json and its folder is removed. Killed, it
goes on where it was: finished seeds, merges and checkpoints are not repeated.

    --table    only write the tables of what there is into docs/merging.md
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl.compare.report import insert
from mtl.compare.statistics import mean_interval

RESULTS = ROOT / "benchmarks" / "results" / "merging"
PAGE = ROOT / "docs" / "merging.md"
SINGLE = "best single checkpoint"


@dataclass(frozen=True)
class Study:
    """One scale of the table.

    Attributes:
        config: the experiment's YAML.
        title: of its table.
        steps, every: of the run at a constant rate, and between its passes.
        cosine: steps of the run with a cosine schedule.
        ranges: steps of the checkpoints whose mean is taken; the soup takes the first.
        decay: of the exponential average.
        log: whether a figure is the mean over tasks of the logarithm of the loss.
        sets: further overrides.
        tail: test rows to cut off the training files, where the YAML names none.
        of: replicas in different orders, in place of all that; 0: none.
    """

    config: str
    title: str
    steps: int
    every: int
    cosine: int
    ranges: tuple[tuple[int, int], tuple[int, int]]
    decay: float
    log: bool = False
    sets: Sequence[str] = field(default_factory=tuple)
    tail: int = 0
    of: int = 0


QUICK = dict(config="configs/even.yaml", steps=120, every=10, ranges=((30, 80), (20, 120)),
             decay=0.95, tail=120)  # fmt: skip
PLAIN = ("balancer=Equal",)
STRINGS = dict(config="configs/m0.yaml", steps=1600, every=100, cosine=1600,
               ranges=((1100, 1600), (600, 1600)), decay=0.99, log=True)  # fmt: skip
STUDIES = {
    "m0": Study(title="M0 (0.6M parameters, six string tasks), mean log loss", **STRINGS),
    "quickstart": Study(
        title="SmolLM2-135M in full, macro loss (nats per target token)",
        cosine=80, sets=PLAIN, **QUICK,
    ),
    "quickstart-lora": Study(
        title="SmolLM2-135M with LoRA (r 16, rate 1e-3), macro loss (nats per target token)",
        cosine=120, sets=(*PLAIN, "model.lora.r=16", "optimizer.lr=1.0e-3"), **QUICK,
    ),
    "m0-replicas": Study(
        title="M0, four replicas of an order (rotate, cosine), mean log loss", of=4, **STRINGS
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES)[:3])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "merging")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the tables go")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    args = parser.parse_args()
    for name in [] if args.table else args.studies:
        for seed in range(args.seeds):
            record = args.results / f"{name}-{seed}.json"
            if record.is_file():
                continue
            began, folder = time.time(), args.out / f"{name}-{seed}"
            study = STUDIES[name]
            measure = of_replicas if study.of else of_a_run
            rows = measure(Bench(study, seed, folder, args.set))
            about = {"study": name, "seed": seed, "hours": (time.time() - began) / 3600}
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            shutil.rmtree(folder)
            write_tables(args.results, args.page)
    write_tables(args.results, args.page)


@dataclass
class Bench:
    """The programs on one seed of a study, in one folder."""

    study: Study
    seed: int
    folder: Path
    more: Sequence[str]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.yaml = self.folder / "x.yaml"
        if not self.yaml.is_file():
            self.yaml.write_text(yaml.safe_dump(self._config(), sort_keys=False))
        self.tasks = list(yaml.safe_load(self.yaml.read_text())["tasks"])

    def _config(self) -> dict[str, Any]:
        """The experiment, with test rows of its own where it names none."""
        config = yaml.safe_load((ROOT / self.study.config).read_text())
        for name, task in config["tasks"].items():
            if self.study.tail and "test" not in task:
                lines = Path(task["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
                assert len(lines) >= task.get("cap", 0) + self.study.tail, f"{name}: too few rows"
                path = self.folder / f"{name}.test.jsonl"
                path.write_text("".join(lines[-self.study.tail :]), encoding="utf-8")
                task["test"] = str(path)
        return config

    @property
    def sets(self) -> list[str]:
        each = [*self.study.sets, f"train.seed={self.seed}", *self.more]
        return [part for one in each for part in ("--set", one)]

    def train(self, name: str, *sets: str) -> Path:
        """The folder of a finished run."""
        output = self.folder / name
        if not (output / "model" / "README.md").is_file():
            given = [part for one in (*sets, f"output={output}") for part in ("--set", one)]
            self.run("train", "--config", self.yaml, *self.sets, *given, "--resume")
            for state in (output / "checkpoints").glob("step-*/engine"):
                shutil.rmtree(state)  # the optimizer's: 20 GB of a seed of SmolLM2
        return output

    def merge(self, name: str, *given: object) -> Path:
        out = self.folder / name
        if not out.is_dir():
            self.run("merge", *given, "--out", out, "--force")
        return out

    def test(self, folders: Sequence[Path]) -> dict[Path, dict[str, float]]:
        """Losses on test rows, by task."""
        path, every = self.folder / "test.json", list(dict.fromkeys(folders))
        given = "--split", "test", "--json", path
        self.run("evaluate", "--config", self.yaml, *self.sets, *every, *given)
        models = json.loads(path.read_text())["models"]
        return {one: {k: models[str(one)]["losses"][k] for k in self.tasks} for one in every}

    def run(self, program: str, *given: object) -> None:
        command = [sys.executable, str(ROOT / "launch" / f"{program}.py"), *map(str, given)]
        print("$", *command, flush=True)
        subprocess.run(command, check=True, cwd=ROOT)

    def figure(self, losses: dict[str, float]) -> float:
        each = [losses[name] for name in self.tasks]
        return sum(map(math.log, each) if self.study.log else each) / len(each)


def of_a_run(bench: Bench) -> dict[str, Any]:
    """The rows of one trajectory, one of a cosine schedule, and their merges."""
    study = bench.study
    often = f"evaluate.every={study.every}", f"checkpoint.every={study.every}"
    constant = bench.train(
        "constant", f"train.steps={study.steps}", "schedule.name=constant", *often,
        "checkpoint.keep=999", "checkpoint.bests=each", f"average.decay={study.decay}",
    )  # fmt: skip
    cosine = bench.train(
        "cosine", f"train.steps={study.cosine}", "schedule.name=cosine", *often,
        "checkpoint.keep=999", "checkpoint.bests=null", "average=null",
    )  # fmt: skip
    run = ["--run", constant]
    passes = read_passes(constant)
    found = {
        SINGLE: checkpoint(constant, best(bench, passes, "eval"), "model"),
        "exponential average": checkpoint(constant, best(bench, passes, "eval/average"), "average"),
        f"cosine over {study.cosine} steps, best": checkpoint(
            cosine, best(bench, read_passes(cosine), "eval"), "model"
        ),
        "mean of task bests": bench.merge("bests", *run, "--method", "average"),
        "selection of task bests": bench.merge("select", *run, "--method", "select"),
    }
    for first, last in study.ranges:
        span = ["--steps", f"{first}:{last}"]
        out = bench.merge(f"mean-{first}-{last}", *run, *span, "--method", "average")
        found[f"mean of steps {first} to {last}"] = out
    span = ["--steps", "{}:{}".format(*study.ranges[0])]
    soup = bench.merge("soup", *run, *span, "--method", "soup", "--config", bench.yaml)
    found["greedy soup of steps {} to {}".format(*study.ranges[0])] = soup
    at = {
        name: min(passes, key=lambda step: passes[step][f"eval/{name}/loss"])  # noqa: B023
        for name in bench.tasks
    }
    own = {name: checkpoint(constant, step, "model") for name, step in at.items()}
    losses = bench.test([*found.values(), *own.values()])
    rows = {
        name: {"figure": bench.figure(losses[folder]), "losses": losses[folder],
               "of": str(folder.relative_to(bench.folder))}
        for name, folder in found.items()
    }  # fmt: skip
    each = {name: losses[folder][name] for name, folder in own.items()}
    rows["six models, each at its task's best"] = {
        "figure": bench.figure(each), "losses": each, "of": at
    }  # fmt: skip
    return rows


def of_replicas(bench: Bench) -> dict[str, Any]:
    """Replicas in different orders, their merges, and the controls at equal compute."""
    out, of = bench.folder / "orders", bench.study.of
    given = ["--config", bench.yaml, *bench.sets, "--of", of, "--out", out, "--split", "test"]
    steps = [f"train.steps={bench.study.steps}", f"evaluate.every={bench.study.every}"]
    steps += [f"checkpoint.every={bench.study.every}"]
    bench.run("replicas", *given, *(part for one in steps for part in ("--set", one)))
    models = json.loads((out / "losses.json").read_text())["models"]
    rows, single = {}, []
    for path, record in models.items():
        name = str(Path(path).relative_to(out))
        losses = {k: record["losses"][k] for k in bench.tasks}
        rows[name] = {"figure": bench.figure(losses), "losses": losses}
        single += [rows[name]["figure"]] * name.startswith("replica-")
    imbalance = json.loads((out / "imbalance.json").read_text())
    rows = {SINGLE: {"figure": sum(single) / of}, **rows}
    for name, row in rows.items():
        if (one := imbalance.get(str(out / name))) is not None:
            row["spread"] = one["spread"]
    rows[SINGLE] |= {key: imbalance["replicas"][key] for key in ("spread", "spearman", "interval")}
    return rows


def read_passes(run: Path) -> dict[int, dict[str, float]]:
    """The full passes after step 0, by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "eval/macro" in line and line["step"]}


def best(bench: Bench, passes: dict[int, dict[str, float]], group: str) -> int:
    """The step that validation chooses."""

    def figure(step: int) -> float:
        return bench.figure({name: passes[step][f"{group}/{name}/loss"] for name in bench.tasks})

    return min(passes, key=figure)


def checkpoint(run: Path, step: int, weights: str) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / weights


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); nan of one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, mean_interval(values)[1] - mean


def table(title: str, seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: every row's mean and interval, and that of its paired difference to the best single
    checkpoint.
    """
    yield f"**{title}**; {len(seeds)} seed{'s' * (len(seeds) > 1)}:"
    yield ""
    yield "| model | on test | against the best single checkpoint | seeds below it |"
    yield "|---|---:|---:|---:|"
    for name in seeds[0]:
        values = [rows[name]["figure"] for rows in seeds]
        gains = [rows[name]["figure"] - rows[SINGLE]["figure"] for rows in seeds]
        shown = [_show(values, "{:.3f}"), "", ""]
        if name != SINGLE:
            shown[1:] = [_show(gains, "{:+.3f}"), f"{sum(x < 0 for x in gains)} of {len(gains)}"]
        yield f"| {name} | {' | '.join(shown)} |"
    yield ""


def _show(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return form.format(mean) + (f" ± {half:.3f}" if half == half else "")


def write_tables(results: Path, page: Path) -> None:
    """The tables of every study that has a seed, between the marks of the page."""
    lines: list[str] = []
    for name, study in STUDIES.items():
        paths = sorted(results.glob(f"{name}-[0-9]*.json"))
        if paths:
            lines += table(study.title, [json.loads(p.read_text())["rows"] for p in paths])
    insert(page, "merging", "\n".join(lines), by="benchmarks/merging.py")


if __name__ == "__main__":
    main()
