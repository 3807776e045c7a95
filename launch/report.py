"""What runs did: `python launch/report.py runs/quickstart [runs/quickstart-equal ...] [--figure
docs/quickstart.png]`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process
from mtl.output import report


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (their `output:`)")
    parser.add_argument(
        "--figure", type=Path, help="also draw the runs side by side into this file"
    )
    args = parser.parse_args()
    histories = report.histories(args.runs)
    for name, history in histories.items():
        print(f"{name}\n{report.table(history)}\n")
        if history.choice:
            print(f"{report.choice(history.choice)}\n")
    if args.figure:
        report.figure(histories, args.figure)
        print(f"written: {args.figure}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
