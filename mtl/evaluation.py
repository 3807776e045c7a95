"""Per-task losses of model folders on an experiment's rows, without an engine or an optimizer.

Every rank holds the whole model in the YAML's precision and reads its part of the rows.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mtl import plugins
from mtl.config import Config, ConfigError
from mtl.config.spec import resolve
from mtl.data.batches import ValidationGroups
from mtl.data.cache import encode_split
from mtl.data.encode import Encoder, load_tokenizer
from mtl.data.encoded import DataError, TaskData
from mtl.data.plan import layout_for
from mtl.data.source import open_source
from mtl.distributed import comm
from mtl.distributed.engine import device
from mtl.losses import head
from mtl.models import adapters, load, packing
from mtl.models.structure import dtype_of
from mtl.train.evaluate import ValidationResult, full_pass

Say = Callable[[str], None]
Split = Literal["validation", "test"]
Evaluate = Callable[[Path], ValidationResult]


@dataclass
class Bare:
    """A model as the full pass asks for it: an `Engine` that cannot train."""

    module: nn.Module
    device: torch.device
    autocast: bool = False

    def eval(self) -> None:
        self.module.eval()

    def evaluate(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(**inputs)


def rows(config: Config, split: Split, allow_code: Collection[str] = ()) -> list[TaskData]:
    """Every task's rows of a split, encoded or from the cache. Call it before there is a process
    group, as `build.encode`.

    Raises:
        ConfigError: a task has no such rows. DataError: they cannot be used.
    """
    missing = [name for name, task in config.tasks.items() if getattr(task, split) is None]
    if missing:
        raise ConfigError(
            config.error(("tasks", name, split), "nothing", "rows to evaluate on")
            for name in missing
        )
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    encoder = Encoder(tokenizer, config.batch.max_length, config.batch.too_long)
    root, found = Path(config.cache).expanduser(), []
    for name, form in plugins.formats(config, allow_code).items():
        task = config.tasks[name]
        cap = task.validation_cap if split == "validation" else None
        try:
            sources = [open_source(one, split) for one in getattr(task, split)]
            encoded = encode_split(root, sources, form, encoder, cap, f"{name} ({split})", _say)
        except DataError as e:
            where = config.where(("tasks", name, split))
            raise DataError(f"{where}: tasks.{name}.{split}: {e}") from e
        found.append(TaskData(name, encoded, encoded))
    return found


def evaluator(
    config: Config,
    tasks: list[TaskData],
    *,
    halves: bool = False,
    allow_code: Collection[str] = (),
    say: Say = lambda text: None,
) -> Evaluate:
    """From a folder (a model, or an adapter) to its losses on `rows`.

    Args:
        halves: cut every task's rows in two alike halves, groups 0 and 1 of the result: one to
            choose by, one to report. The same halves for every model and world size.

    Raises:
        ConfigError: a task has one row only and `halves` is asked for.
    """
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    objective = resolve(config, "objective", plugins.OBJECTIVE, allow_code)
    single = [task.name for task in tasks if halves and len(task.validation) < 2]
    if single:
        found, wanted = "one row", "two or more: half of them choose, half report"
        raise ConfigError(
            config.error(("tasks", name, "validation"), found, wanted) for name in single
        )
    packed: dict[type, bool] = {}  # measured once for an architecture

    def evaluate(folder: Path) -> ValidationResult:
        model = Bare(
            _load(config, folder, tokenizer), device(), config.model.precision == "bf16_autocast"
        )
        kind = type(model.module)
        if kind not in packed:
            packed[kind] = packing.decide(config, model, len(tokenizer), say)
        tokens = config.evaluate.tokens or config.batch.tokens
        pad = tokenizer.pad_token_id or 0
        layout = layout_for(config, tasks, comm.world(), comm.rank(), pad, packed[kind], tokens)
        groups = ValidationGroups(tasks, 2 if halves else 1, config.train.seed, layout)
        return full_pass(model, objective, groups, len(tasks))

    return evaluate


def halves(path: str, allow_code: Collection[str] = ()) -> tuple[Evaluate, list[str]]:
    """For `launch/merge.py`: an evaluator on the two halves of a YAML's validation rows, and the
    tasks' names.

    Raises:
        ConfigError, DataError: everything that is wrong.
    """
    config = plugins.read(path, allow_code=allow_code)
    tasks = rows(config, "validation", allow_code)
    return evaluator(config, tasks, halves=True, allow_code=allow_code), list(config.tasks)


def table(losses: Mapping[str, ValidationResult], names: list[str]) -> list[list[str]]:
    """A row a model, a column a task, then their mean (macro) and that over tokens (token)."""
    head = ["nats per target token", *names, "macro", "token"]
    summaries = {name: one.summary(names) for name, one in losses.items()}
    return [head, *([name, *(f"{s[k]:.4f}" for k in head[1:])] for name, s in summaries.items())]


def record(losses: Mapping[str, ValidationResult], names: list[str], split: Split) -> str:
    """The same as JSON, with target tokens."""
    models = {
        name: {
            "losses": one.summary(names),
            "tokens": dict(zip(names, one.tokens.sum(1).tolist(), strict=True)),
        }
        for name, one in losses.items()
    }
    return json.dumps({"split": split, "unit": "nats per target token", "models": models}, indent=2)


def _load(config: Config, folder: Path, tokenizer: Any) -> nn.Module:
    if (folder / "adapter_config.json").is_file():
        quantize, precision = config.model.quantize, config.model.precision
        remote = config.model.allow_remote_code
        model, _ = adapters.merge(folder, remote, quantize, precision)
        model = model.to(dtype_of(config.model.precision))
        head.install(model, None)
        return model.to(device())
    plain = {"name": str(folder), "revision": None, "lora": None, "quantize": None}
    plain |= {"activation_checkpointing": False, "compile": False}
    engine = config.engine.model_copy(update={"zero": 0})
    model = config.model.model_copy(update=plain)
    return load.load(config.model_copy(update={"model": model, "engine": engine}), tokenizer).to(
        device()
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
