"""From an MFTCoder training config (JSON) and its data to a YAML and data files of ours.

    python launch/migrate_mftcoder.py coba_train_config.json --world 8 --out migrated

writes migrated/config.yaml, migrated/chat_template.jinja (MFTCoder's role markers) and
migrated/data/TASK.{train,validation}.jsonl, and says of every key what became of it. Nothing is
guessed: a key or a row it does not know is an error.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("config", type=Path, help="MFTCoder's training config")
    parser.add_argument(
        "--world",
        type=int,
        required=True,
        help="GPUs that it ran on: decides the examples of a global batch",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    from mtl.migrate.mftcoder import migrate  # here: --help need not wait for what it imports

    for line in migrate(args.config, args.world, args.out):
        print(line)
    print(f"written: {args.out / 'config.yaml'}")


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
