"""Per-task losses of model folders on an experiment's rows, without an engine or an optimizer.

Every rank holds the whole model in the YAML's precision and reads its part of the rows.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtl import build, plugins
from mtl.build import Data
from mtl.config import Config, ConfigError
from mtl.config.schema import model_folder
from mtl.data.batches import Layouts, ValidationGroups
from mtl.data.cache import encode_split, sources_of
from mtl.data.encoded import DataError, TaskData
from mtl.data.plan import layouts_for
from mtl.distributed import comm
from mtl.distributed.engine import device
from mtl.losses import head
from mtl.losses.objective import reference_of, unit_of
from mtl.models import adapters, packing
from mtl.models.errors import ModelError
from mtl.models.structure import dtype_of
from mtl.train import reference
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
    in_step: ClassVar[bool] = False  # every rank has the whole model

    def eval(self) -> None:
        self.module.eval()

    def evaluate(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(**inputs)

    def generate(self, **inputs: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module.generate(**inputs, synced_gpus=False)


def rows(
    config: Config, split: Split, allow_code: Collection[str] = (), asks: bool = False
) -> Data:
    """Every stream's rows of a split, encoded or from the cache. Call it before there is a process
    group, as `build.encode`.

    Args:
        asks: whether the tasks' metrics of generated answers are wanted too.

    Raises:
        ConfigError: a task has no such rows.
        DataError: they cannot be used.
    """
    missing = [name for name, task in config.streams.items() if getattr(task, split) is None]
    if missing:
        raise ConfigError(
            config.error(("tasks", name, split), "nothing", "rows to evaluate on")
            for name in missing
        )
    data = build.encode(config, allow_code, _say)  # labels and the like are those of training
    if split == "validation":
        # In both places: layouts look at the longest row of either.
        found = [TaskData(t.name, t.validation, t.validation) for t in data.tasks]
    else:
        found = _other_rows(config, split, data, allow_code)
    data = replace(data, tasks=found, asking=None)
    if not asks:
        return data
    return replace(data, asking=build.asking(config, data, split, allow_code=allow_code))


def _other_rows(
    config: Config, split: Split, data: Data, allow_code: Collection[str]
) -> list[TaskData]:
    root, found = Path(config.cache).expanduser(), []
    for s, (name, form) in enumerate(plugins.formats(config, allow_code).items()):
        examples, label = data.examples[data.goals.of[s]], f"{name} ({split})"
        try:
            sources = sources_of(config.tasks[name], split)
            encoded = encode_split(root, sources, form, examples, None, label, _say)
        except DataError as e:
            where = config.where(("tasks", name, split))
            raise DataError(f"{where}: tasks.{name}.{split}: {e}") from e
        found.append(TaskData(name, encoded, encoded))
    return found


def evaluator(
    config: Config,
    data: Data,
    *,
    halves: bool = False,
    allow_code: Collection[str] = (),
    say: Say = lambda text: None,
    predictions: Path | None = None,
) -> Evaluate:
    """From a folder (a model, or an adapter) to its losses on `rows`. Where `rows` has questions,
    the metrics of its answers too.

    Args:
        predictions: where rank 0 writes these answers, those of all models; None: nowhere.
        halves: divide every task's rows into two alike halves, groups 0 and 1 of the result: one to
            choose by, one to report. They are the same for every model and world size.

    Raises:
        ConfigError: a task has one row only and `halves` is asked for.
    """
    tasks, goals = data.tasks, data.goals
    single = [task.name for task in tasks if halves and len(task.validation) < 2]
    if single:
        found, wanted = "one row", "two or more: half of them choose, half report"
        raise ConfigError(
            config.error(("tasks", name, "validation"), found, wanted) for name in single
        )
    opened, asked = opener(config, data, allow_code, say), False

    def layouts(packed: bool) -> Layouts:
        tokens = config.evaluate.tokens or config.batch.tokens
        ranks = comm.world(), comm.rank()
        return layouts_for(config, tasks, data.examples, goals.of, *ranks, packed, tokens)

    if any(map(reference_of, goals.each)):  # losses that compare with the model training began at
        name, revision = adapters.base_of(config)
        start = (config.adapter.path, None) if config.adapter else (name, revision)
        model, packed = opened(*start)
        settings = config.resolved()["model"]
        reference.fill(model, goals.each, goals.specs, tasks, layouts(packed), settings, say)
        # Before the next one is loaded.
        del model

    def evaluate(folder: Path) -> ValidationResult:
        nonlocal asked
        model, packed = opened(folder)
        groups = ValidationGroups(tasks, 2 if halves else 1, config.train.seed, layouts(packed))
        found = full_pass(model, goals.as_one, groups, len(config.tasks))
        if data.asking is None:
            return found
        # The first model writes the file anew, the others append to it.
        answers = data.asking.measure(
            model, predictions, append=asked, about={"model": str(folder)}
        )
        asked = True
        return replace(found, measures={**found.measures, **answers})

    return evaluate


def opener(
    config: Config,
    data: Data,
    allow_code: Collection[str] = (),
    say: Say = lambda text: None,
) -> Callable[[Path], tuple[Bare, bool]]:
    """From a folder (a model, or an adapter) to the model, and whether rows are packed for it."""
    packed: dict[type, bool] = {}  # measured once for an architecture

    def opened(folder: Path | str, revision: str | None = None) -> tuple[Bare, bool]:
        try:
            module = _load(config, model_folder(str(folder)), data, allow_code, revision)
        except ModelError as error:
            if Path(folder).exists():
                raise
            raise ModelError(
                f"{folder}: found no such folder and no such model on the hub, wanted a checkpoint "
                "(RUN/checkpoints/step-...), an exported model or a hub name."
            ) from error
        model = Bare(module, device(), config.model.precision == "bf16_autocast")
        kind = type(module)
        if kind not in packed:
            can = any(one.packs for one in data.examples)
            packed[kind] = can and packing.decide(config, model, len(data.tokenizer), say)
        return model, packed[kind]

    return opened


def halves(path: str, allow_code: Collection[str] = ()) -> tuple[Evaluate, list[str]]:
    """For `launch/merge.py`: an evaluator on the two halves of a YAML's validation rows, and the
    tasks' names.

    Raises:
        ConfigError, DataError: everything that is wrong.
    """
    config = plugins.read(path, allow_code=allow_code)
    tasks = rows(config, "validation", allow_code)
    return evaluator(config, tasks, halves=True, allow_code=allow_code), list(config.tasks)


def table(found: Mapping[str, ValidationResult], names: list[str], data: Data) -> list[list[str]]:
    """A row a model, a column a task, then their mean (macro) and that over tokens (token). The
    same of every measure below, with the mean over the tasks that have it.
    """
    head = [unit(data), *names, "macro", "token"]
    losses = {name: one.summary(names) for name, one in found.items()}
    rows = [head, *([name, *(f"{s[k]:.4f}" for k in head[1:])] for name, s in losses.items())]
    kinds = data.measures
    measured = {name: one.measured(names, kinds) for name, one in found.items()}
    for kind in dict.fromkeys(k for each in measured.values() for k in each if k in kinds):
        keys = [*(f"{name}/{kind}" for name in names), kind]
        rows.append([kind, *names, "mean", ""])
        rows += (
            [name, *(f"{each[k]:.4f}" if k in each else "-" for k in keys), ""]
            for name, each in measured.items()
        )
    return rows


def record(
    found: Mapping[str, ValidationResult], names: list[str], data: Data, split: Split
) -> str:
    """The same as JSON, with target tokens. A measure of a task is `task/measure`."""
    kinds = data.measures
    models = {
        name: {
            "losses": one.summary(names),
            "measures": one.measured(names, kinds),
            "tokens": dict(zip(names, one.tokens.sum(1).tolist(), strict=True)),
        }
        for name, one in found.items()
    }
    return json.dumps({"split": split, "unit": unit(data), "models": models}, indent=2)


def unit(data: Data) -> str:
    """What the losses are, such as nats per target token."""
    units = dict.fromkeys(unit_of(one) for one in data.goals.each)
    return "nats per " + " or ".join(units)


def _load(
    config: Config, folder: Path, data: Data, allow_code: Collection[str], revision: str | None
) -> nn.Module:
    if (folder / "adapter_config.json").is_file():
        quantize, precision = config.model.quantize, config.model.precision
        remote = config.model.allow_remote_code
        model, _ = adapters.merge(folder, remote, quantize, precision)
        model = model.to(dtype_of(config.model.precision))
        if not adapters.is_classifier(folder):  # its head is on texts, not on target positions
            head.install(model, None)
        return model.to(device())
    # The folder has whole trained weights: what the run did to its base is not done again.
    plain = {"name": str(folder), "revision": revision, "lora": None, "quantize": None}
    plain |= {"adapter": None, "activation_checkpointing": False, "compile": False}
    changes = {
        "model": config.model.model_copy(update=plain),
        "engine": config.engine.model_copy(update={"zero": 0}),
        "train": config.train.model_copy(update={"from": None}),
    }
    loader = plugins.loader(config, allow_code)
    here = config.model_copy(update=changes)
    return loader(here, data.tokenizer, data.examples, empty=False).to(device())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
