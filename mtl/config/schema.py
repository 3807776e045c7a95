"""The only definition of the experiment's YAML: every key, its type, its default and its meaning.

`docs/config.md` and `docs/config.schema.json` are written from here by `python -m
mtl.config.reference`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    StringConstraints,
    WithJsonSchema,
    create_model,
    model_validator,
)

from mtl.config.document import Document
from mtl.config.words import Wanted

Text = Annotated[str, MinLen(1), Wanted("text")]
Name = Annotated[str, MinLen(1), Wanted("a name")]
TextPath = Annotated[str, MinLen(1), Wanted("a path")]
Count = Annotated[int, Ge(1)]
Steps = Annotated[int, Ge(1), Lt(10**8)]  # a checkpoint's name has eight digits
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
# Strict mode takes tuples alone, and YAML gives lists: hence Strict(False).
Names = Annotated[tuple[Text, ...], Strict(False)]
Sources = Annotated[
    tuple[Text, ...],
    Strict(False),
    MinLen(1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Wanted("a file, folder or hub name, or a list of them"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]
        }
    ),
]
OwnSources = Annotated[Sources | None, Wanted("a file, folder or hub name, or a list of them")]
Held = Annotated[
    int | float | Sources | None,
    # A lambda, since the function is defined below.
    BeforeValidator(lambda value: _held(value)),
    Wanted("a file, folder or hub name, or a list of them, or a part of train such as 5%"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "null"},
            ]
        }
    ),
]


def _held(value: Any) -> Any:
    """A percentage as a fraction. Fractions and counts pass unchanged."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value)):
        value = float(match[1]) / 100
    if isinstance(value, float) and not 0 < value < 1 or isinstance(value, int) and value < 1:
        raise ValueError("found a part that is none, or all")
    return (value,) if isinstance(value, str) else value


DeepSpeed = Annotated[
    dict[str, Any],
    Wanted("a mapping, or the path of a JSON file"),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "minLength": 1}]}),
]
FILES = (("engine", "deepspeed"),)  # where Document reads a file in
TaskName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$"), Wanted("letters, digits, _ . -")
]
# Words that stand beside tasks in metrics' names and in `evaluate.best`; the dots are folders.
RESERVED = ("macro", "token", "worst", "log", "average", ".", "..")
BEST = ("macro", "token", "worst", "log")  # what every run may be judged by, besides a task


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
    """A callable by name, with keywords: `CoBa`, or `{name: CoBa, window: 48}`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=lambda schema: _or_text(schema))

    # `words.wanted` reads it for errors and docs.
    wanted: ClassVar = "a name, or a mapping with name and keywords"

    name: Name
    """A built-in's name, or `package.module:attribute` where the command line says `--allow-code
    package`.
    """

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class AdapterSection(Section):
    """A trained LoRA adapter. A path alone stands for `{path: ...}`."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _or_text(schema))

    wanted: ClassVar = "a path, or a mapping with path, merge and other_base"

    path: TextPath
    """A folder with an adapter_config.json, a checkpoint of a run (`RUN/checkpoints/step-...`), or
    a hub name.
    """
    merge: bool = False
    """false: training goes on in the adapter, with its own settings. A `model.lora` beside it must
    have the same. true: it is first added to the model's weights, in fp32 (zero 0-2, without
    `model.lora` and `model.quantize`).
    """
    other_base: bool = False
    """true: take the adapter though it names another base model than `model.name`: the same model
    in another place, or one whose shapes fit.
    """

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def _or_text(schema: dict[str, Any]) -> None:
    # Changed in place: pydantic goes on with the dict that it handed over.
    mapping = dict(schema)
    schema.clear()
    schema.update(anyOf=[{"type": "string", "minLength": 1}, mapping])


class LoraSection(Section):
    """Low-rank adapters (PEFT) in place of full fine-tuning."""

    r: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """The adapters' output is scaled by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: BelowOne = 0.0
    """Probability that an input of an adapter is dropped."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Modules that get an adapter: every linear one except the head, or those whose names end like
    these.
    """
    modules_to_save: Names = ()
    """Modules to train whole and save with the adapters: those whose names end like these. New
    tokens need the embedding and the head here. If the model ties these two, they stay tied.
    """
    rslora: bool = False
    """Rank-stabilized scaling."""
    dora: bool = False
    """Weight-decomposed adapters."""


class ModelSection(Section):
    """The model and its training precision."""

    name: Text
    """A folder, or a name on the hub. An adapter's folder stands for its base model, and
    `model.adapter` for the folder.
    """
    revision: Text | None = None
    """Branch, tag or commit of a hub name; null: its main branch."""
    loader: Spec = Spec(name="causal_lm")
    """What makes the model: causal_lm, sequence_classification, kpe, or a function of yours."""
    allow_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    attention: Text | None = None
    """Attention kernel by transformers' name (sdpa, eager, flash_attention_2 ...); null:
    transformers' choice.
    """
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "bf16"
    """bf16: bf16 weights with fp32 master weights and fp32 accumulated gradients; bf16_autocast:
    fp32 weights, bf16 matrix products. The loss is computed in fp32 always.
    """
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile of the model's blocks, for varying lengths; zero 0-2. The first steps take up
    to minutes longer; later steps are faster (on CPUs by a quarter, benchmarks/README.md). It needs
    a C++ compiler; on a GPU Triton.
    """
    loss_kernel: Literal["liger", "torch"] | None = None
    """A fused head and cross-entropy, for zero 0-2 and a head that is one linear module. liger:
    Liger's; it needs the extra `liger` and a GPU. torch: `linear_cross_entropy` of torch 2.13 or
    newer, for precision fp32. null: the head in slices, by the model's own code. All compute target
    positions only and never hold all logits.
    """
    chat_template: TextPath | None = None
    """File with a Jinja template that replaces the tokenizer's; null: the tokenizer's own."""
    lora: LoraSection | None = None
    """Adapters; null: every parameter is trained, or those of `model.adapter`."""
    adapter: AdapterSection | None = None
    """A trained adapter to start from; null: none."""
    quantize: Literal["nf4", "int8"] | None = None
    """How to hold the frozen weights beside adapters (QLoRA; extra `qlora`). nf4: 4 bits with
    double quantization; products are in the training precision. int8: LLM.int8(). It applies to
    linear modules except the head, with `model.lora` and zero 0-2 only.
    """


class TaskSection(Section):
    """A task: its rows and what its loss counts."""

    train: OwnSources = None
    """Rows to train on, or a list of such. A JSONL, CSV, TSV or Parquet file; a pattern
    (`data/*.jsonl`); a folder that `datasets.save_to_disk` wrote. Or a hub name: `name`,
    `name:config`, `name:config:split`, the split also as `train[:10%]`.
    """
    validation: Held = None
    """Rows whose loss is measured, named in the same way; or how many rows of `train` to hold out:
    `5%`, or a number. A hash of their content chooses them, so copies stay together. With a
    percentage, rows that you add to `train` later move no other row.
    """
    test: OwnSources = None
    """Rows that only `launch/evaluate.py` reads, never a training run; named as `train`."""
    format: Spec | None = None
    """What a row holds: messages, prompt_completion, text, labeled, alpaca, sharegpt, chat_rounds,
    preference, choices, or a function of yours.
    """
    of: Names | None = None
    """Other tasks. This task is another loss (`loss`) of their rows, in place of train, validation
    and format.
    """
    loss: Name | None = None
    """Which loss of the objective this task is (with `of`); null: the first."""
    objective: Spec | None = None
    """What is minimized on these rows; null: the run's `objective`."""
    metrics: Annotated[tuple[Spec, ...], Strict(False)] = ()
    """What is measured of the answers that the model gives to these rows: exact_match, f1, bleu,
    chrf, rouge_l, choice, json, code, or functions of yours (docs/generation.md).
    `launch/evaluate.py` reports them, and training every `evaluate.generate.every` steps.
    """
    share: Positive | None = None
    """Share of the examples drawn, relative to the other tasks' (`mix.shares: explicit` only)."""
    epochs: Positive | None = None
    """Passes over the task's rows, relative to the other tasks' (`mix.shares: epochs` only)."""
    loss_weight: Positive = 1.0
    """Factor on the balancer's weight; the weights' sum stays the balancer's."""
    group: Text | None = None
    """The balancer sees tasks of the same group as one, and they share its weight equally; null: by
    itself.
    """
    cap: Count | None = None
    """Training rows used at most; null: all."""
    validation_cap: Count | None = None
    """Validation rows used at most; null: all."""


class MixSection(Section):
    """How often each task is drawn."""

    shares: Literal["proportional", "equal", "explicit", "temperature", "epochs"] = "proportional"
    """A task's examples in an average batch are in proportion to: its n rows; 1; its own `share`; n
    ** (1 / temperature); n times its own `epochs`.
    """
    temperature: Annotated[float, Ge(0.05), Le(1e6)] | None = None
    """1: proportional; large: nearly equal (`shares: temperature` only)."""
    follow: Literal["balancer"] | None = None
    """balancer: from step `every` on the shares are the balancer's weights, and a task's loss
    counts what it has of the batch's examples. null: `shares` all along.
    """
    every: Steps = 50
    """Optimizer steps between changes of the shares (with `follow` only)."""
    floor: Fraction | None = None
    """The least share of a task, before all are brought to the sum 1; null: 1/4 of an equal one
    (with `follow` only).
    """


class BatchSection(Section):
    """Examples of a step, tokens of a micro-batch."""

    examples: Count = 16
    """Examples in a global batch (an optimizer step), whatever the number of processes."""
    tokens: Count = 4096
    """Token positions, padding included, of one micro-batch of one process."""
    max_length: Annotated[int, Ge(2)] = 1024
    """Tokens of the longest example."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to an example above max_length."""
    special_text: Literal["keep", "plain", "refuse"] = "keep"
    """What happens to a row whose texts contain a special token's text, such as `</s>`. keep: it
    becomes that token, and the log counts such rows. plain: it is read as any other text. refuse:
    the row is dropped.
    """
    packing: Literal["auto"] | bool = "auto"
    """Whether several examples share a row without seeing each other; auto: where a test finds that
    the model keeps them apart.
    """
    row_length: Count | None = None
    """The most token positions of a packed row; null: chosen from the attention kernel and the
    longest example. Up to this, rows get the length that leaves least padding. Where it equals
    `tokens`, a micro-batch is one row; a flash kernel packs no other.
    """


class OrderSection(Section):
    """One of several runs that differ only in the order of the rows, to be merged."""

    scheme: Literal["rotate", "shuffle", "batch"]
    """rotate: each task's order starts (replica / of) x its rows later, so that every row is early
    in exactly one replica. shuffle: each replica has its own order of each task's rows. batch: each
    replica has its own order of whole batches, which keep their rows.
    """
    replica: Annotated[int, Ge(0)]
    """Which replica this is, from 0."""
    of: Count
    """Replicas in all."""
    epochs: Literal["first", "all"] = "first"
    """Where the order differs: in the first pass over the rows, or in every pass. A pass is over
    each task (rotate, shuffle), or over all tasks together (batch).
    """


class NotFiniteSection(Section):
    """What happens at a step whose loss or gradient is not finite. Its update is never made."""

    action: Literal["stop", "skip", "back"] = "stop"
    """stop: the run ends, with the rows of the batch named. skip: the batch is passed over on all
    ranks; weights, optimizer and balancer stay as they were. back: all of these are read from the
    last checkpoint again, and the batch is passed over when its step comes. It also mends what was
    harmed in memory since.
    """
    most: Annotated[int, Ge(1), Le(10_000)] = 10
    """Batches passed over at most in the whole run; at the next one it ends."""


class _Train(Section):
    """How long to train: exactly one of steps and epochs."""

    steps: Steps | None = None
    """Optimizer steps. A resumed run may have more than before, never fewer. From there on it has
    the learning rate of a run of the new length (docs/cluster.md).
    """
    epochs: Annotated[float, Gt(0), Le(1e6)] | None = None
    """Passes over all tasks' training rows together: steps = ceil(epochs * rows /
    batch.examples).
    """
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the order of rows, of new parameters and of dropout."""
    order: OrderSection | None = None
    """Which replica of the order of rows this run is; null: the plain order."""
    not_finite: NotFiniteSection = NotFiniteSection()
    """A loss or gradient that is not finite."""
    spike: Annotated[float, Gt(1), Le(1e6)] | None = None
    """A task's loss of a step above this many times the median of its last 64 is a warning that
    names the rows; null: none.
    """


_FROM = Field(
    None,
    description="Weights to start a new run from, at step 0: a checkpoint of a run "
    "(`RUN/checkpoints/step-...`), an exported model or an adapter. null: those of `model.name`. "
    "`model.name` always names the tokenizer, and an adapter's base model.",
)
# There is none to read docstrings from, and the search takes 0.1 s.
_NO_SOURCE = {"use_attribute_docstrings": False}
TrainSection = create_model(  # a class statement cannot have an attribute named `from`
    "TrainSection",
    __base__=_Train,
    __doc__=_Train.__doc__,
    __cls_kwargs__=_NO_SOURCE,
    **{"from": (TextPath | None, _FROM)},
)


class OptimizerSection(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The update rule."""
    scale: dict[Text, Positive] = {}
    """Factors on the learning rate by a regular expression, which is searched for in the
    parameters' names: `{classifier: 10.0}`. The first that matches counts.
    """
    lr: Annotated[float, Gt(0), Le(1e3)] = 1e-4
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


class ScheduleSection(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[int, Ge(0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    floor: Fraction = 0.0
    """Rate at the last step, as a fraction of optimizer.lr."""


class ProbeSection(Section):
    """The small validation batch that a balancer reads, where it needs one."""

    every: Count | None = None
    """Optimizer steps between probes. null: 5, with LoRA 9, whose steps are shorter. It is more
    where a probe reads more than 1.5 times as many examples as a batch has.
    """
    groups: Count = 12
    """Groups of whole examples into which each task's validation rows are divided. Probes read them
    in turn. If a task has too few rows, there are fewer groups, and the log says so.
    """
    examples: Count | Literal["batch", "all"] = "batch"
    """Examples of each task in a group. batch: in all about a quarter more than a batch has, more
    of tasks with short rows. Each task has at least 4, and no more than its rows allow for the
    groups. all: every validation row is in a group.
    """


class GramSection(Section):
    """Each task's gradient, where the balancer reads their inner products."""

    params: Text = "all"
    """Trainable parameters to differentiate by: all; last_layer (the model's last block); adapter
    (LoRA's); or a regular expression, which is searched for in the parameters' names. Memory: one
    gradient a task in fp32, on every device.
    """
    every: Count = 1
    """Optimizer steps between them. In between the balancer keeps its weights."""


class _Patience(Section):
    """What happens to a task whose validation loss on the full passes has stopped improving: one of
    evaluations and from says when that is.
    """

    evaluations: Count | None = None
    """Full passes in a row without a new lowest loss of the task after which it is done."""
    action: Literal["log", "freeze", "drop", "anchor"] = "log"
    """log: say so, once. freeze: the task's part of all weights stays as it was. drop: its weight
    is 0, and its rows are drawn no more. anchor: it keeps a part of its weight and of its draws,
    and its loss becomes the divergence from its own best, until it improves again. The other tasks
    share the rest. When all tasks are done, the run ends.
    """
    margin: NotNegative = 0.0
    """How much lower than the lowest so far counts as an improvement, in nats per target token."""
    keep: Annotated[float, Gt(0), Le(1)] = 0.25
    """What a task that is done keeps of its weight and of its draws (action `anchor` only)."""


_TIMES = Field(
    None,
    description="An earlier run (its folder, or its JSON among a study's results): each task is "
    "done at the first full pass at or after its best step there, and stays done. null: this run's "
    "own passes say when.",
)
PatienceSection = create_model(
    "PatienceSection",
    __base__=_Patience,
    __doc__=_Patience.__doc__,
    __cls_kwargs__=_NO_SOURCE,
    **{"from": (TextPath | None, _TIMES)},
)


class AverageSection(Section):
    """An average of the trained weights, measured beside them at every full pass, as
    `eval/average/...`. It may be the best checkpoint. It takes 4 bytes a trained parameter, which
    the processes share from zero 1 on.
    """

    decay: BelowOne = 0.999
    """The exponential average keeps this part of itself at each of its updates."""
    warmup: Count = 10
    """The n-th update (from 0) keeps at most (1 + n) / (warmup + n), so that the average soon
    forgets the start; 1: no warm-up.
    """
    every: Count = 1
    """Optimizer steps between its updates."""
    last: Count | None = None
    """Average the weights at this many last full passes, and hold all of them; null: an exponential
    average.
    """
    device: Literal["cpu"] | None = None
    """cpu: hold it in the host's memory; null: beside the optimizer's state."""


class GenerateSection(Section):
    """How answers are generated for the metrics of `tasks.<task>.metrics`: greedily, with a
    key-value cache, up to the token that ends the turn.
    """

    every: Count | None = None
    """Optimizer steps between generations during training, a multiple of `evaluate.every`; also
    before the first step and after the last. Predictions stand in the output's `predictions/`.
    null: only `launch/evaluate.py` generates.
    """
    rows: Count | None = 64
    """Validation rows of each task that are asked during training, spread evenly; null: all.
    `launch/evaluate.py` asks all.
    """
    max_new_tokens: Count = 256
    """Tokens of the longest answer. A longer one is cut there."""
    batch: Count = 16
    """Rows that a process answers at once."""
    run_code: bool = False
    """Whether metrics may run code that the model writes. docs/generation.md says what keeps it
    apart from this machine, and what is not promised.
    """


class EvaluateSection(Section):
    """Validation."""

    every: Count = 100
    """Optimizer steps between full passes; also before the first step and after the last."""
    tokens: Count | None = None
    """Token positions of a validation micro-batch; null: batch.tokens."""
    best: Text = "macro"
    """What picks the best checkpoint. A loss: macro (mean over tasks), token (mean over target
    tokens), worst (the tasks' highest), log (mean over tasks of the logarithm, so that a per cent
    counts the same in every task), or a task's name. Or one of the objective's measures, such as
    accuracy, which is a mean over tasks; `task/accuracy` is one task's. Or one of the tasks'
    `metrics`, with `generate.every`.
    """
    generate: GenerateSection = GenerateSection()
    """Answers, for the tasks' metrics."""
    probe: ProbeSection = ProbeSection()
    """The balancer's probe."""
    patience: PatienceSection | None = None
    """When a task counts as done, and what happens then; null: never."""


class CheckpointSection(Section):
    """The checkpoints to keep."""

    every: Count | None = None
    """Optimizer steps between checkpoints, besides those at a new best and at the end; null: only
    these.
    """
    keep: Count = 2
    """Checkpoints kept, the newest ones."""
    best: bool = True
    """Whether the checkpoint with the lowest `evaluate.best` loss is kept as well."""
    bests: Literal["each"] | None = None
    """each: also keep every task's best model and the best single one by `evaluate.best`, weights
    only, in the output's `bests/step-...`. Those of the same step share a folder. null: none.
    """


class ExportSection(Section):
    """The Hugging Face folder written at the end."""

    which: Literal["best", "last", "average", "none"] = "best"
    """What is exported. best: the trained or averaged weights with the lowest `evaluate.best` loss.
    last: the last checkpoint. average: the last checkpoint's averaged weights.
    """
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the exported parameters; null: as trained."""


class OffloadSection(Section):
    """What to keep outside the accelerator's memory."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where to keep the optimizer's state. cpu: zero 1-3; nvme: zero 3, and the run cannot be
    resumed.
    """
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where to keep the parameters (zero 3)."""
    nvme_path: TextPath | None = None
    """Folder on the NVMe disk."""


class EngineSection(Section):
    """DeepSpeed."""

    zero: Annotated[int, Ge(0), Le(3)] = 2
    """ZeRO stage. Partitioned over processes: 1 optimizer state; 2 gradients too; 3 parameters
    too.
    """
    offload: OffloadSection = OffloadSection()
    """Offloading."""
    timeout_minutes: Annotated[float, Gt(0), Le(10080)] = 30.0
    """Minutes a process waits for the others before it gives up."""
    rendezvous_minutes: Annotated[float, Gt(0), Le(10080)] = 10.0
    """Minutes a process waits at the start until all others have started. A message every
    10 s names the missing ones. Reading the data comes afterwards, without this limit.
    """
    watchdog_minutes: Annotated[float, Gt(0), Le(10080)] | None = 5.0
    """Minutes a process may stand at the same place, in a collective say, until all print their
    stacks and the missing ones are named. The run waits on, but for a collective no longer than
    30 s beyond `timeout_minutes`. null: never, and without that end.
    """
    deterministic: bool = False
    """Let torch use algorithms alone that give the same bits at each run. An operation that has
    none ends the run with its name. Slower on GPUs.
    """
    deepspeed: DeepSpeed = {}
    """Further keys of DeepSpeed's own config, verbatim, or the path of a JSON file with them.
    `"auto"` values are allowed. A key that contradicts one of ours is an error.
    """


class Config(Section):
    """One experiment.

    Paths start at the current directory, and `~` is expanded where a path is used. `load` and
    `parse` make configs: the constructor checks single values only, not how they fit together.
    """

    model: ModelSection
    """The model and its training precision."""
    tasks: Annotated[
        dict[TaskName, TaskSection], MinLen(1), Wanted("a mapping from tasks' names to tasks")
    ]
    """The tasks by name. Their order in the file is their order everywhere."""
    mix: MixSection = MixSection()
    """How often each task is drawn."""
    batch: BatchSection = BatchSection()
    """Examples of a step, tokens of a micro-batch."""
    train: TrainSection = TrainSection()
    """How long to train: exactly one of steps and epochs."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer."""
    schedule: ScheduleSection = ScheduleSection()
    """Learning rate over the steps."""
    balancer: Spec = Spec(name="CoBa")
    """The method that sets the tasks' weights: one of docs/balancers.md, or a class of yours."""
    gram: GramSection = GramSection()
    """The balancer's gradients."""
    objective: Spec = Spec(name="causal_lm")
    """What is minimized. `causal_lm`: cross-entropy of the next tokens; `router_loss: 0.02` adds a
    mixture of experts' load balancing loss. Others: `classification`, `preference`, `kpe`,
    `zeroae_classify`, `zeroae_generate`, or one of yours (docs/extend.md).
    """
    average: AverageSection | None = None
    """An average of the trained weights beside them; null: none."""
    evaluate: EvaluateSection = EvaluateSection()
    """Validation."""
    checkpoint: CheckpointSection = CheckpointSection()
    """The checkpoints to keep."""
    export: ExportSection = ExportSection()
    """The Hugging Face folder written at the end."""
    output: TextPath
    """Folder of the run: its log, checkpoints and exported model."""
    engine: EngineSection = EngineSection()
    """DeepSpeed."""
    trackers: Annotated[tuple[Spec, ...], Strict(False)] = (
        Spec(name="console"),
        Spec(name="jsonl"),
    )
    """Where metrics go: console, jsonl, report, tensorboard, or classes of yours. jsonl and report
    are always there; `{name: report, every: 5}` writes report.html at every fifth full pass. Also
    wandb, mlflow,
    trackio, comet_ml, clearml, swanlab: each needs its package, and takes `project:` and the
    keywords of its start.
    """
    cache: TextPath = "~/.cache/coba-mtl"
    """Folder of the encoded data."""

    # A Config that code constructs has an empty YAML behind it.
    _document: Document = PrivateAttr(default_factory=Document)

    @property
    def streams(self) -> dict[str, TaskSection]:
        """The tasks that have rows of their own, in the order of the file."""
        return {name: task for name, task in self.tasks.items() if task.of is None}

    @property
    def adapter(self) -> AdapterSection | None:
        """The adapter that training starts from: `model.adapter`, or `train.from` or `model.name`
        if that is an adapter.
        """
        return self.model.adapter or next(
            (
                AdapterSection(path=path)
                # `from` is a word of Python.
                for path in (getattr(self.train, "from"), self.model.name)
                if path and adapter_folder(path)
            ),
            None,
        )

    @property
    def trains_adapter(self) -> bool:
        """Whether adapters are trained, and not every parameter."""
        return bool(self.model.lora or (self.adapter and not self.adapter.merge))

    @property
    def document(self) -> Document:
        """The YAML it was read from."""
        return self._document

    def where(self, path: str | Sequence[str | int]) -> str:
        """`file:line` of a key, by dotted path or by keys. A key that is not given has the place of
        the nearest one above it.
        """
        return str(self._document.place(path))

    def error(
        self, path: str | Sequence[str | int], found: str, wanted: str, hint: str = ""
    ) -> str:
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
        """Every key with its value, defaults included, as plain dicts and lists. `parse(dump(...))`
        restores it.
        """
        return plain(self)


def model_folder(path: str) -> Path:
    """The model's folder in a checkpoint of a run; of anything else, the path itself."""
    folder = Path(path).expanduser()
    return folder / "model" if (folder / "state.json").is_file() else folder


def adapter_folder(path: str) -> Path | None:
    """The folder of a PEFT adapter, if the path is one."""
    folder = model_folder(path)
    return folder if (folder / "adapter_config.json").is_file() else None


def takes_one_row(attention: str | None) -> bool:
    """Whether an attention kernel tells packed examples apart only in a batch of one row."""
    return "flash" in (attention or "")  # transformers' own test, for hub kernels too


def short_name(name: str) -> str:
    """`package.module:Class.attribute` -> `attribute`; a built-in's name is itself."""
    return name.rpartition(":")[2].rpartition(".")[2]


def plain(value: Any) -> Any:
    if isinstance(value, Spec) and not value.keywords:
        return value.name
    if isinstance(value, BaseModel):
        return {key: plain(item) for key, item in value}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
