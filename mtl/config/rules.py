"""How the config's values fit together: what no single key's type can say.

A rule is a function that reads keys with `get` and yields contradictions. It is skipped where a key
that it reads is wrong by itself, because that has been reported.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mtl.config.document import Document, Keys, Problem, child, show
from mtl.config.schema import (
    BEST,
    RESERVED,
    Config,
    adapter_folder,
    short_name,
    takes_one_row,
)
from mtl.config.words import did_you_mean, either, model_of, type_at, wanted

OWN = ("train", "validation", "format")  # what a task with rows has
Get = Callable[..., Any]
Finding = tuple[Keys, str, str, str]  # key, found, wanted, hint


def _length(get: Get) -> Iterator[Finding]:
    steps, epochs = get("train", "steps"), get("train", "epochs")
    if steps is None and epochs is None:
        yield (
            ("train",),
            "neither steps nor epochs",
            "one of them",
            "For instance train: {steps: 1000}.",
        )
    elif steps is not None and epochs is not None:
        yield (
            ("train", "epochs"),
            f"steps {steps} and epochs {epochs}",
            "one of them",
            "Delete the other.",
        )


def _name(get: Get, name: str) -> Iterator[Finding]:
    if name in RESERVED:
        yield (
            ("tasks", name),
            f"the name {show(name)}",
            f"none of {', '.join(RESERVED)}",
            "Rename the task.",
        )


def _own(get: Get, name: str, key: str) -> Iterator[Finding]:
    """A task has rows of its own, unless it is another loss of other tasks' rows."""
    if get("tasks", name, "of") is None and get("tasks", name, key) is None:
        here = ("tasks", name, key)
        yield here, "nothing", wanted(type_at(Config, here)).removesuffix(" or null"), ""


def _of(get: Get, name: str) -> Iterator[Finding]:
    of, here = get("tasks", name, "of"), ("tasks", name)
    if of is None:
        return
    for key in (*OWN, "test", "share", "epochs", "cap", "validation_cap", "objective"):
        if get("tasks", name, key) is not None:
            hint = "The task is a loss of other tasks' rows."
            yield (*here, key), show(get("tasks", name, key)), "nothing beside `of`", hint
    tasks = get("tasks")
    with_rows = [str(other) for other in tasks if get("tasks", other, "of") is None]
    for number, other in enumerate(of):
        if isinstance(other, str) and other not in with_rows:
            hint = did_you_mean(other, with_rows)
            yield (
                (*here, "of", str(number)),
                show(other),
                f"tasks with rows: {either(with_rows)}",
                hint,
            )
    if not of:
        yield (*here, "of"), "an empty list", f"tasks with rows: {either(with_rows)}", ""


def _best(get: Get) -> Iterator[Finding]:
    tasks = [task for task in get("tasks").values() if isinstance(task, dict)]
    specs = [get("objective"), *(task.get("objective") for task in tasks)]
    names = [_spec_name(one) for one in specs]
    if any(name not in ("causal_lm", None) for name in names) or any(
        task.get("metrics") for task in tasks
    ):
        return  # an objective may have measures: `mtl.plugins.read` looks at all
    best, choices = get("evaluate", "best"), [*BEST, *get("tasks")]
    if best not in choices:
        yield ("evaluate", "best"), show(best), either(choices), did_you_mean(best, choices)


def _scale(get: Get) -> Iterator[Finding]:
    for pattern in get("optimizer", "scale"):
        # optimizer.py searches with it much later, when the model has been loaded.
        try:
            re.compile(pattern)
        except re.error as error:
            hint = f"As one: {error}."
            yield ("optimizer", "scale", pattern), show(pattern), "a regular expression", hint


def _share(get: Get, name: str) -> Iterator[Finding]:
    shares = get("mix", "shares")
    if get("tasks", name, "of") is not None:
        return
    for key, mode in ("share", "explicit"), ("epochs", "epochs"):
        value = get("tasks", name, key)
        if shares == mode and value is None:
            yield (
                ("tasks", name, key),
                "nothing",
                "a number > 0",
                f"With mix.shares: {mode} every task needs {key}.",
            )
        elif shares != mode and value is not None:
            yield (
                ("tasks", name, key),
                show(value),
                "nothing",
                f"It has no meaning with mix.shares: {shares}.",
            )


def _temperature(get: Get) -> Iterator[Finding]:
    shares, value = get("mix", "shares"), get("mix", "temperature")
    if shares == "temperature" and value is None:
        yield ("mix", "temperature"), "nothing", "a number > 0", "mix.shares: temperature needs it."
    elif shares != "temperature" and value is not None:
        yield (
            ("mix", "temperature"),
            show(value),
            "nothing",
            f"It has no meaning with mix.shares: {shares}.",
        )


def _follow(get: Get) -> Iterator[Finding]:
    follow, tasks = get("mix", "follow"), get("tasks")
    if follow is None:
        # The schema's defaults once more: `get` fills them in, so these pass as not given.
        for key, default in ("every", 50), ("floor", None):
            if (value := get("mix", key)) != default:
                hint = "It has no meaning without mix.follow."
                yield ("mix", key), show(value), "nothing", hint
        return
    if get("mix", "shares") == "epochs":
        hint = "How often a task's rows are read is the balancer's, then."
        yield ("mix", "shares"), "epochs", "other shares beside mix.follow", hint
    floor = get("mix", "floor")
    if floor is not None and floor * len(tasks) > 1:
        most = f"at most {1 / len(tasks):.4g}"
        yield ("mix", "floor"), show(floor), most, f"That is the equal share of {len(tasks)} tasks."
    for name in tasks:
        if get("tasks", name, "of") is not None:
            found = f"{follow}, and the task {name}, which is a loss of other tasks' rows"
            hint = "Such tasks share their draws."
            yield ("mix", "follow"), found, "null", hint


def _known_order(get: Get) -> Iterator[Finding]:
    """Whole batches change places only where they are known from the start."""
    if get("train", "order") is None or get("train", "order", "scheme") != "batch":
        return
    patience = get("evaluate", "patience")
    action = "log" if patience is None else get("evaluate", "patience", "action")
    for found, key in (
        (get("mix", "follow") is not None, "mix.follow"),
        (action in ("drop", "anchor"), f"evaluate.patience.action: {action}"),
    ):
        if found:
            hint = f"With {key} later batches are not known when the run starts."
            yield ("train", "order", "scheme"), "batch", "rotate or shuffle", hint


def _lengths(get: Get) -> Iterator[Finding]:
    longest, tokens, row = (
        get("batch", "max_length"),
        get("batch", "tokens"),
        get("batch", "row_length"),
    )
    if longest > tokens:
        yield (
            ("batch", "max_length"),
            show(longest),
            f"at most batch.tokens, {tokens}",
            "A micro-batch holds whole examples.",
        )
    if row is not None and not longest <= row <= tokens:
        yield (
            ("batch", "row_length"),
            show(row),
            f"batch.max_length to batch.tokens, {longest} to {tokens}",
            "",
        )


def _one_row(get: Get) -> Iterator[Finding]:
    attention, tokens, row = (
        get("model", "attention"),
        get("batch", "tokens"),
        get("batch", "row_length"),
    )
    packs = get("batch", "packing") is not False
    if packs and row not in (None, tokens) and takes_one_row(attention):
        wanted = f"null with model.attention: {attention}"
        hint = "This kernel tells packed examples apart only where a micro-batch is one row."
        yield ("batch", "row_length"), show(row), wanted, hint


def _evaluation(get: Get) -> Iterator[Finding]:
    tokens = get("evaluate", "tokens")
    least = get("batch", "max_length") or 0  # rows of evaluation are not longer than its tokens
    if tokens is not None and least > tokens:
        yield ("evaluate", "tokens"), show(tokens), f"at least batch.max_length, {least}", ""


def _generate(get: Get) -> Iterator[Finding]:
    every, passes = get("evaluate", "generate", "every"), get("evaluate", "every")
    if every is None:
        return
    key = "evaluate", "generate", "every"
    if every % passes:
        hint = "Answers are measured beside the losses of a full pass."
        yield key, show(every), f"a multiple of evaluate.every, {passes}", hint
    if not any(get("tasks", name, "metrics") for name in get("tasks")):
        hint = "No task says what is measured: for instance tasks.NAME.metrics: [exact_match]."
        yield key, show(every), "null without tasks.<task>.metrics", hint


def _metrics(get: Get, name: str) -> Iterator[Finding]:
    metrics = get("tasks", name, "metrics")
    if metrics and get("tasks", name, "of") is not None:
        hint = "The task is a loss of other tasks' rows."
        yield ("tasks", name, "metrics"), "metrics", "nothing beside `of`", hint
    names = [_spec_name(spec) for spec in metrics]
    names = [short_name(one) if isinstance(one, str) else None for one in names]
    for i, one in enumerate(names):
        if one is not None and one in names[:i]:
            path = ("tasks", name, "metrics", str(i))
            yield path, f"{show(one)} a second time", "each metric once", ""


def _spec_name(spec: Any) -> Any:
    # As the YAML has it, not validated: a text or a mapping. A default is a Spec already.
    return child(spec, "name") if isinstance(spec, dict) else getattr(spec, "name", spec)


def _momentum(get: Get) -> Iterator[Finding]:
    name, momentum = get("optimizer", "name"), get("optimizer", "momentum")
    if momentum and name != "sgd":
        yield (
            ("optimizer", "momentum"),
            show(momentum),
            f"0 with {name}",
            "It is SGD's; AdamW's first moment is betas.",
        )


def _offload(get: Get) -> Iterator[Finding]:
    zero = get("engine", "zero")
    # target -> the lowest ZeRO stage at which it may stand there.
    for key, lowest in ("optimizer", {"cpu": 1, "nvme": 3}), ("parameters", {"cpu": 3, "nvme": 3}):
        target = get("engine", "offload", key)
        if zero < lowest.get(target, 0):
            yield (
                ("engine", "offload", key),
                target,
                f"none at engine.zero {zero}",
                f"It needs zero {lowest[target]}.",
            )
        if target == "nvme" and get("engine", "offload", "nvme_path") is None:
            yield (
                ("engine", "offload", "nvme_path"),
                "nothing",
                "a path",
                f"engine.offload.{key}: nvme needs it.",
            )


def _start(get: Get) -> Iterator[Finding]:
    """At most one place says which weights to start from."""
    name, adapter, origin = get("model", "name"), get("model", "adapter"), get("train", "from")
    if adapter is not None and origin is not None:
        hint = "Both say which weights to start from: keep one."
        yield ("train", "from"), show(origin), "null beside model.adapter", hint
    if adapter_folder(name) and (adapter is not None or origin is not None):
        hint = "This folder is an adapter, which is weights to start from too."
        yield ("model", "name"), show(name), "the base model", hint


def _merge(get: Get) -> Iterator[Finding]:
    adapter = get("model", "adapter")
    if not (isinstance(adapter, dict) and adapter.get("merge")):
        return
    key, lora = ("model", "adapter", "merge"), get("model", "lora")
    hint = "Or merge first: launch/export.py PATH OUT --merge, and then model.name: OUT."
    if lora is not None:
        yield key, "true", "false beside model.lora", hint
    if get("model", "quantize") is not None:
        yield key, "true", "false beside model.quantize", hint
    if get("engine", "zero") == 3:
        yield key, "true", "false at engine.zero 3", hint


def _adapts(get: Get) -> bool:
    """`Config.trains_adapter`, before there is a config."""
    adapter = get("model", "adapter")
    if isinstance(adapter, dict) and adapter.get("merge"):
        return False
    places = [get("model", "name"), get("train", "from") or ""]
    return (
        get("model", "lora") is not None
        or adapter is not None
        or any(map(adapter_folder, filter(None, places)))
    )


def _quantize(get: Get) -> Iterator[Finding]:
    kind, zero, precision = (
        get("model", "quantize"),
        get("engine", "zero"),
        get("model", "precision"),
    )
    if kind is None:
        return
    if not _adapts(get):
        yield (
            ("model", "quantize"),
            kind,
            "null",
            "Quantized weights cannot be trained: add model.lora, for instance {r: 16}.",
        )
    if zero == 3:
        hint = (
            "transformers loads a quantized model whole on every process, so zero 3 would save "
            "nothing. Use zero 2."
        )
        yield ("model", "quantize"), kind, "null at engine.zero 3", hint
    if kind == "int8" and precision == "fp32":
        yield (
            ("model", "precision"),
            precision,
            "bf16 or bf16_autocast",
            "LLM.int8() computes in 8 and 16 bits only.",
        )


def _compile(get: Get) -> Iterator[Finding]:
    if get("model", "compile") and get("engine", "zero") == 3:
        hint = (
            "DeepSpeed gathers each module's parameters in a hook, and every hook would interrupt "
            "the compiled code."
        )
        yield ("model", "compile"), "true", "false at engine.zero 3", hint


def _kernel(get: Get) -> Iterator[Finding]:
    kernel = get("model", "loss_kernel")
    if kernel and get("engine", "zero") == 3:
        hint = (
            "The kernel needs the head's whole weights, which ZeRO 3 partitions. Leave the key "
            "out: the head then runs in slices."
        )
        yield ("model", "loss_kernel"), kernel, "null at engine.zero 3", hint
    if kernel == "torch" and (precision := get("model", "precision")) != "fp32":
        hint = "Torch's kernel would round losses to 16 bits, or leave autocast aside."
        yield ("model", "loss_kernel"), kernel, f"liger or null with precision {precision}", hint


def _gram(get: Get) -> Iterator[Finding]:
    params = get("gram", "params")
    # all, last_layer and adapter compile too; they are looked at first where it is used.
    try:
        re.compile(params)
    except re.error as error:
        yield (
            ("gram", "params"),
            show(params),
            "all, last_layer, adapter or a regular expression",
            f"As one: {error}.",
        )
    if params == "adapter" and not _adapts(get):
        yield (
            ("gram", "params"),
            "adapter",
            "all, last_layer or a regular expression",
            "Adapters need model.lora, which is not given.",
        )


def _average(get: Get) -> Iterator[Finding]:
    if get("average") is None:
        return
    if get("average", "last") is not None:
        for key, default in ("decay", 0.999), ("warmup", 10), ("every", 1):
            if (value := get("average", key)) != default:
                hint = "It has no meaning with average.last, which is updated at every full pass."
                yield ("average", key), show(value), "nothing", hint
    if get("engine", "offload", "optimizer") == "nvme":
        hint = "The fp32 weights it averages are not in memory there."
        yield ("average",), "an average", "null with engine.offload.optimizer: nvme", hint


def _anchor(get: Get) -> Iterator[Finding]:
    if get("evaluate", "patience") is None:
        return
    path = "evaluate", "patience"
    evaluations, times = get(*path, "evaluations"), get(*path, "from")
    if (evaluations is None) == (times is None):
        found = "neither evaluations nor from" if times is None else "evaluations and from"
        hint = "For instance evaluations: 2." if times is None else "Delete the other."
        yield path, found, "one of them", hint
    if times is not None and get(*path, "action") == "log":
        hint = "What another run says changes nothing here."
        yield path, "from with action: log", "freeze, drop or anchor", hint
    if get(*path, "action") != "anchor":
        if (keep := get(*path, "keep")) != 0.25:
            hint = "It has no meaning without action: anchor."
            yield (*path, "keep"), show(keep), "nothing", hint
        return
    if get("engine", "offload", "optimizer") == "nvme":
        hint = "The fp32 weights of a task's best are not in memory there."
        wanted = "another action with engine.offload.optimizer: nvme"
        yield (*path, "action"), "anchor", wanted, hint
    for name in get("tasks"):
        if get("tasks", name, "of") is not None:
            found = f"anchor, and the task {name}, which is a loss of other tasks' rows"
            hint = "A task is held on its own rows."
            yield (*path, "action"), found, "log, freeze or drop", hint


def _order(get: Get) -> Iterator[Finding]:
    if get("train", "order") is None:
        return
    replica, of = get("train", "order", "replica"), get("train", "order", "of")
    if replica >= of:
        yield (
            ("train", "order", "replica"),
            show(replica),
            f"0 to {of - 1}",
            f"Replicas are counted from 0, and there are {of} (train.order.of).",
        )


def _export(get: Get) -> Iterator[Finding]:
    if get("export", "which") == "average" and get("average") is None:
        yield ("export", "which"), "average", "best, last or none", "There is no `average:`."
    if get("export", "which") == "best" and not get("checkpoint", "best"):
        yield (
            ("export", "which"),
            "best",
            "last, average or none",
            "With checkpoint.best: false no best checkpoint is kept.",
        )


def _warmup(get: Get) -> Iterator[Finding]:
    steps, warmup = get("train", "steps"), get("schedule", "warmup")
    if steps is not None and warmup > steps:
        yield ("schedule", "warmup"), show(warmup), f"at most train.steps, {steps}", ""


def _trackers(get: Get) -> Iterator[Finding]:
    names = [_spec_name(spec) for spec in get("trackers")]
    for i, name in enumerate(names):
        # A user's own class may be there twice, with other keywords.
        if isinstance(name, str) and ":" not in name and name in names[:i]:
            yield ("trackers", str(i)), f"{show(name)} a second time", "each tracker once", ""


def _output(get: Get) -> Iterator[Finding]:
    output = get("output")
    try:
        folder = Path(output).expanduser().resolve()
        home = Path.home().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a NUL, no such user's home ...
        yield ("output",), show(output), "a path", f"As one: {error}."
        return
    if folder in (Path(folder.anchor), home):
        yield ("output",), show(output), "a folder of the run's own", f"That is {folder}."


def _finite(get: Get) -> Iterator[Finding]:
    """DeepSpeed's own keys have no types here, and NaN would stand in every record of the run."""

    def walk(value: Any, at: Keys) -> Iterator[Finding]:
        if isinstance(value, float) and not math.isfinite(value):
            yield at, show(value), "a finite number", ""
        inner = value.items() if isinstance(value, dict) else ()
        inner = enumerate(value) if isinstance(value, list) else inner
        for key, each in inner:
            yield from walk(each, (*at, str(key)))

    yield from walk(get("engine", "deepspeed"), ("engine", "deepspeed"))


# In any order: read.py sorts what they find by line.
RULES = (
    _warmup,
    _trackers,
    _output,
    _finite,
    _length,
    _best,
    _scale,
    _temperature,
    _follow,
    _known_order,
    _lengths,
    _one_row,
    _evaluation,
    _generate,
    _momentum,
    _offload,
    _start,
    _merge,
    _quantize,
    _compile,
    _kernel,
    _gram,
    _average,
    _anchor,
    _order,
    _export,
)
TASK_RULES = (_name, *(functools.partial(_own, key=key) for key in OWN), _of, _share, _metrics)


class _Broken(Exception):
    """A rule reads a key that is wrong by itself."""


def contradictions(document: Document, broken: set[Keys]) -> list[Problem]:
    def get(*keys: str) -> Any:
        # What stands in a broken section is unknown too.
        if any(keys[:depth] in broken for depth in range(1, len(keys) + 1)):
            raise _Broken
        value: Any = document.data
        for depth, key in enumerate(keys):
            # From a default section on, values are models and no longer the YAML's dicts.
            if isinstance(value, dict) and key not in value:
                field = model_of(type_at(Config, keys[:depth])).model_fields[key]
                value = field.get_default(call_default_factory=True)
            else:
                value = getattr(value, key) if isinstance(value, BaseModel) else value[key]
        return value

    tasks = document.data.get("tasks")
    # Anything else than a mapping has been reported as such.
    names = tasks if isinstance(tasks, dict) else ()
    problems = []
    for rule in (
        *RULES,
        *(functools.partial(rule, name=name) for rule in TASK_RULES for name in names),
    ):
        try:
            problems += [document.problem(*finding) for finding in rule(get)]
        except _Broken:
            continue
    return problems
