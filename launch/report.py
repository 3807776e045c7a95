"""What runs did: `python launch/report.py runs/quickstart [runs/quickstart-equal ...]`.

Prints each run's table and writes a report that a browser shows: into RUN/report.html for one run,
into report.html for several. `--figure docs/quickstart.png` draws the runs side by side.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (their `output:`)")
    parser.add_argument("--out", type=Path, help="file to write, or a folder for it")
    side = "also draw the runs side by side into this file (matplotlib)"
    parser.add_argument("--figure", type=cli.file, help=side)
    args = parser.parse_args()
    from mtl.output import report  # here: --help need not wait for what these import
    from mtl.report import page

    histories = report.histories(args.runs)
    for name, history in histories.items():
        print(f"{name}\n{report.table(history)}\n")
        if history.choice:
            print(f"{report.choice(history.choice)}\n")
    if args.figure:
        report.figure(histories, args.figure)
        print(f"written: {args.figure}")
    out = args.out or (None if len(args.runs) == 1 else Path(page.NAME))
    if out and out.is_dir():
        out /= page.NAME
    print(f"written: {page.write(args.runs, out)}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
