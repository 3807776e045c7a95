"""Several models of one base become one: `python launch/merge.py --base BASE --models A B C
--method select --out OUT [--set key=value]`, or `--run RUN` in place of base and models.

What each method does: docs/merging.md. OUT holds a model for from_pretrained, and merge.json.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))
from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add, many = parser.add_argument, {"action": "append", "default": []}
    flag = {"action": "store_true"}
    add("--base", help="folder or hub name they were trained from; adapters and runs name it")
    add("--models", nargs="+", type=Path, default=[], help="folders, whole models or adapters")
    add("--run", type=Path, help="a run's folder: its tasks' best models, unless --steps")
    add("--steps", metavar="FIRST:LAST", help="of --run, the checkpoints of these steps")
    add("--method", required=True, help="average, select, ties ...: docs/merging.md")
    add("--out", required=True, type=Path, help="the folder to write, new or empty")
    add("--set", metavar="KEY=VALUE", help="a setting of the method, as in density=0.3", **many)
    add("--seed", type=int, default=0, help="of methods that draw; default 0")
    add("--adapters", help="write an adapter, whole modules selected", **flag)
    add("--config", help="the experiment's YAML: losses of every model, and of soup and search")
    add("--force", help="write a model that is worse than the worst of them, too", **flag)
    add("--memory", type=int, metavar="MB", help="for tensors in work; default a quarter of free")
    add("--allow-code", metavar="PACKAGE", help="a package the method may come from", **many)
    add("--allow-remote-code", help="code that comes with the base may run", **flag)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported
    from mtl.merging import merge, methods

    method = methods.named(args.method, args.set, args.allow_code)
    base, models = merge.found(args.base, args.models, args.run, args.steps)
    evaluate, tasks = None, ()
    if args.config:
        from mtl.compare import evaluation

        evaluate, tasks = evaluation.halves(args.config, args.allow_code)
    given = {name: getattr(args, name) for name in ("seed", "adapters", "force")}
    given |= {"memory": args.memory and args.memory * 2**20, "evaluate": evaluate, "tasks": tasks}
    given |= {"allow_remote_code": args.allow_remote_code, "say": print}
    report = merge.merge(base, models, method, args.out, **given)
    print("\n".join([*report.lines(), f"written: {args.out}"]))


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
