"""What the order of training rows left behind: `python launch/imbalance.py --config x.yaml --runs
OUT/replica-* --models OUT/merged-* [--json FILE] [--figure FILE]`.

Runs are replicas of an order (`train.order`); models are made of them. Starts under a launcher too.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__, reads_config=True, is_launched=True)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, required=True, help="folders of two or more replicas")
    add("--models", nargs="*", type=Path, default=[], help="folders of models made of them")
    add("--json", type=cli.file, metavar="FILE", help="write the figures there too")
    add("--figure", type=cli.file, metavar="FILE", help="draw them")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported
    from mtl import build, plugins
    from mtl.compare import orders
    from mtl.distributed import comm, engine, rendezvous
    from mtl.merging.report import aligned
    from mtl.output.files import write_text

    config = plugins.read(args.config, args.set, args.allow_code)
    rendezvous.meet(config.engine.rendezvous_minutes, process.tell)
    with rendezvous.telling():
        data = build.encode(config, args.allow_code)
    engine.init_process_group(config.engine.timeout_minutes, config.engine.watchdog_minutes)
    experiment = args.config, args.set, args.allow_code
    found = orders.study(experiment, data, args.runs, args.models)
    if comm.rank() == 0:
        print("\n".join(aligned(orders.table(found))))
        if args.json:
            write_text(args.json, json.dumps(orders.plain(found), indent=2) + "\n")
        if args.figure:
            orders.figure(found, args.figure)
            print(f"written: {args.figure}")
    comm.leave()


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
