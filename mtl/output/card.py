"""The model card: what an exported model was trained on, how, and with what result. Read from the
run's own files.
"""

import json
from pathlib import Path
from typing import Any

import mtl
from mtl.config import dump


def card(checkpoint: Path, *, adapter: bool, weights: str = "model") -> str:
    """The text of a README.md, with the hub's metadata on top.

    Args: checkpoint: a folder `step-...` in the `checkpoints` of a run. Without the run around it
        the card says less. adapter: whether PEFT loads the folder, rather than transformers.
        weights: "model", or "average": the losses are those of the averaged weights.
    """
    run = checkpoint.parent.parent
    step = (
        int(checkpoint.name.rpartition("-")[2])
        if checkpoint.name.rpartition("-")[2].isdigit()
        else None
    )
    record = _json(run / "run.json")
    if not record:
        return _page(
            {"library_name": "peft" if adapter else "transformers"},
            [f"# {checkpoint.name}", "", _made(None, step)],
        )
    config = record["config"]
    base, balancer = config["model"]["name"], config["balancer"]
    method = balancer if isinstance(balancer, str) else balancer["name"]
    metadata = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coba-mtl", "multitask", method.rpartition(":")[2]],
    }
    kind = "full fine-tuning" if config["model"]["lora"] is None else "LoRA"
    if config["model"].get("quantize"):
        kind = f"LoRA on {config['model']['quantize']} weights"
    averaged = ", its weights averaged along the run" if weights == "average" else ""
    lines = [
        f"# {run.name or checkpoint.name}",
        "",
        f"`{base}` fine-tuned ({kind}) on {len(record['tasks'])} tasks at once, their losses "
        f"balanced by {method}{averaged}. {_made(record, step)}",
        "",
        "## Tasks",
        "",
        *_tasks(
            record["tasks"], _losses(run / "metrics.jsonl", list(record["tasks"]), step, weights)
        ),
        "",
        "## Use",
        "",
        "```python",
        *(_USE_ADAPTER if adapter else _USE_MODEL),
        "```",
        "",
        "## Balancer",
        "",
        "```yaml",
        dump({"balancer": balancer}).rstrip(),
        "```",
        "",
        "## Config",
        "",
        "<details><summary>The experiment, with defaults</summary>",
        "",
        "```yaml",
        dump(config).rstrip(),
        "```",
        "",
        "</details>",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    return _page(metadata, lines)


_USE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")""".splitlines()
_USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")""".splitlines()


def _made(record: dict[str, Any] | None, step: int | None) -> str:
    of = f" of {record['steps']:,}" if record else ""
    return f"Made by coba-mtl {mtl.__version__}" + (
        f" at step {step:,}{of}." if step is not None else "."
    )


def _tasks(tasks: dict[str, Any], losses: dict[str, tuple[float, float, int]]) -> list[str]:
    """A table; losses in nats per target token."""
    lines = [
        (
            "| task | training rows | target tokens | validation rows | validation loss before | here "
            "|"
        ),
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, splits in tasks.items():
        train, validation = splits["train"], splits["validation"]
        before, here, _ = losses.get(name, (None, None, None))
        shown = [f"{x:.4f}" if x is not None else "" for x in (before, here)]
        lines.append(
            f"| {name} | {train['rows']:,} | {train['target_tokens']:,} | {validation['rows']:,} | "
            f"{' | '.join(shown)} |"
        )
    measured = {at for _, _, at in losses.values()}
    note = f" They were measured at step {measured.pop():,}." if measured else ""
    return [*lines, "", f"Losses are in nats per target token.{note}"]


def _losses(
    path: Path, tasks: list[str], step: int | None, weights: str
) -> dict[str, tuple[float, float, int]]:
    """Per task its validation loss on the first pass, on the last one up to `step`, and that one's
    step.
    """
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    passes = [r for r in records if "eval/macro" in r and (step is None or r["step"] <= step)]
    if not passes:
        return {}
    first, last = passes[0], passes[-1]
    within = "eval/average" if weights == "average" else "eval"
    tags = {name: (f"eval/{name}/loss", f"{within}/{name}/loss") for name in tasks}
    return {
        name: (first[before], last[here], last["step"])
        for name, (before, here) in tags.items()
        if before in first and here in last
    }


def _page(metadata: dict[str, Any], lines: list[str]) -> str:
    return "\n".join(["---", dump(metadata).rstrip(), "---", "", *lines]) + "\n"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
