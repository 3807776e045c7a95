"""A starter YAML from data files: `python launch/init.py data/code.train.jsonl --out x.yaml`.

Formats are recognised by the rows, tasks are named by the files. Pairs are found by their names
(code.train.jsonl, code.valid.jsonl); a validation file beside a training file need not be named.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL, JSON, CSV, TSV or Parquet")
    parser.add_argument("--out", type=cli.file, help="file to write; the terminal where left out")
    args = parser.parse_args()
    from mtl.check.starter import starter  # here: help comes at once without torch

    text = starter(args.files)
    if args.out is None:
        print(text, end="")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with args.out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(
            f"{args.out}: found a file, wanted a new name. Nothing was changed."
        ) from None
    print(f"written: {args.out}; next: mtl check --config {args.out}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
