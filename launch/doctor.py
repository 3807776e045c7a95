"""Whether this machine can train: `python launch/doctor.py [--processes N]`.

Prints what is here and which versions, starts N processes, and measures what they can sum. It
refuses versions that are known to be wrong. Under a launcher its ranks take part, on all hosts:
`torchrun --nnodes 2 ... launch/doctor.py`. Exit code 0: nothing is wrong.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__, is_launched=True)
    add, started = parser.add_argument, "processes to start, where no launcher has (default: 2)"
    add("--processes", type=cli.positive, default=2, metavar="N", help=started)
    add("--minutes", type=cli.positive, default=2, metavar="M", help="to wait for the others")
    args = parser.parse_args()
    process.settle()  # before torch is imported
    from mtl.check import doctor

    if "RANK" in os.environ:
        doctor.talk(args.minutes, print)
        return
    for line in [*doctor.machine(), *doctor.versions()]:
        print(line, flush=True)
    doctor.check()
    for line in doctor.speed():
        print(line, flush=True)
    doctor.start(args.processes, [sys.executable, __file__, "--minutes", str(args.minutes)])


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
