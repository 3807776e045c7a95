"""Everything up to the first step, without a cluster: `python launch/check.py --config x.yaml
--world 8`.

Prints the YAML with its defaults, what became of each task's rows, the arithmetic of batches and
validation, an example of each task with its targets marked, and the memory a process needs. Exit
code 0: a run could start.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__, reads_config=True, encodes=True)
    add = parser.add_argument
    add("--world", type=cli.positive, default=1, metavar="N", help="processes (GPUs); default 1")
    add("--resume", action="store_true", help="of a run that goes on: `output` may hold it already")
    add("--prepare", action="store_true", help="only encode the data into the cache")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported, and that after the arguments: help comes at once

    from mtl import build, plugins
    from mtl.check import dryrun, sections
    from mtl.output.checkpoint import check_output, check_place

    sys.stdout.reconfigure(errors="backslashreplace")  # data may hold what the terminal cannot show
    config = plugins.read(args.config, args.set, args.allow_code)
    encode = partial(build.encode, config, args.allow_code, rebuild=args.rebuild_cache)
    if args.prepare:
        show("Data", dryrun.data(encode().tasks))
        print(f"encoded in {Path(config.cache).expanduser()}")
        return
    loader = plugins.loader(config, args.allow_code)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    parts = loader, plugins.holder(config, args.allow_code).balancer, args.world, color
    for each in sections.everything(config, args.config, encode, *parts):
        show(*each)
    output = Path(config.output).expanduser()
    check_output(output, args.resume)
    check_place(output)
    print(f"{args.config}: nothing stands in the way of a run")


def show(title: str, lines: list[str]) -> None:
    print(f"{title}\n" + "\n".join(f"  {line}" for line in lines) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
