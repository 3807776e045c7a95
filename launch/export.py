"""A checkpoint as a folder to use: `python launch/export.py
runs/quickstart/checkpoints/step-00000120 my-model [--merge]`.

The folder holds the model, or the LoRA adapter, as safetensors, the tokenizer with its chat
template, the generation config and a model card. Without --merge an adapter stays an adapter and
names its base model as the run's YAML does.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import process

process.settle()  # before torch is imported

from mtl.output.export import DTYPES, export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a folder step-... in the checkpoints of a run",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the folder to write; an earlier export there is replaced",
    )
    parser.add_argument(
        "--merge", action="store_true", help="add the adapter to its base model and write the whole"
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="the averaged weights, where the run's YAML has `average:`",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="type of the parameters; as trained where left out"
    )
    parser.add_argument(
        "--allow-remote-code",
        action="store_true",
        help="code that comes with the base model may run (--merge)",
    )
    args = parser.parse_args()
    out = export(
        args.checkpoint,
        args.out,
        args.dtype,
        merge=args.merge,
        allow_remote_code=args.allow_remote_code,
        weights="average" if args.average else "model",
    )
    print(f"{'merged model' if args.merge else 'model'}, of {args.checkpoint.name}: {out}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
