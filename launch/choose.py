"""The best model of a finished run, exported: `python launch/choose.py --config x.yaml`.

Compares the best single checkpoint, the average of the weights (`average:`) and merges of the
tasks' bests (`checkpoint.bests: each`), prints them, and exports the best by `evaluate.best` on
validation rows into OUTPUT/model. Starts under a launcher too.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__, reads_config=True, is_launched=True)
    methods = ["average", "select"]
    parser.add_argument("--methods", nargs="*", default=methods, help="merges: docs/merging.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported
    from mtl import build, plugins
    from mtl.compare import choice
    from mtl.distributed import comm, engine, rendezvous
    from mtl.output import lock, report
    from mtl.report import page

    config = plugins.read(args.config, args.set, args.allow_code)
    if config.checkpoint.bests is None and config.average is None:
        print(f"{args.config}: nothing to choose from: neither checkpoint.bests nor average is set")
        return
    rendezvous.meet(config.engine.rendezvous_minutes, process.tell)
    with rendezvous.telling():
        rows = choice.rows(config, args.allow_code)
    engine.init_process_group(config.engine.timeout_minutes, config.engine.watchdog_minutes)
    output = Path(config.output).expanduser()
    with lock.alone(output, build.say_once), choice.candidates(config, args.methods) as found:
        record = choice.choose(config, rows, found, args.allow_code)
    if record is not None:
        print(f"{report.choice(record)}\nexported: {record['chosen']}: {output / 'model'}")
        print(page.attempt(output) or f"report: {output / page.NAME}")  # now with this table
    comm.leave()


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
