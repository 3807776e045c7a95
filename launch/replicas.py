"""K runs that differ in the order of rows only, merged by every method and evaluated beside
controls at equal compute: `python launch/replicas.py --config x.yaml --of 4 --out runs/orders`.

Given again it goes on where it was. OUT holds replica-*, long, merged-*, tail, losses.json,
imbalance.json and, where matplotlib is installed, imbalance.png.
"""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__, reads_config=True)
    add = parser.add_argument
    add("--of", type=int, default=4, metavar="K", help="replicas; default 4")
    add("--out", type=Path, required=True, help="folder of the study")
    add("--scheme", choices=("rotate", "shuffle", "batch"), default="rotate", help="train.order")
    add("--epochs", choices=("first", "all"), default="first", help="where orders differ")
    add("--launcher", default=sys.executable, help="starts a run: 'deepspeed --num_gpus 2'")
    add("--methods", nargs="+", help="of launch/merge.py")
    add("--split", choices=("validation", "test"), default="validation", help="rows to report on")
    add("--dry-run", action="store_true", help="print the runs' commands, and start none")
    args = parser.parse_args()
    # No `process.settle()`: the runs are started from here and share the cores themselves.
    from mtl import plugins
    from mtl.compare import orders, replicas

    config = plugins.read(args.config, args.set, args.allow_code)
    experiment = ["--config", args.config]
    experiment += [part for each in args.set for part in ("--set", each)]
    experiment += [part for each in args.allow_code for part in ("--allow-code", each)]
    order = (args.scheme, args.of, args.epochs)
    started = (shlex.split(args.launcher), Path(__file__).resolve().parent)
    rows = orders.applies(config, args.allow_code), find_spec("matplotlib") is not None
    reported = args.methods or list(replicas.METHODS), args.split, *rows
    study = replicas.ReplicaStudy(config, experiment, *started, args.out, *order, *reported)
    if args.dry_run:
        commands = study.commands()
        print("\n".join(shlex.join(next(commands)) for _ in range(args.of + 1)))
    else:
        replicas.run(study.commands(), lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
