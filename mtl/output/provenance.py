"""What a run is made of: recorded before its first step, and compared when it resumes."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mtl.config import Config
from mtl.data.encoded import TaskData
from mtl.output.checkpoint import FORMAT, STEPS

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "peft",
    "accelerate",
    "tokenizers",
    "numpy",
)
# What the exact continuation of a run depends on. The balancer checks its own settings and tasks.
DECIDES = (
    "model.name",
    "model.revision",
    "model.loader",
    "model.adapter",
    "model.precision",
    "model.lora",
    "model.quantize",
    "objective",
    "mix",
    "batch.examples",
    "train.seed",
    "train.from",
    "train.order",
    "optimizer",
    "schedule",
    "evaluate.every",
    "evaluate.best",
    "evaluate.probe",
    "evaluate.patience",
    "gram",
    "average",
)


def record(
    config: Config, tasks: list[TaskData], steps: int, world: int, identity: dict[str, Any]
) -> dict[str, Any]:
    """Everything needed to say later what this run was."""
    return {
        "format": FORMAT,
        "command": sys.argv,
        "config": config.resolved(),
        "steps": steps,
        "world": world,
        "tasks": {
            task.name: {
                split: {
                    "fingerprint": data.fingerprint,
                    "rows": len(data),
                    "target_tokens": int(data.targets.sum()),
                }
                for split, data in (("train", task.train), ("validation", task.validation))
            }
            for task in tasks
        },
        "versions": versions(),
        "git": git_revision(),
        "identity": identity,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def identity(config: Config, tasks: list[TaskData], steps: int) -> dict[str, Any]:
    """Name to plain value: what a checkpoint and the run that goes on from it must share."""
    resolved = config.resolved()
    same: dict[str, Any] = {}
    for path in DECIDES:
        value: Any = resolved
        for key in path.split("."):
            value = value[key]
        same[path] = value
    if same["evaluate.patience"] is not None:  # as before these keys were there
        action = same["evaluate.patience"]["action"]
        new = {"keep": action == "anchor", "from": same["evaluate.patience"]["from"] is not None}
        same["evaluate.patience"] = {
            key: value for key, value in same["evaluate.patience"].items() if new.get(key, True)
        }
    if same["mix"]["follow"] is None:  # as in checkpoints of before it was there
        same["mix"] = {key: same["mix"][key] for key in ("shares", "temperature")}
    order = same["train.order"]
    if order is not None and order["scheme"] == "batch":  # its last window ends where the run does
        same["train.order"] = {**order, "steps": steps}
    for task in tasks:
        for key in ("share", "epochs"):
            same[f"tasks.{task.name}.{key}"] = resolved["tasks"][task.name][key]
        same[f"tasks.{task.name}.train (content)"] = task.train.fingerprint
        same[f"tasks.{task.name}.validation (content)"] = task.validation.fingerprint
    for name, task in resolved["tasks"].items():
        for key in ("of", "loss", "objective"):
            # Only where they are given, so that checkpoints of before still agree.
            if task[key] is not None:
                same[f"tasks.{name}.{key}"] = task[key]
    return {"tasks": list(config.tasks), STEPS: steps, **same}


def git_revision() -> str | None:
    """Of the checkout that holds this code; None where there is none, or no git."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An environment may lie within a repository of something else.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None  # the versions are recorded all the same
