"""The model card: what an exported model was trained on, how, and with what result. It is read from
the run's files.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import mtl
from mtl.config import dump
from mtl.output.files import run_record
from mtl.output.trackers import read_metrics


def card(checkpoint: Path, *, adapter: bool, weights: str = "model") -> str:
    """The text of a README.md, with the hub's metadata on top.

    Args:
        checkpoint: a folder `step-...` in the `checkpoints` of a run. Without the run around it the
            card says less.
        adapter: whether PEFT loads the folder, rather than transformers.
        weights: "model", or "average": the losses are those of the averaged weights.
    """
    # RUN/checkpoints/step-..., whose parents a relative path need not name
    checkpoint = checkpoint.resolve()
    run = checkpoint.parent.parent
    number = checkpoint.name.rpartition("-")[2]
    step = int(number) if number.isdigit() else None
    library = {"library_name": "peft" if adapter else "transformers"}
    record = _json(run_record(run, step))
    if not record:
        return _page(library, [f"# {checkpoint.name}", "", _made(None, step)])
    config, tasks, base = record["config"], record["tasks"], _base(checkpoint)
    losses = _losses(run / "metrics.jsonl", list(tasks), step, weights)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    sections = {
        "Tasks": _tasks(tasks, losses, _unit(config)),
        "Use": _code("python", *_use(config, adapter)),
        "Balancer": _yaml({"balancer": config["balancer"]}),
        "Config": [
            "<details><summary>The experiment, with defaults</summary>",
            "",
            *_yaml(config),
            "",
            "</details>",
        ],
        "Versions": [versions],
    }
    lines = [f"# {run.name or checkpoint.name}", "", _summary(record, base, step, weights)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return _page(_metadata(config, base, library), lines)


def _metadata(config: dict[str, Any], base: str | None, library: dict[str, str]) -> dict[str, Any]:
    base = base or config["model"]["name"]
    return {
        # The hub refuses a card whose base model is a folder.
        "base_model": None if Path(base).expanduser().exists() else base,
        **library,
        "pipeline_tag": _PIPELINES.get(_loader(config)),
        "tags": ["coba-mtl", "multitask", _method(config).rpartition(":")[2]],
    }


def _summary(record: dict[str, Any], base: str | None, step: int | None, weights: str) -> str:
    config = record["config"]
    kind = "LoRA" if base else "full fine-tuning"
    if config["model"].get("quantize"):
        kind = f"LoRA on {config['model']['quantize']} weights"
    averaged = ", its weights averaged along the run" if weights == "average" else ""
    return (
        f"`{base or config['model']['name']}` fine-tuned ({kind}) on {len(record['tasks'])} tasks "
        f"at once, their losses balanced by {_method(config)}{averaged}. {_made(record, step)}"
    )


def _method(config: dict[str, Any]) -> str:
    balancer = config["balancer"]
    return balancer if isinstance(balancer, str) else balancer["name"]


def _code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _yaml(value: dict[str, Any]) -> list[str]:
    return _code("yaml", dump(value).rstrip())


_PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
}


def _loader(config: dict[str, Any]) -> str:
    loader = config["model"].get("loader", "causal_lm")
    return loader if isinstance(loader, str) else loader["name"]


def _use(config: dict[str, Any], adapter: bool) -> list[str]:
    """Lines of Python that open the folder."""
    loader = _loader(config)
    if loader == "causal_lm":
        return _USE_ADAPTER if adapter else _USE_MODEL
    if loader == "sequence_classification" and not adapter:
        return [line.replace("CausalLM", "SequenceClassification") for line in _USE_MODEL]
    allowed = f", allow_code=[{loader.partition('.')[0]!r}]" if ":" in loader else ""
    return [
        "import mtl",
        "from transformers import AutoTokenizer",
        "",
        f'model = mtl.load("."{allowed})',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]


_USE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")""".splitlines()
_USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")""".splitlines()


def _made(record: dict[str, Any] | None, step: int | None) -> str:
    of = f" of {record['steps']:,}" if record else ""
    return f"Made by coba-mtl {mtl.__version__}" + (
        f" at step {step:,}{of}." if step is not None else "."
    )


def _unit(config: dict[str, Any]) -> str:
    objective = config.get("objective", "causal_lm")
    name = objective if isinstance(objective, str) else objective["name"]
    units = {"causal_lm": "nats per target token", "classification": "nats per example"}
    return units.get(name, f"those of `{name}`")


def _tasks(
    tasks: dict[str, Any], losses: dict[str, tuple[float, float, int]], unit: str
) -> list[str]:
    """A table; losses in their unit."""
    lines = [
        "| task | training rows | target tokens | validation rows "
        "| validation loss before | here |",
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
    return [*lines, "", f"Losses are {unit}.{note}"]


def _losses(
    path: Path, tasks: list[str], step: int | None, weights: str
) -> dict[str, tuple[float, float, int]]:
    """Per task its validation loss on the first pass, on the last one up to `step`, and that one's
    step.
    """
    if not path.is_file():
        return {}
    try:
        records = read_metrics(path)
    except ValueError:
        return {}  # the columns stay empty; the run's table at its end says why
    # The last pass up to the step: a checkpoint need not stand at a pass.
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


def _base(checkpoint: Path) -> str | None:
    """The base model that an adapter names; of a whole model None."""
    found = [_json(checkpoint / name / "adapter_config.json") for name in ("model", "")]
    return next((one["base_model_name_or_path"] for one in found if one), None)


def _page(metadata: dict[str, Any], lines: list[str]) -> str:
    return "\n".join(["---", ModelCardData(**metadata).to_yaml(), "---", "", *lines]) + "\n"


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where it is missing or damaged, and the card says less."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
