"""Arms of settings, several seeds each, run and compared: `python launch/compare.py
benchmarks/evidence/m0.yaml --out runs/m0`.

Given again it goes on where it was. OUT/results has a JSON a run; OUT/comparison.json, .md and .png
are written from them, also while runs are missing.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import process
from mtl.cli import file, positive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path, help="the study's YAML")
    add("--out", type=Path, required=True, help="folder of the runs and of what is written")
    add("--threads", type=positive, default=1, help="OMP threads of a run; default 1")
    add("--keep", action="store_true", help="leave finished runs' folders, checkpoints included")
    add("--allow-code", action="append", default=[], metavar="PACKAGE", help="as train.py")
    add("--page", type=file, help="a page with a place for the table (docs/evidence.md)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="start no run")
    what.add_argument("--slurm", action="store_true", help="print a SLURM array, and start no run")
    what.add_argument("--number", type=positive, metavar="N", help="the N-th run alone")
    args = parser.parse_args()
    # No `process.settle()`: the runs are started from here and share the cores themselves.
    from mtl.compare import report, runs, study

    given = study.read(args.study, args.allow_code)
    runner = runs.Runner(given, args.out, Path(__file__).parent, args.threads, args.keep)
    if args.slurm:
        print(runs.slurm(runner, Path(__file__)), end="")
        return
    every = given.runs()
    chosen = every[args.number - 1 : args.number] if args.number else every
    say = lambda text: print(text, flush=True)  # noqa: E731
    if given.shortfall:
        say(given.shortfall)
    problems = [] if args.report else runs.perform(runner, chosen, say)
    if not args.number:
        for path in report.write(runner, args.page):
            say(f"written: {path}")
    if problems:
        raise ValueError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
