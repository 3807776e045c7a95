"""The experiment's YAML: every key, its type, its default and its meaning. The only definition of it.

A config is read strictly (no text becomes a number, no unknown key is skipped) and everything that is wrong with it is
reported at once, each with its file and line. `docs/config.md` and `docs/config.schema.json` are written from here by
`python -m mtl.config`.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    Strict,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from mtl.document import ConfigError, Document, Keys, Problem, child, dotted, dump, show
from mtl.words import (
    Wanted,
    branches,
    did_you_mean,
    either,
    elsewhere,
    fields,
    is_section,
    model_of,
    next_move,
    type_at,
    wanted,
)

__all__ = ["Config", "ConfigError", "Document", "Spec", "dump", "json_schema", "load", "markdown", "parse"]


Text = Annotated[str, MinLen(1), Wanted("text")]
Name = Annotated[str, MinLen(1), Wanted("a name")]
TextPath = Annotated[str, MinLen(1), Wanted("a path")]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
Names = Annotated[tuple[Text, ...], Strict(False)]
Sources = Annotated[
    tuple[Text, ...],
    Strict(False),
    MinLen(1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Wanted("a file, folder or hub name, or a list of them"),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
DeepSpeed = Annotated[
    dict[str, Any],
    Wanted("a mapping, or the path of a JSON file"),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "minLength": 1}]}),
]
FILES = (("engine", "deepspeed"),)  # where Document reads a file in
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$"), Wanted("letters, digits, _ . -")]
RESERVED = ("macro", "token", "worst", ".", "..")


class Section(BaseModel):
    """A mapping of the YAML."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Spec(Section):
    """A callable by name and the keywords it is given: `CoBa`, or `{name: CoBa, window: 48}`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=lambda schema: _or_text(schema))

    wanted: ClassVar = "a name, or a mapping with name and keywords"

    name: Name
    """A built-in's name, or `package.module:attribute` where the command line says `--allow-code package`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def _or_text(schema: dict[str, Any]) -> None:
    mapping = dict(schema)
    schema.clear()
    schema.update(anyOf=[{"type": "string", "minLength": 1}, mapping])


class Lora(Section):
    """Low-rank adapters (PEFT) in place of full fine-tuning."""

    r: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """The adapters' output is scaled by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: BelowOne = 0.0
    """Probability that an input of an adapter is dropped."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Modules that get an adapter: every linear one but the head, or those whose name ends so."""
    modules_to_save: Names = ()
    """Modules that are trained whole and saved with the adapters."""
    rslora: bool = False
    """Rank-stabilized scaling."""
    dora: bool = False
    """Weight-decomposed adapters."""


class Model(Section):
    """The model and the precision it is trained in."""

    name: Text
    """A folder, or a name on the hub."""
    revision: Text | None = None
    """Branch, tag or commit of a hub name; null: its main branch."""
    allow_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    attention: Text | None = None
    """Attention kernel by transformers' name (sdpa, eager, flash_attention_2 ...); null: transformers' choice."""
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "bf16"
    """bf16: bf16 weights with fp32 master weights and fp32 accumulated gradients; bf16_autocast: fp32 weights, bf16
    matrix products. The loss is computed in fp32 always."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile of the model's blocks, for lengths that vary; zero 0-2. The first steps take up to minutes longer: worth it
    where the others are faster by more (on CPUs by a quarter, benchmarks/README.md). Needs a C++ compiler; on a GPU Triton."""
    loss_kernel: Literal["liger"] | None = None
    """liger: Liger's fused head and cross-entropy (extra `liger`; a GPU, zero 0-2, a head that is one linear module); null: the
    head in slices, in plain torch. Both compute target positions only and never hold all logits."""
    chat_template: TextPath | None = None
    """File with a Jinja template that replaces the tokenizer's; null: the tokenizer's own."""
    lora: Lora | None = None
    """Adapters; null: every parameter is trained."""
    quantize: Literal["nf4", "int8"] | None = None
    """How the frozen weights beside adapters are held (QLoRA; extra `qlora`): nf4: 4 bits, with double quantization, computed
    with in the training precision; int8: LLM.int8(). Linear modules but the head. With `model.lora` and zero 0-2 only."""


class Task(Section):
    """A task: its rows and what its loss counts."""

    train: Sources
    """Rows to train on: a JSONL or Parquet file, a folder written by `datasets.save_to_disk`, a hub name (`name`,
    `name:config`, `name:config:split`), or a list of them."""
    validation: Sources
    """Rows whose loss is measured, named in the same way."""
    format: Spec
    """What a row holds: messages, prompt_completion, text, alpaca, sharegpt, chat_rounds, or a function of yours."""
    share: Positive | None = None
    """Share of the examples drawn, relative to the other tasks' (`mix.shares: explicit` only)."""
    epochs: Positive | None = None
    """Passes over the task's rows, relative to the other tasks' (`mix.shares: epochs` only)."""
    loss_weight: Positive = 1.0
    """Factor on the balancer's weight; the weights' sum stays the balancer's."""
    group: Text | None = None
    """Tasks of the same group count as one for the balancer, which deals its weight equally to them; null: by itself."""
    cap: Count | None = None
    """Training rows used at most; null: all."""
    validation_cap: Count | None = None
    """Validation rows used at most; null: all."""


class Mix(Section):
    """How often each task is drawn."""

    shares: Literal["proportional", "equal", "explicit", "temperature", "epochs"] = "proportional"
    """Examples of a task in a batch on average: in proportion to its n rows; the same for each; its own `share`;
    n ** (1 / temperature); n times its own `epochs`."""
    temperature: Positive | None = None
    """1: proportional; large: nearly equal (`shares: temperature` only)."""


class Batch(Section):
    """Examples of a step, tokens of a micro-batch."""

    examples: Count = 16
    """Examples in a global batch (an optimizer step), whatever the number of processes."""
    tokens: Count = 4096
    """Token positions, padding included, of one micro-batch of one process."""
    max_length: Annotated[int, Ge(2)] = 1024
    """Tokens of the longest example."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to an example above max_length."""
    packing: Literal["auto"] | bool = "auto"
    """Several examples in one row, none seeing another; auto: where the model is found to keep them apart."""
    row_length: Count | None = None
    """The most token positions of a packed row; null: chosen from the attention kernel and the longest example. Rows are as long, up
    to this, as leaves least padding; one a micro-batch where it equals `tokens`."""


class Train(Section):
    """How long to train: exactly one of steps and epochs."""

    steps: Count | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over all tasks' training rows together: steps = ceil(epochs * rows / batch.examples)."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the order of rows, of new parameters and of dropout."""


class Optimizer(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The update rule."""
    lr: Positive = 1e-4
    """Learning rate at the schedule's highest point."""
    betas: Annotated[tuple[BelowOne, BelowOne], Strict(False)] = (0.9, 0.999)
    """Decay of AdamW's first and second moment, per step."""
    eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (AdamW) or L2 penalty (SGD), times lr per step."""
    momentum: BelowOne = 0.0
    """SGD's momentum (sgd only)."""
    clip: Positive | None = 1.0
    """Largest L2 norm of the whole gradient; null: not clipped."""


class Schedule(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[int, Ge(0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    floor: Fraction = 0.0
    """Rate at the last step, as a fraction of optimizer.lr."""


class Probe(Section):
    """The small validation batch that a balancer reads, where it needs one."""

    every: Count | None = None
    """Optimizer steps between probes. null: 5, with LoRA 9 (its steps are shorter), and more where a probe reads more than
    1.5 times as many examples as a batch has."""
    groups: Count = 12
    """Groups of whole examples each task's validation rows are cut into; a probe reads one of them, in turn. Fewer, which the log
    says, where a task has too few rows for as many."""
    examples: Count | Literal["batch", "all"] = "batch"
    """Examples of each task in a group. batch: in all about a quarter more than a batch has, more of tasks with short rows; of
    each at least 4, and no more than it has rows for the groups. all: every validation row is in a group."""


class Gram(Section):
    """The tasks' single gradients, where the balancer reads their inner products."""

    params: Text = "all"
    """Trainable parameters they are taken by: all; last_layer (the model's last block); adapter (LoRA's); or a regular
    expression that is searched for in the parameters' names. Memory: one gradient a task in fp32, on every device."""
    every: Count = 1
    """Optimizer steps between them; in between the balancer keeps its weights."""


class Patience(Section):
    """What happens to a task that has stopped improving, by its validation loss on the full passes."""

    evaluations: Count
    """Full passes in a row without a new lowest loss of the task after which it is done."""
    action: Literal["log", "freeze", "drop"] = "log"
    """log: say so, once. freeze: the task's part of all weights stays what it was. drop: its weight is 0. The other
    tasks share the rest. When all tasks are done the run ends."""
    margin: NotNegative = 0.0
    """How much lower than the lowest so far counts as an improvement, in nats per target token."""


class Evaluate(Section):
    """Validation."""

    every: Count = 100
    """Optimizer steps between full passes; also before the first step and after the last."""
    tokens: Count | None = None
    """Token positions of a validation micro-batch; null: batch.tokens."""
    best: Text = "macro"
    """The loss that picks the best checkpoint: macro (mean over tasks), token (mean over target tokens), worst (highest
    of the tasks'), or a task's name."""
    probe: Probe = Probe()
    """The balancer's probe."""
    patience: Patience | None = None
    """When a task counts as done, and what happens then; null: never."""


class Checkpoint(Section):
    """What is kept to resume from."""

    every: Count | None = None
    """Optimizer steps between checkpoints, besides those at a new best and at the end; null: these only."""
    keep: Count = 2
    """Checkpoints kept, the newest ones."""
    best: bool = True
    """Whether the checkpoint with the lowest `evaluate.best` loss is kept as well."""


class Export(Section):
    """The Hugging Face folder written at the end."""

    which: Literal["best", "last", "none"] = "best"
    """The checkpoint that is exported."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the exported parameters; null: as trained."""


class Offload(Section):
    """What is kept outside the accelerator's memory."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state lives (cpu: zero 1-3; nvme: zero 3, and the run cannot be resumed)."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the parameters live (zero 3)."""
    nvme_path: TextPath | None = None
    """Folder on the NVMe disk."""


class Engine(Section):
    """DeepSpeed."""

    zero: Annotated[int, Ge(0), Le(3)] = 2
    """ZeRO stage. Partitioned over processes: 1 optimizer state; 2 gradients too; 3 parameters too."""
    offload: Offload = Offload()
    """Offloading."""
    timeout_minutes: Positive = 30.0
    """Minutes a process waits for the others before it gives up."""
    deepspeed: DeepSpeed = {}
    """Further keys of DeepSpeed's own config, verbatim, or the path of a JSON file with them, `"auto"` values included;
    one that contradicts a key of ours is an error."""


class Config(Section):
    """One experiment.

    Paths start at the current directory, and `~` is expanded where a path is used. `load` and `parse` make configs: the
    constructor checks single values only, not how they fit together.
    """

    model: Model
    """The model and the precision it is trained in."""
    tasks: Annotated[dict[TaskName, Task], MinLen(1), Wanted("a mapping from tasks' names to tasks")]
    """The tasks by name; their order in the file is their order everywhere."""
    mix: Mix = Mix()
    """How often each task is drawn."""
    batch: Batch = Batch()
    """Examples of a step, tokens of a micro-batch."""
    train: Train = Train()
    """How long to train: exactly one of steps and epochs."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """Learning rate over the steps."""
    balancer: Spec = Spec(name="CoBa")
    """What sets the tasks' weights: a method of `balancers`, or a class of yours."""
    gram: Gram = Gram()
    """The balancer's gradients."""
    objective: Spec = Spec(name="causal_lm")
    """What is minimized. `causal_lm`: cross-entropy; `router_loss: 0.02` adds a mixture of experts' load balancing loss."""
    evaluate: Evaluate = Evaluate()
    """Validation."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept to resume from."""
    export: Export = Export()
    """The Hugging Face folder written at the end."""
    output: TextPath
    """Folder of the run: its log, checkpoints and exported model."""
    engine: Engine = Engine()
    """DeepSpeed."""
    trackers: Annotated[tuple[Spec, ...], Strict(False)] = (Spec(name="console"), Spec(name="jsonl"))
    """Where metrics go: console, jsonl, tensorboard, or classes of yours."""
    cache: TextPath = "~/.cache/coba-mtl"
    """Folder of the encoded data."""

    _document: Document = PrivateAttr(default_factory=Document)

    @property
    def document(self) -> Document:
        """The YAML it was read from."""
        return self._document

    def where(self, path: str | Sequence[str | int]) -> str:
        """`file:line` of a key, by dotted path or by keys; of a key not given, that of the nearest one above it."""
        return str(self._document.place(path))

    def error(self, path: str | Sequence[str | int], found: str, wanted: str, hint: str = "") -> str:
        """One line for a ConfigError: `file:line: key: found ..., wanted .... Hint`."""
        return self._document.error(path, found, wanted, hint)

    def get(self, path: str | Sequence[str | int]) -> Any:
        """The value at a path: a section, a Spec, a number ..."""
        value: Any = self
        for key in self._document.keys(path):
            if isinstance(value, BaseModel):
                value = getattr(value, key)
            else:
                value = value[key] if isinstance(value, Mapping) else value[int(key)]
        return value

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain dicts and lists. `parse(dump(...))` gives it again."""
        return _plain(self)


def load(
    path: str | Path, overrides: Iterable[str] = (), check: Callable[[Document], Iterable[Problem]] | None = None
) -> Config:
    """Reads a config.

    Args:
        path: the YAML file.
        overrides: `key.path=value`, each value YAML; they are set in order, over what the file says.
        check: further problems to report together with ours (`mtl.spec.check`).

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    return _config(Document.read(path, overrides, FILES), check)


def parse(
    text: str,
    origin: str = "config",
    overrides: Iterable[str] = (),
    check: Callable[[Document], Iterable[Problem]] | None = None,
) -> Config:
    """`load` from a string; `origin` stands for the file's name in errors."""
    return _config(Document(text, origin, overrides, FILES), check)


def _config(document: Document, check: Callable[[Document], Iterable[Problem]] | None) -> Config:
    problems = list(document.problems)
    config = None
    if isinstance(document.data, dict):
        try:
            config = Config.model_validate(document.data)
        except ValidationError as error:
            problems += _faults(document, error)
        problems += _contradictions(document, {problem.keys for problem in problems})
        problems += check(document) if check else ()
    if problems:
        problems.sort(key=lambda problem: (problem.place.line is None, problem.place.line or 0))
        raise ConfigError(problems)
    assert config is not None
    config._document = document
    return config


# How values fit together. A rule is skipped where a key that it reads is wrong by itself, which is reported already.

Get = Callable[..., Any]
Finding = tuple[Keys, str, str, str]  # key, found, wanted, hint


def _length(get: Get) -> Iterator[Finding]:
    steps, epochs = get("train", "steps"), get("train", "epochs")
    if steps is None and epochs is None:
        yield ("train",), "neither steps nor epochs", "one of them", "For instance train: {steps: 1000}."
    elif steps is not None and epochs is not None:
        yield ("train", "epochs"), f"steps {steps} and epochs {epochs}", "one of them", "Delete the other."


def _name(get: Get, name: str) -> Iterator[Finding]:
    if name in RESERVED:
        yield ("tasks", name), f"the name {show(name)}", f"another than {either(RESERVED)}", "Rename the task."


def _best(get: Get) -> Iterator[Finding]:
    best, choices = get("evaluate", "best"), ["macro", "token", "worst", *get("tasks")]
    if best not in choices:
        yield ("evaluate", "best"), show(best), either(choices), did_you_mean(best, choices)


def _share(get: Get, name: str) -> Iterator[Finding]:
    shares = get("mix", "shares")
    for key, mode in ("share", "explicit"), ("epochs", "epochs"):
        value = get("tasks", name, key)
        if shares == mode and value is None:
            yield ("tasks", name, key), "nothing", "a number > 0", f"With mix.shares: {mode} every task has {key}."
        elif shares != mode and value is not None:
            yield ("tasks", name, key), show(value), "nothing", f"It has no meaning with mix.shares: {shares}."


def _temperature(get: Get) -> Iterator[Finding]:
    shares, value = get("mix", "shares"), get("mix", "temperature")
    if shares == "temperature" and value is None:
        yield ("mix", "temperature"), "nothing", "a number > 0", "mix.shares: temperature needs it."
    elif shares != "temperature" and value is not None:
        yield ("mix", "temperature"), show(value), "nothing", f"It has no meaning with mix.shares: {shares}."


def _lengths(get: Get) -> Iterator[Finding]:
    longest, tokens, row = get("batch", "max_length"), get("batch", "tokens"), get("batch", "row_length")
    if longest > tokens:
        yield (
            ("batch", "max_length"),
            show(longest),
            f"at most batch.tokens, {tokens}",
            "A micro-batch holds whole examples.",
        )
    if row is not None and not longest <= row <= tokens:
        yield ("batch", "row_length"), show(row), f"batch.max_length to batch.tokens, {longest} to {tokens}", ""


def _evaluation(get: Get) -> Iterator[Finding]:
    longest, tokens = get("batch", "max_length"), get("evaluate", "tokens")
    if tokens is not None and longest > tokens:
        yield ("evaluate", "tokens"), show(tokens), f"at least batch.max_length, {longest}", ""


def _momentum(get: Get) -> Iterator[Finding]:
    name, momentum = get("optimizer", "name"), get("optimizer", "momentum")
    if momentum and name != "sgd":
        yield ("optimizer", "momentum"), show(momentum), f"0 with {name}", "It is SGD's; AdamW's first moment is betas."


def _offload(get: Get) -> Iterator[Finding]:
    zero = get("engine", "zero")
    for key, lowest in ("optimizer", {"cpu": 1, "nvme": 3}), ("parameters", {"cpu": 3, "nvme": 3}):
        target = get("engine", "offload", key)
        if zero < lowest.get(target, 0):
            yield ("engine", "offload", key), target, f"none at engine.zero {zero}", f"It needs zero {lowest[target]}."
        if target == "nvme" and get("engine", "offload", "nvme_path") is None:
            yield ("engine", "offload", "nvme_path"), "nothing", "a path", f"engine.offload.{key}: nvme needs it."


def _quantize(get: Get) -> Iterator[Finding]:
    kind, zero, precision = get("model", "quantize"), get("engine", "zero"), get("model", "precision")
    if kind is None:
        return
    if get("model", "lora") is None:
        yield ("model", "quantize"), kind, "null", "Quantized weights cannot be trained: add model.lora, for instance {r: 16}."
    if zero == 3:
        hint = "transformers loads a quantized model whole on every process: with zero 2 that costs the same, and works."
        yield ("model", "quantize"), kind, "null at engine.zero 3", hint
    if kind == "int8" and precision == "fp32":
        yield ("model", "precision"), precision, "bf16 or bf16_autocast", "LLM.int8() computes in 8 and 16 bits only."


def _compile(get: Get) -> Iterator[Finding]:
    if get("model", "compile") and get("engine", "zero") == 3:
        hint = "DeepSpeed gathers each module's parameters in hooks, which would break the compiled code apart at every one."
        yield ("model", "compile"), "true", "false at engine.zero 3", hint


def _kernel(get: Get) -> Iterator[Finding]:
    kernel = get("model", "loss_kernel")
    if kernel and get("engine", "zero") == 3:
        hint = "The kernel reads the head's weights by itself, which there are in parts: leave it out, the head runs in slices."
        yield ("model", "loss_kernel"), kernel, "null at engine.zero 3", hint


def _gram(get: Get) -> Iterator[Finding]:
    params = get("gram", "params")
    try:
        re.compile(params)
    except re.error as error:
        yield ("gram", "params"), show(params), "all, last_layer, adapter or a regular expression", f"As one: {error}."
    if params == "adapter" and get("model", "lora") is None:
        yield ("gram", "params"), "adapter", "all, last_layer or a regular expression", "There is no model.lora."


def _export(get: Get) -> Iterator[Finding]:
    if get("export", "which") == "best" and not get("checkpoint", "best"):
        yield ("export", "which"), "best", "last or none", "With checkpoint.best: false the best one is not kept."


RULES = (_length, _best, _temperature, _lengths, _evaluation, _momentum, _offload, _quantize, _compile, _kernel, _gram, _export)
TASK_RULES = (_name, _share)


class _Broken(Exception):
    """A rule reads a key that is wrong by itself."""


def _contradictions(document: Document, broken: set[Keys]) -> list[Problem]:
    def get(*keys: str) -> Any:
        if any(keys[:depth] in broken for depth in range(1, len(keys) + 1)):
            raise _Broken
        value: Any = document.data
        for depth, key in enumerate(keys):
            if isinstance(value, dict) and key not in value:
                field = model_of(type_at(Config, keys[:depth])).model_fields[key]
                value = field.get_default(call_default_factory=True)
            else:
                value = getattr(value, key) if isinstance(value, BaseModel) else value[key]
        return value

    tasks = document.data.get("tasks")
    names = tasks if isinstance(tasks, dict) else ()
    problems = []
    for rule in *RULES, *(functools.partial(rule, name=name) for rule in TASK_RULES for name in names):
        try:
            problems += [document.problem(*finding) for finding in rule(get)]
        except _Broken:
            continue
    return problems


# Problems in our words.


def _faults(document: Document, error: ValidationError) -> list[Problem]:
    known, problems = {problem.keys for problem in document.problems}, []
    faults = error.errors()
    for fault in faults:
        location = fault["loc"]
        inner = (other["loc"] for other in faults if other["loc"] != location)
        if fault["type"] == "too_short" and any(loc[: len(location)] == location for loc in inner):
            continue  # pydantic counts right items only, and reports the wrong ones
        problem = _problem(document, fault["type"], location)
        if problem.keys not in known:  # the branches of a union say the same thing
            known.add(problem.keys)
            problems.append(problem)
    return problems


def _problem(document: Document, kind: str, location: Sequence[str | int]) -> Problem:
    """One of pydantic's errors in our words. Only its place is used, and whether a key is missing or unknown."""
    keys: Keys = ()
    here: Any = document.data
    for step in map(str, location):
        below = child(here, step)
        missing = kind == "missing" and isinstance(here, dict) and len(keys) == len(location) - 1
        if not missing and (
            not isinstance(here, dict | list)
            or isinstance(here, dict)
            and step not in here
            or isinstance(here, list)
            and (not step.isdecimal() or int(step) >= len(here))
        ):
            break  # the rest names a union's branch, not a key
        keys, here = (*keys, step), below
    if location and location[-1] == "[key]":
        return document.problem(keys, f"the name {show(keys[-1])}", wanted(TaskName), "Rename the task.")
    if kind == "extra_forbidden":
        known = model_of(type_at(Config, keys[:-1])).model_fields
        hint = did_you_mean(keys[-1], known) or elsewhere(Config, keys[-1])
        return document.problem(keys, "an unknown key", either(known), hint)
    declared = type_at(Config, keys)
    if kind == "missing" and len(keys) == len(location):
        return document.problem(keys, "nothing", wanted(declared))
    return document.problem(keys, show(here), wanted(declared), next_move(here, declared))


def _plain(value: Any) -> Any:
    if isinstance(value, Spec) and not value.keywords:
        return value.name
    if isinstance(value, BaseModel):
        return {key: _plain(item) for key, item in value}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# docs/config.md and docs/config.schema.json

_INTRO = """\
# Config

<!-- Written by `python -m mtl.config` from mtl/config.py. Do not edit. -->

One YAML file describes one experiment; `--set key.path=value` on the command line overrides it, as often as
needed. A key without a default is required. Everything that is wrong is reported at once, with its file and line.

- YAML 1.2: `1e-4` is a number; `no`, `on` and dates are text; only `true` and `false` are booleans. Keys are text, as
  written. The same key twice is an error. Anchors and merge keys (`<<`) work.
- Paths start at the current directory, whatever folder the file is in; `~` is expanded where a path is used.
- A value of `--set` is YAML too: `--set train.steps=10`, `--set 'optimizer.betas=[0.9, 0.95]'`, `--set model.lora.r=8`.
  Items of lists go by number, from 0: `--set trackers.0=tensorboard`. A task's name that contains dots may be written
  as it is (the longest key in the file wins) or in quotes: `--set 'tasks."v1.5".cap=100'`.
- Where a name is wanted (balancer, objective, format, tracker), write it alone or with keywords: `CoBa` or
  `{name: CoBa, window: 48}`. `--set balancer.window=60` adds a keyword, `--set balancer=Equal` replaces name and
  keywords. `package.module:attribute` names code of yours, which runs only with `--allow-code package`.
"""


def markdown() -> str:
    """docs/config.md: a table for each section."""
    tables: dict[str, list[str]] = {}
    for keys, kind, field in fields(Config):
        section = dotted(keys[:-1]).replace("*", "<task>")
        default = "" if field.is_required() else _code(_plain(field.get_default(call_default_factory=True)))
        if any(map(is_section, branches(kind))):
            default = "" if field.is_required() else "null" if type(None) in branches(kind) else "see below"
        meaning = " ".join(field.description.split()).replace("|", "\\|")
        tables.setdefault(section, []).append(f"| `{keys[-1]}` | {wanted(kind)} | {default} | {meaning} |")
    head = "| key | value | default | meaning |\n|---|---|---|---|\n"
    parts = [f"\n## {section or 'Top level'}\n\n{head}" + "\n".join(rows) + "\n" for section, rows in tables.items()]
    return _INTRO + "".join(parts)


def json_schema() -> dict[str, Any]:
    """docs/config.schema.json: what editors check and complete YAML by."""
    schema = Config.model_json_schema()
    schema["properties"]["tasks"]["additionalProperties"] = False  # no name but those of the pattern
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _code(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else dump(value).removesuffix("...\n").strip()
    return f"`{text}`"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.md").write_text(markdown(), encoding="utf-8")
    (folder / "config.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
