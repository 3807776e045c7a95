"""Losses and measures of models by task: `python launch/evaluate.py --config x.yaml MODEL ...`.

A model is a folder, whole or an adapter. The rows are the YAML's validation rows, or with
`--split test` those of `tasks.X.test`, which no training run reads. Tasks with `metrics` are
answered too (docs/generation.md). Starts under a launcher too.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl import cli, process


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__, reads_config=True, is_launched=True)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="folders of models")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--json", type=cli.file, metavar="FILE", help="write the figures there too")
    answers = "where answers go, a line each, if a task has `metrics` (default: %(default)s)"
    default = Path("predictions.jsonl")
    said = {"metavar": "FILE", "default": default, "help": answers}
    parser.add_argument("--predictions", type=cli.file, **said)
    losses = "measure losses alone: generate no answers"
    parser.add_argument("--losses-only", action="store_true", help=losses)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    process.settle()  # before torch is imported
    from mtl import plugins
    from mtl.compare import evaluation
    from mtl.distributed import comm, engine, rendezvous
    from mtl.merging.report import aligned
    from mtl.output.checkpoint import write_text

    config = plugins.read(args.config, args.set, args.allow_code)
    rendezvous.meet(config.engine.rendezvous_minutes, process.tell)
    with rendezvous.telling():
        asks = not args.losses_only
        data = evaluation.rows(config, args.split, args.allow_code, asks)
    engine.init_process_group(config.engine.timeout_minutes, config.engine.watchdog_minutes)
    given = {"allow_code": args.allow_code, "predictions": args.predictions}
    evaluate = evaluation.evaluator(config, data, **given)
    found, names = {str(model): evaluate(model) for model in args.models}, list(config.tasks)
    if comm.rank() == 0:
        print("\n".join(aligned(evaluation.table(found, names, data))))
        if data.asking:
            print(f"answers: {args.predictions}")
        if args.json:
            write_text(args.json, evaluation.record(found, names, data, args.split) + "\n")
    comm.leave()


if __name__ == "__main__":
    sys.exit(process.exit_code(main))
