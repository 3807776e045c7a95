"""Runs' folders as a run leaves them, without one: numbers in closed form."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("code", "math")


def losses(task: int, step: int, seed: int = 0) -> float:
    """Falls, and rises again: lowest at 20 for the first task, 40 for the second."""
    return 2.0 + task + 0.001 * (step - 20 * (task + 1)) ** 2 + 0.01 * seed


def write(
    folder: Path,
    *,
    tasks: tuple[str, ...] = TASKS,
    steps: int = 60,
    seed: int = 0,
    balancer: Any = "CoBa",
    until: int | None = None,
    scale: float = 1.0,
    **about: Any,
) -> Path:
    """A run of `steps`, recorded until `until`, with a pass every 10 steps."""
    until = steps if until is None else until
    lines: list[dict[str, float]] = []
    for t in range(until + 1):
        if t % 10 == 0 or t == steps:
            found = {task: scale * losses(k, t, seed) for k, task in enumerate(tasks)}
            line = {f"eval/{task}/loss": loss for task, loss in found.items()}
            line |= {"eval/macro": float(np.mean(list(found.values())))}
            lines.append({"step": t, **line, "memory/host_gib": 1.5})
        if t < until:
            line = {"step": t, "train/loss": 2.0, "train/tokens_per_second": 100.0 + t}
            for k, task in enumerate(tasks):
                line |= {
                    f"train/{task}/loss": losses(k, t) + 0.5,
                    f"train/{task}/weight": (k + 1) / sum(range(1, len(tasks) + 1)),
                    f"train/{task}/tokens": 10 * (k + 1),
                    f"draws/{task}/planned": 1 / len(tasks),
                    f"draws/{task}/actual": 1.0 if t % len(tasks) == k else 0.0,
                    f"draws/{task}/epoch": (t + 1) / 30,
                    f"coba/{task}/slope": -0.01 * (k + 1),
                    f"coba/{task}/rcs": 1 / len(tasks),
                }
            lines.append({**line, "coba/df": 0.5})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "tasks": {task: {"group": None, "loss_weight": 1.0} for task in tasks},
        "train": {"seed": seed, "steps": steps},
        "balancer": balancer,
        "evaluate": {"best": "macro", "patience": None},
        "output": str(folder),
    }
    record = {"config": config, "steps": steps, "versions": {"torch": "2.13"}, "git": "abc"}
    (folder / "run.json").write_text(json.dumps(record | about))
    return folder
