"""The arms of ZeroAE's comparison, one after another. A finished arm stays, a stopped one goes on.

    python benchmarks/zeroae.py --seeds 3 --output runs/zeroae-arms --page docs/zeroae.md
    python benchmarks/zeroae.py ... --arms coba pseudo            some of them

Every run leaves OUTPUT/ARM.SEED.json: its accuracies, and what each round counted. What each arm
is: `ARMS`. The baselines read the same texts.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl.compare.report import insert
from mtl.compare.statistics import mean_interval

SETS = "pool", "test"
# By name: the tasks that are left, keywords of the generator, the balancer, switches of the rounds.
ARMS: dict[str, dict[str, Any]] = {
    "coba": {},
    "equal": {"balancer": "Equal"},  # 1:1, as published
    "pseudo": {"tasks": ["pseudo"]},  # Gera et al. with an encoder that learns
    "generated": {"tasks": ["generated", "recon"]},
    "no-adversary": {"generator": {"gamma": 0.0}},
    "no-codes": {"generator": {"codes": 1, "gamma": 0.0}},
    "no-uncertain": {"switches": ["--no-uncertain"]},
}
# A column: the key of a round's counts, and its last round's mean is shown.
COUNTS = {
    "pseudo-labels right": "pseudo", "code tells the class": "code_probe",
    "(most frequent)": "code_chance", "copied": "copied", "distinct-2": "distinct_2",
}  # fmt: skip


def config(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """`args.config`, changed as the arm says."""
    text = args.config.read_text()
    made = yaml.safe_load(text.replace(".cache/quickstart", str(args.data)))
    how, tasks = ARMS[arm], made["tasks"]
    made["tasks"] = {name: tasks[name] for name in how.get("tasks", tasks)}
    if "recon" in made["tasks"]:
        made["tasks"]["recon"]["objective"] |= how.get("generator", {})
    parts = made["balancer"]["parts"].items()
    left = {part: [name for name in each if name in made["tasks"]] for part, each in parts}
    made["balancer"]["parts"] = {part: each for part, each in left.items() if each}
    if "balancer" in how:
        made["balancer"]["balancer"] = how["balancer"]
    made["train"] = {"steps": args.steps, "seed": seed}
    made["evaluate"]["every"] = args.steps
    return made


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    result, folder = args.output / f"{arm}.{seed}.json", args.output / f"{arm}.{seed}"
    if result.exists():
        return
    path, data = args.output / f"{arm}.{seed}.yaml", args.data / "zeroae"
    path.write_text(yaml.safe_dump(config(arm, seed, args), sort_keys=False))
    gold = {name: str(data / f"{name}.gold.jsonl") for name in SETS}
    command = [
        sys.executable, str(ROOT / "launch" / "zeroae.py"), "--config", str(path),
        "--pool", str(data / "pool.jsonl"), "--out", str(folder), "--rounds", str(args.rounds),
        "--gold", *gold.values(), *ARMS[arm].get("switches", []), *shlex.split(args.given),
    ]  # fmt: skip
    print(f"{arm}, seed {seed}", flush=True)
    begun = time.monotonic()
    with (args.output / f"{arm}.{seed}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    told = json.loads((folder / "gold.json").read_text())
    notes = [json.loads(p.read_text()) for p in sorted(folder.glob("round-*/round.json"))]
    record = {
        "arm": arm, "seed": seed, "rounds": args.rounds, "steps": args.steps, "given": args.given,
        "seconds": round(time.monotonic() - begun),  # less than the whole where it went on
        "accuracy": {name: told["accuracy"][file] for name, file in gold.items()},
        # By a text's true class where both have a count.
        "each": [note | right for note, right in zip(notes, told["rounds"], strict=True)],
    }  # fmt: skip
    result.write_text(json.dumps(record, indent=1) + "\n")


def baselines(data: Path) -> dict[str, dict[str, float]]:
    """Name -> accuracy on each set, by the encoder as it is."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from mtl.recipes.shared import masked_mean
    from mtl.recipes.zeroae import baselines as known
    from mtl.recipes.zeroae import measures
    from mtl.recipes.zeroae.objective import PROMPT

    model = AutoModel.from_pretrained(data / "minilm").eval()
    tokenizer = AutoTokenizer.from_pretrained(data / "minilm")

    @torch.no_grad()
    def read(texts: list[str]) -> np.ndarray:
        found = []
        for at in range(0, len(texts), 64):
            batch = tokenizer(texts[at : at + 64], padding=True, truncation=True, max_length=64,
                              return_tensors="pt")  # fmt: skip
            mean = masked_mean(model(**batch).last_hidden_state, batch["attention_mask"])
            found.append(known.unit(mean.double().numpy()))
        return np.concatenate(found)

    names = json.loads((data / "zeroae" / "labels.json").read_text())
    prompts = read([PROMPT.format(label=name) for name in names])
    found: dict[str, dict[str, float]] = {}
    for name in SETS:
        rows = measures.read(data / "zeroae" / f"{name}.gold.jsonl")
        texts, label = read([r["text"] for r in rows]), [names.index(r["label"]) for r in rows]
        scores = known.cosine(texts, prompts)
        for method, each in {
            "cosine": scores,
            "the class prior removed": known.without_prior(scores),
            "self-training, 1 % a class": known.self_training(texts, prompts),
            "self-training, 3 % a class": known.self_training(texts, prompts, share=0.03),
            "soft prototypes": known.prototypes(texts, prompts),
            "with labels: a linear head": known.supervised(texts, np.array(label), len(names)),
        }.items():
            found.setdefault(method, {})[name] = float((each.argmax(1) == label).mean())
    return found


def table(args: argparse.Namespace) -> str:
    """A line for each baseline and arm: means over seeds; and what an arm is above CoBa's, seed by
    seed, on the pool.
    """
    head = ["", "seeds", "pool", "texts apart", "pool, above CoBa, 95 %", *COUNTS]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    rest = " |" * (1 + len(COUNTS))
    for method, found in json.loads((args.output / "baselines.json").read_text()).items():
        lines.append(f"| {method} | | {found['pool']:.3f} | {found['test']:.3f} |{rest}")
    runs = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.[0-9]*.json"))]
    runs = [one for one in runs if (one["rounds"], one["steps"]) == (args.rounds, args.steps)]
    each = {a: {one["seed"]: one for one in runs if one["arm"] == a} for a in ARMS}
    for arm, seeds in each.items():
        if not seeds:
            continue
        reached = [np.mean([one["accuracy"][name] for one in seeds.values()]) for name in SETS]
        both = sorted(set(seeds) & set(each["coba"])) if arm != "coba" else []
        above = [seeds[s]["accuracy"]["pool"] - each["coba"][s]["accuracy"]["pool"] for s in both]
        said = f"{np.mean(above):+.3f}" if above else ""
        if len(above) == 1:
            said += ", one seed"
        elif above:
            said += " ({:+.3f} to {:+.3f})".format(*mean_interval(above))
        cells = [str(len(seeds)), *(f"{x:.3f}" for x in reached), said]
        for key in COUNTS.values():
            last = [one["each"][-1].get(key) for one in seeds.values()]
            cells.append(f"{np.mean(last):.3f}" if None not in last else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "zeroae.yaml")
    parser.add_argument("--given", default="", help="further switches of launch/zeroae.py")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--data", type=Path, default=Path(".cache/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/zeroae-arms"))
    parser.add_argument("--page", type=Path, help="write the table there too (docs/zeroae.md)")
    parser.add_argument("--report", action="store_true", help="start no run")
    args = parser.parse_args()
    args.data, args.output = args.data.resolve(), args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "baselines.json"
    if not path.exists():
        path.write_text(json.dumps(baselines(args.data), indent=1) + "\n")
    for seed in range(0 if args.report else args.seeds):
        for arm in args.arms:
            run(arm, seed, args)
    print(table(args))
    if args.page:
        text = f"{args.rounds} rounds of {args.steps} steps.\n\n{table(args)}\n"
        insert(args.page, "zeroae", text, by="benchmarks/zeroae.py")


if __name__ == "__main__":
    main()
