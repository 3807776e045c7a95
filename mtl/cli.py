"""The console script `mtl`: `mtl train --config x.yaml` is `python launch/train.py --config
x.yaml`, and so on.

A launcher takes the module instead of the file: `torchrun --nproc_per_node 8 -m mtl.cli train
--config x.yaml`, `deepspeed --module mtl.cli train --config x.yaml`.
"""

import argparse
import ast
import difflib
import runpy
import sys
from pathlib import Path

import mtl
from mtl import process

PROGRAMS = (
    "init", "doctor", "check", "train", "evaluate", "export", "merge", "choose", "report", "replay",
    "replicas", "imbalance", "migrate_mftcoder", "compare", "zeroae",
)  # fmt: skip


def parser(
    doc: str | None,
    *,
    reads_config: bool = False,
    is_launched: bool = False,
    encodes: bool = False,
    resumes: bool = False,
) -> argparse.ArgumentParser:
    """A program's parser, with its docstring as the help.

    Args:
        reads_config: it has the options that say which experiment.
        is_launched: it takes the rank that launchers append to their command.
        encodes: it has the option to encode damaged data of the cache anew.
        resumes: it has `--resume`: False without, True alone, a step's number with one.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, many = made.add_argument, {"action": "append", "default": []}
    if reads_config:
        code = "a package whose code the YAML may name"
        add("--config", required=True, help="the experiment's YAML")
        add("--set", metavar="KEY=VALUE", help="override, as in optimizer.lr=1e-5", **many)
        add("--allow-code", metavar="PACKAGE", help=code, **many)
    if encodes:
        anew = "compare the whole cache with its checksums, and encode anew what is damaged"
        add("--rebuild-cache", action="store_true", help=anew)
    if resumes:
        going_on = "go on from the newest checkpoint in `output`, or from that of a step"
        step = {"nargs": "?", "const": True, "default": False, "type": int, "metavar": "STEP"}
        add("--resume", help=going_on, **step)
    if is_launched:
        add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return made


def positive(text: str) -> int:
    """An option's value that counts something."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text}, wanted at least 1")
    return int(text)


def file(text: str) -> Path:
    """An option's value that names a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"found {text}, a folder, wanted a file's name")
    return Path(text)


def folder() -> Path:
    """Where the programs are: in the package where a wheel was installed, beside it in a
    checkout.
    """
    here = Path(__file__).resolve().parent
    return here / "launch" if (here / "launch").is_dir() else here.parent / "launch"


def main() -> None:
    """Run a program in this process, as if its file had been started, under its name here."""
    # deepspeed puts its rank in front of the program's name.
    arguments = [
        one for one in sys.argv[1:] if not one.startswith(("--local_rank", "--local-rank"))
    ]
    named = arguments[0] if arguments else ""
    if named == "--version":
        print(f"mtl {mtl.__version__}")
        return
    if named not in PROGRAMS:
        if named in ("", "-h", "--help"):
            print(_usage(), file=sys.stdout if named else sys.stderr)
            sys.exit(0 if named else 2)
        close = difflib.get_close_matches(named, PROGRAMS, n=1)
        hint = f"Did you mean {close[0]}?" if close else "mtl --help lists them."
        print(f"error: found {named!r}, wanted {', '.join(PROGRAMS)}. {hint}", file=sys.stderr)
        sys.exit(2)
    program = runpy.run_path(str(folder() / f"{named}.py"))
    sys.argv = [f"mtl {named}", *arguments[1:]]  # what its help calls it
    sys.exit(process.exit_code(program["main"]))


def _usage() -> str:
    first = {name: _document(folder() / f"{name}.py") for name in PROGRAMS}
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {text}" for name, text in first.items()]
    where = f"programs, and templates for SLURM, Kubernetes and hostfiles: {folder()}"
    return "\n".join(
        [
            "usage: mtl PROGRAM [options]   (mtl PROGRAM --help; mtl --version)",
            "",
            *lines,
            "",
            where,
        ]
    )


def _document(program: Path) -> str:
    """What a program is for: the first line of its docstring, up to the command."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(": `")[0]


if __name__ == "__main__":
    main()
