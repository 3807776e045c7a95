"""Seconds of a merge, ours beside mergekit's, on the same models: `python benchmarks/merge.py
[--mergekit .cache/mergekit/bin/mergekit-yaml] [--megabytes 1024]`.

Both run as programs, start-up included, on bf16 Llama models of random weights, in shards.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # ours with its settings, and the same work in mergekit's words
    "average": (["average"], {"merge_method": "linear"}),
    "task_arithmetic": (["task_arithmetic"], {"merge_method": "task_arithmetic"}),
    "ties": (["ties", "--set", "density=0.4"], {"merge_method": "ties", "density": 0.4}),
    "select": (["select"], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / ".cache" / "mergekit" / "bin" / "mergekit-yaml"
    parser.add_argument("--mergekit", type=Path, default=default)
    parser.add_argument("--megabytes", type=int, default=1024, help="of each of the four models")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _models(folder, args.megabytes)
        print("method            ours (s)  mergekit (s)")
        for method, (ours, plan) in METHODS.items():
            seconds = [_ours(folder, ours) for _ in range(args.repeat)]
            shown = f"{method:16}  {statistics.median(seconds):8.1f}"
            if plan and args.mergekit.is_file():
                theirs = [_theirs(folder, args.mergekit, plan) for _ in range(args.repeat)]
                shown += f"  {statistics.median(theirs):12.1f}"
            print(shown, flush=True)


def _models(folder: Path, megabytes: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, megabytes * 2**20 // 2 // 12_600_000)  # 12.6 million parameters in a layer
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2752, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    for name in "abc":
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-3 * torch.randn_like(p)
        model.save_pretrained(folder / name, max_shard_size="200MB")


def _ours(folder: Path, method: list[str]) -> float:
    models = [str(folder / name) for name in "abc"]
    given = ["--base", str(folder / "base"), "--models", *models, "--method", *method]
    program = [sys.executable, str(ROOT / "launch" / "merge.py"), *given]
    return _timed(folder, [*program, "--force", "--out", str(folder / "out")])


def _theirs(folder: Path, program: Path, plan: dict) -> float:
    more = {"density": plan["density"]} if "density" in plan else {}
    content = {
        "merge_method": plan["merge_method"],
        "dtype": "bfloat16",
        "models": [
            {"model": str(folder / name), "parameters": {"weight": 1.0, **more}} for name in "abc"
        ],
        **({} if plan["merge_method"] == "linear" else {"base_model": str(folder / "base")}),
    }
    (folder / "plan.yaml").write_text(json.dumps(content))  # JSON is YAML
    return _timed(folder, [str(program), str(folder / "plan.yaml"), str(folder / "out"), "--quiet"])


def _timed(folder: Path, command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=_environment())
    seconds = time.perf_counter() - began
    subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    return seconds


def _environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}


if __name__ == "__main__":
    main()
