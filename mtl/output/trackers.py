"""Where numbers go. A tracker is a class with `log`, `say` and `close`; only rank 0 has any.

Tags: `train/<task>/loss`, `train/<task>/weight`, `eval/<task>/loss`, `eval/macro`,
`eval/average/<task>/loss`, `<balancer>/<task>/slope` ... Losses are nats per target token.
Everything logged under step t was measured at the parameters after t optimizer updates.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

TRACKERS = {
    "console": "mtl.output.trackers:Console",
    "jsonl": "mtl.output.trackers:Jsonl",
    "tensorboard": "mtl.output.trackers:TensorBoard",
}


class Tracker(Protocol):
    """Built as `Tracker(output=Path, steps=int, start=int, **keywords of the YAML)`."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Console:
    """A progress bar on a terminal; a line every now and then elsewhere.

    Args:
        every: steps between lines where there is no terminal; None: about 20 lines a run.
    """

    def __init__(self, output: Path, steps: int, start: int = 0, every: int | None = None):
        self.every = every or max(1, steps // 20)
        self.steps = steps
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.terminal
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        averaged = "eval/average/macro"
        if "eval/macro" in values:
            tasks = [f"{t} {values[f'eval/{t}/loss']:.3f}" for t in _tasks(values, "eval", "loss")]
            self.say(
                f"step {step}/{self.steps}  validation: macro {values['eval/macro']:.4f} | "
                + ", ".join(tasks)
                + (f" | averaged weights: {values[averaged]:.4f}" if averaged in values else "")
            )
        if "train/loss" not in values:
            return
        weights = ", ".join(
            f"{t} {values[f'train/{t}/weight']:.2f}" for t in _tasks(values, "train", "weight")
        )
        text = (
            f"loss {values['train/loss']:.3f}, {values['train/tokens_per_second']:.0f} "
            "tokens/s "
            f"| weights: {weights}"
        )
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        elif (step + 1) % self.every == 0 or step + 1 == self.steps:
            left = values["time/left_seconds"]
            self.say(f"step {step + 1}/{self.steps}  {text} | {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class Jsonl:
    """`metrics.jsonl`: one JSON object per step, {"step": t, tag: number ...}. What is absent is
    left out; there is no NaN.
    """

    def __init__(self, output: Path, steps: int, start: int = 0):
        self.file = (output / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `<output>/tensorboard`."""

    def __init__(self, output: Path, steps: int, start: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ValueError(
                "trackers: tensorboard is not installed: pip install 'coba-mtl[tensorboard]'."
            ) from e
        # Events after `start` are of the run that was cut off there. Those at it stay, or its
        # validation would be lost: a resumed run does not repeat it. The training events of that
        # step then stand twice, with the same numbers.
        self.writer = SummaryWriter(
            str(output / "tensorboard"), purge_step=start + 1 if start else 0
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


def metrics_bytes(output: Path) -> int:
    """Length of metrics.jsonl now."""
    path = output / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def truncate_metrics(output: Path, length: int) -> None:
    """Cut metrics.jsonl back to what a checkpoint knew of it, so that no step stands in it
    twice.
    """
    if metrics_bytes(output) > length:
        os.truncate(output / "metrics.jsonl", length)


def _tasks(values: Mapping[str, float], group: str, what: str) -> list[str]:
    return [
        tag[len(group) + 1 : -len(what) - 1]
        for tag in values
        if tag.startswith(f"{group}/") and tag.endswith(f"/{what}") and tag.count("/") == 2
    ]
