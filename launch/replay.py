"""What weights another balancer would have given on a run's recorded losses: `python
launch/replay.py runs/quickstart --balancer coba --tau 3`.

Settings follow as `--name value`; what is not given stays as the run had it, where it is the run's
method. Needs no model. The losses stay those of the recorded run. Writes RUN/replay.json, which
`launch/report.py RUN` shows.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = cli.parser(__doc__)
    parser.allow_abbrev = False  # a balancer's setting may begin like an option
    parser.add_argument("run", type=Path, help="a run's folder (its `output:`)")
    parser.add_argument("--balancer", help="a method's name; without: the run's own")
    parser.add_argument("--json", type=cli.file, help="where to write it; without: RUN/replay.json")
    return parser.parse_known_args()


def main() -> None:
    args, settings = arguments()
    from mtl.output.files import write_json  # here: --help need not wait for what these import
    from mtl.report import record, replay
    from mtl.report.compare import show

    run = record.read(args.run)
    found = replay.replay(run, replay.asked(run, args.balancer, settings))
    path = args.json or args.run / replay.FILE
    write_json(path, found.plain())
    print(f"{show(run.config['balancer'])} -> {show(found.balancer)}\n{replay.table(found)}")
    for text in (*found.notes, replay.CAVEAT):
        print(text)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
