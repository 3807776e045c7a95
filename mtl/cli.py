"""The console script `mtl`: `mtl train --config x.yaml` is `python launch/train.py --config
x.yaml`, and so on.

A launcher takes the module instead of the file: `torchrun --nproc_per_node 8 -m mtl.cli train
--config x.yaml`, `deepspeed --module mtl.cli train --config x.yaml`.
"""

import argparse
import ast
import runpy
import sys
from pathlib import Path

PROGRAMS = ("train", "check", "export", "report", "replicas", "migrate_mftcoder")


def options(parser: argparse.ArgumentParser) -> None:
    """The options that say which experiment: the same for every program that reads a config."""
    parser.add_argument("--config", required=True, help="the experiment's YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, as in optimizer.lr=1e-5",
    )
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package whose code the YAML may name",
    )


def folder() -> Path:
    """Where the programs are: in the package where a wheel was installed, beside it in a
    checkout.
    """
    here = Path(__file__).resolve().parent
    return here / "launch" if (here / "launch").is_dir() else here.parent / "launch"


def main() -> None:
    """Run a program in this process, as if its file had been started."""
    arguments = [
        one for one in sys.argv[1:] if not one.startswith(("--local_rank", "--local-rank"))
    ]
    named = arguments[0] if arguments else ""
    if named not in PROGRAMS:
        print(_usage(), file=sys.stdout if named in ("-h", "--help") else sys.stderr)
        sys.exit(0 if named in ("-h", "--help") else 2)
    program = folder() / f"{named}.py"
    sys.argv = [str(program), *arguments[1:]]
    runpy.run_path(str(program), run_name="__main__")


def _usage() -> str:
    first = {name: _document(folder() / f"{name}.py").partition("\n")[0] for name in PROGRAMS}
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {text}" for name, text in first.items()]
    where = f"programs, and templates for SLURM, Kubernetes and hostfiles: {folder()}"
    return "\n".join(
        ["usage: mtl PROGRAM [options]      (mtl PROGRAM --help)", "", *lines, "", where]
    )


def _document(program: Path) -> str:
    return ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    main()
