"""The console script `mtl`: `mtl train --config x.yaml` is `python launch/train.py --config x.yaml`, and so on.

A launcher takes the module instead of the file: `torchrun --nproc_per_node 8 -m mtl.cli train --config x.yaml`,
`deepspeed --module mtl.cli train --config x.yaml`.
"""

import argparse
import ast
import runpy
import sys
from pathlib import Path

PROGRAMS = ("train", "check", "export", "report")


def options(parser: argparse.ArgumentParser) -> None:
    """The options that say which experiment: the same for every program that reads a config."""
    parser.add_argument("--config", required=True, help="the experiment's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in optimizer.lr=1e-5")
    parser.add_argument(
        "--allow-code", action="append", default=[], metavar="PACKAGE", help="a package whose code the YAML may name"
    )


def folder() -> Path:
    """Where the programs are: beside the package in a checkout, in it where it was installed with them."""
    here = Path(__file__).resolve().parent
    return next((path for path in (here.parent / "launch", here / "launch") if (path / "train.py").is_file()), here / "launch")


def main() -> None:
    """Run a program in this process, as if its file had been started."""
    arguments = [one for one in sys.argv[1:] if not one.startswith(("--local_rank", "--local-rank"))]
    named = arguments[0] if arguments else ""
    if named not in PROGRAMS:
        print(_usage(), file=sys.stdout if named in ("-h", "--help") else sys.stderr)
        sys.exit(0 if named in ("-h", "--help") else 2)
    program = folder() / f"{named}.py"
    if not program.is_file():
        sys.exit(f"error: {program}: no such file. Install from a checkout (pip install -e .), or run launch/{named}.py there.")
    sys.argv = [str(program), *arguments[1:]]
    runpy.run_path(str(program), run_name="__main__")


def _usage() -> str:
    first = {name: _document(folder() / f"{name}.py").partition("\n")[0] for name in PROGRAMS}
    lines = [f"  {name:8} {text}" for name, text in first.items()]
    return "\n".join(["usage: mtl PROGRAM [options]      (mtl PROGRAM --help)", "", *lines])


def _document(program: Path) -> str:
    return (ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or "") if program.is_file() else ""


if __name__ == "__main__":
    main()
