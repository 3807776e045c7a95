"""Classify texts without labels: `python launch/zeroae.py --config x.yaml --pool FILE`.

Rounds of choosing texts, writing new ones and training (docs/zeroae.md). Killed, the same command
goes on where it was. OUT/predictions.jsonl has every text's class. `--gold` is read after that.
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__, reads_config=True)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--pool", type=Path, required=True, help="JSONL rows, of which only `text` is read")
    add("--valid", type=Path, help="such rows for validation; default: valid.jsonl beside the pool")
    add("--out", type=Path, default=Path("runs/zeroae"), help="default: %(default)s")
    add("--train", metavar="COMMAND", help="how to train, such as 'deepspeed launch/train.py'")
    add("--gold", type=Path, nargs="*", default=[], help="labelled rows, to be scored at the end")
    add("--rounds", type=cli.positive, default=6)
    add("--p", type=float, default=0.9, help="a text is sure of its class above this probability")
    add("--gap", type=float, default=0.5, help="or where it leads the second class by this")
    add("--share", type=float, default=0.1, help="of the pool becomes sure in a round")
    add("--select", type=cli.positive, default=128, help="least texts the generator gets")
    add("--generate", type=int, default=16, help="texts to write for each class in a round")
    add("--replay", type=cli.positive, default=3, help="rounds whose written texts are used")
    add("--codes", action=flag, default=True, help="write with the codes of the class's texts")
    add("--uncertain", action=flag, default=True, help="the generator gets unsure texts too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported
    from mtl.recipes.zeroae import rounds

    names = rounds.Plan.__dataclass_fields__
    plan = rounds.Plan(**{name: getattr(args, name) for name in names})
    train = (
        shlex.split(args.train) if args.train else [sys.executable, str(ROOT / "launch/train.py")]
    )
    valid = args.valid or args.pool.with_name("valid.jsonl")
    for line in rounds.classify(
        args.config, args.set, args.pool, valid, plan, args.out, train, args.gold
    ):
        print(line)


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
