"""Everything up to the first step, without a cluster: `python launch/check.py --config x.yaml
--world 8`.

Prints the YAML with its defaults, what became of each task's rows, the arithmetic of batches and
validation, an example of each task with its targets marked, and the memory a process needs. Exit
code 0: a run could start.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import process
from mtl.cli import options

process.settle()  # before torch is imported

from mtl import build, plugins
from mtl.check import dryrun
from mtl.config import dump
from mtl.output.checkpoint import check_output


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.add_argument(
        "--world", type=int, default=1, metavar="N", help="processes of the run (GPUs); default 1"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="check a run that is to go on: `output` may hold it already",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="only encode the data into the cache, for the run to find",
    )
    args = parser.parse_args()
    if args.world < 1:
        parser.error(f"--world: found {args.world}, wanted at least 1")
    return args


def main() -> None:
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # data may hold what the terminal cannot show
    config = plugins.read(args.config, args.set, args.allow_code)
    if not args.prepare:
        section(f"{args.config}, with defaults", dump(config.resolved()).splitlines())
    data = build.encode(config, args.allow_code)
    section("Data", dryrun.data(data.tasks))
    if args.prepare:
        print(f"encoded in {Path(config.cache).expanduser()}")
        return
    section("Batches", dryrun.batches(config, data, args.world))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for task, number in zip(data.tasks, data.goals.of, strict=True):
        title = f"{task.name}: {task.train.where(0)}, targets {'in green' if color else 'in [[ ]]'}"
        shown = data.examples[number].show(task.train.columns(0), color)
        section(title, shown.splitlines())
    loader = plugins.loader(config, args.allow_code)
    section("Memory of one process", dryrun.needs(config, data, loader, args.world))
    check_output(Path(config.output).expanduser(), args.resume)
    print(f"{args.config}: nothing stands in the way of a run")


def section(title: str, lines: list[str]) -> None:
    print(f"{title}\n" + "\n".join(f"  {line}" for line in lines) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
