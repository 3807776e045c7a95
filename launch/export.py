"""A checkpoint as a folder to use: `python launch/export.py
runs/quickstart/checkpoints/step-00000120 my-model [--merge]`.

The folder holds the model, or the LoRA adapter, as safetensors, the tokenizer with its chat
template, the generation config and a model card. Without --merge an adapter stays an adapter and
names its base model as the run's YAML does.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-... of a run")
    add("out", type=Path, metavar="OUT", help="folder to write; an earlier export is replaced")
    add("--merge", action="store_true", help="add the adapter to its base model, write the whole")
    add("--average", action="store_true", help="the averaged weights, of a run with `average:`")
    add("--dtype", choices=["fp32", "bf16"], help="of the parameters; as trained where left out")
    add("--allow-remote-code", action="store_true", help="the base model's code may run (--merge)")
    add("--push", metavar="REPO", help="upload the folder to this hub repository, made private")
    add("--public", action="store_true", help="a new repository is public (--push)")
    args = parser.parse_args()
    process.settle()  # before torch is imported, and that after the arguments: help comes at once

    from mtl.output.export import export, push

    out = export(
        args.checkpoint,
        args.out,
        args.dtype,
        merge=args.merge,
        allow_remote_code=args.allow_remote_code,
        weights="average" if args.average else "model",
    )
    print(f"{'merged model' if args.merge else 'model'}, of {args.checkpoint.name}: {out}")
    if args.push:
        print(f"pushed: {push(out, args.push, public=args.public)}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
