"""The arms of KPE's comparison, one after another. A finished arm stays, a stopped one goes on.

    python benchmarks/kpe.py --tasks rare --steps 2000 --seeds 6 --output runs/kpe-arms
    python benchmarks/kpe.py ... --arms other own coba            some of them

Every run leaves OUTPUT/ARM.SEED.json: accuracy at each full pass. What each arm is: `ARMS`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl.compare.report import insert
from mtl.compare.statistics import mean_interval

LOADER = {"name": "kpe", "layers": 2, "width": 64}
# By name: keywords of the loader, tasks beside the rows, balancer, and whose knowledge a row has.
ARMS: dict[str, dict[str, Any]] = {
    "heads": {"loader": {"layers": 0}, "aux": False},
    "other": {
        "aux": False,
        "files": "other.",
    },  # the control: as much compute, another example's knowledge
    "own": {"aux": False},
    "equal": {"balancer": "Equal"},  # 1:1:1, as published
    "coba": {"balancer": {"name": "CoBa", "warmup": 60}},
    "coba-other": {"balancer": {"name": "CoBa", "warmup": 60}, "files": "other."},
    "upgrad": {
        "balancer": {"name": "TorchJD", "method": "UPGrad"},
        "gram": {"params": "^adapters"},
    },
    "states": {"aux": False, "loader": {"start": "states"}},
    "states-other": {"aux": False, "loader": {"start": "states"}, "files": "other."},
    "begins": {"aux": False, "loader": {"start": "zero", "residual": False}},
    "begins-other": {
        "aux": False,
        "loader": {"start": "zero", "residual": False},
        "files": "other.",
    },
    "both": {"aux": False, "loader": {"start": "states", "reads": "both", "residual": False}},
    "both-other": {
        "aux": False,
        "loader": {"start": "states", "reads": "both", "residual": False},
        "files": "other.",
    },
    "no-gate": {"balancer": "Equal", "loader": {"gate": False}},
    "no-attention": {"balancer": "Equal", "loader": {"attend": False}},
    "not-shared": {"balancer": "Equal", "loader": {"share": False}},
}


def config(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """configs/kpe.yaml, changed as the arm says."""
    made = yaml.safe_load((ROOT / "configs" / "kpe.yaml").read_text())
    how = ARMS[arm]
    tasks = {}
    for name in args.tasks:
        files = f"{args.data}/kpe/{name}.{how.get('files', '')}"
        tasks[name] = {"train": f"{files}train.jsonl", "validation": f"{files}valid.jsonl"}
        tasks[name] |= (
            {"format": "choices", "group": "qa"} if len(args.tasks) > 1 else {"format": "choices"}
        )
    if how.get("aux", True):
        tasks |= {loss: {"of": args.tasks, "loss": loss} for loss in ("span", "relation")}
    made["model"] |= {"name": f"{args.data}/minilm", "loader": LOADER | how.get("loader", {})}
    made |= {"tasks": tasks, "balancer": how.get("balancer", "Equal")}
    made |= {
        "train": {"steps": args.steps, "seed": seed},
        "output": str(args.output / f"{arm}.{seed}"),
    }
    made["schedule"]["warmup"] = args.steps // 10
    made["evaluate"]["every"] = max(1, args.steps // 10)
    made["checkpoint"] = {"every": max(1, args.steps // 10), "keep": 1}
    made["export"] = {"which": "none"}
    return made | ({"gram": how["gram"]} if "gram" in how else {})


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    result = args.output / f"{arm}.{seed}.json"
    if result.exists():
        return
    settings, path = config(arm, seed, args), args.output / f"{arm}.{seed}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(path), "--resume"]
    print(f"{arm}, seed {seed}", flush=True)
    with (args.output / f"{arm}.{seed}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, cwd=args.root)
    lines = (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    passes = {line["step"]: line["eval/accuracy"] for line in found if "eval/accuracy" in line}
    record = {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "tasks": args.tasks,
        "accuracy": passes,
    }
    record |= {"best": max(passes.values()), "last": passes[max(passes)]}
    result.write_text(json.dumps(record, indent=1) + "\n")


def cosine(name: str, args: argparse.Namespace) -> float:
    """Accuracy of the option whose mean state is nearest to the question's: no training."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(args.data / "minilm").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.data / "minilm")
    right = 0
    rows = [
        json.loads(x) for x in (args.data / "kpe" / f"{name}.valid.jsonl").read_text().splitlines()
    ]
    for row in rows:
        batch = tokenizer([row["question"], *row["options"]], padding=True, return_tensors="pt")
        with torch.no_grad():
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        right += int((means[1:] @ means[0]).argmax()) == row["answer"]
    return right / len(rows)


def control(arm: str) -> str:
    """The arm that differs from this one in its knowledge alone, or `other`."""
    return f"{arm}-other" if f"{arm}-other" in ARMS else "other"


def table(args: argparse.Namespace) -> str:
    """An arm a line: accuracy of the last pass, and, seed by seed, what it is above its control."""
    each = {
        arm: {
            found["seed"]: found["last"]
            for path in sorted(args.output.glob(f"{arm}.[0-9]*.json"))
            for found in [json.loads(path.read_text())]
            if found["steps"] == args.steps and found["tasks"] == args.tasks
        }
        for arm in ARMS
    }
    lines = ["| arm | seeds | accuracy | control | above it, 95 % |", "|---|---:|---:|---|---|"]
    for name in args.tasks:
        found = json.loads((args.output / f"cosine.{name}.json").read_text())["accuracy"]
        lines.append(f"| cosine, no training ({name}) | | {found:.3f} | | |")
    for arm, seeds in each.items():
        if not seeds:
            continue
        against, said = control(arm), ""
        pairs = [seeds[s] - each[against][s] for s in sorted(seeds) if s in each[against]]
        if arm == against or not pairs:
            against = ""
        elif len(pairs) == 1:
            said = f"{pairs[0]:+.3f}, one seed"
        else:
            low, high = mean_interval(pairs)
            said = f"{sum(pairs) / len(pairs):+.3f} ({low:+.3f} to {high:+.3f})"
        mean = sum(seeds.values()) / len(seeds)
        lines.append(f"| {arm} | {len(seeds)} | {mean:.3f} | {against} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", default=["rare"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(".cache/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/kpe-arms"))
    parser.add_argument("--page", type=Path, help="write the table there too (docs/kpe.md)")
    parser.add_argument("--report", action="store_true", help="start no run")
    args = parser.parse_args()
    args.data, args.output, args.root = args.data.resolve(), args.output.resolve(), Path.cwd()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        path = args.output / f"cosine.{name}.json"
        if not path.exists():
            path.write_text(
                json.dumps({"arm": "cosine", "task": name, "accuracy": cosine(name, args)}) + "\n"
            )
        print(path.read_text().strip(), flush=True)
    for seed in range(0 if args.report else args.seeds):
        for arm in args.arms:
            run(arm, seed, args)
    print(table(args))
    if args.page:
        text = f"{args.steps} steps.\n\n{table(args)}\n"
        insert(args.page, "kpe", text, by="benchmarks/kpe.py")


if __name__ == "__main__":
    main()
