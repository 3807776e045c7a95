"""From a config to the parts of a run: the one place that wires them.

data = encode(config)                       slow, and without a process group
engine.init_process_group(...)
run = build(config, data)                   everything that the loop needs
state = restore(run, resume)                where it stands
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from balancers import Holder
from mtl import plugins, process
from mtl.config import Config, ConfigError
from mtl.config.spec import resolve
from mtl.data.batches import Layouts, TrainBatches
from mtl.data.cache import prepare, sources_of
from mtl.data.encode import Encoder, dates, load_tokenizer
from mtl.data.encoded import TaskData
from mtl.data.examples import Book, Examples
from mtl.data.next_token import NextToken
from mtl.data.plan import layouts_for, mix_for, probe_every, steps_of, validation_groups_for
from mtl.distributed import comm, masters
from mtl.distributed.ds_config import zero_stage
from mtl.distributed.engine import Engine
from mtl.generation.asking import ENDLESS, Asking, ask, ends, evenly, last_ids, stop_at
from mtl.losses.objective import Measure, maker_of_examples
from mtl.models import accelerate, packing
from mtl.models.loaders import PLAIN
from mtl.output import manifest, provenance, report, trackers
from mtl.output.checkpoint import RUN, CheckpointError, Checkpoints
from mtl.output.files import run_records, write_json
from mtl.output.state import RunState
from mtl.report.tracker import PageTracker
from mtl.train import gram, reference
from mtl.train.anchor import Anchors
from mtl.train.average import Average
from mtl.train.optimizer import optimizer
from mtl.train.patience import Patience
from mtl.train.randomness import only_deterministic
from mtl.train.run import Run

SLOW = 4.0  # times as long as in fp32: then bf16 on a CPU is worth a remark
ENOUGH = 64  # rows of a task that tell where its turns end

Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """What a config trains on.

    Attributes:
        tasks: each stream's encoded rows, in the order of the YAML.
        goals: the objectives, and which task each loss counts for; None: next-token prediction.
        examples: of each objective.
        asking: the questions that the tasks' metrics need; None: none are asked.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: list[TaskData]
    goals: plugins.Goals | None = None
    examples: Sequence[Examples] = ()
    asking: Asking | None = None

    @property
    def measures(self) -> dict[str, Measure]:
        """What is measured beside losses: by objectives, and of generated answers."""
        return self.goals.as_one.measures | (self.asking.kinds if self.asking else {})


def say_once(text: str) -> None:
    """Print a message for people, on rank 0 alone."""
    if comm.rank() == 0:
        process.tell(text)


def encode(
    config: Config,
    allow_code: Collection[str] = (),
    say: Say = process.tell,
    rebuild: bool = False,
) -> Data:
    """Tokenize every task, or read what the cache has. Call it before there is a process group:
    collectives would time out.

    Args:
        rebuild: encode anew what is damaged in the cache.

    Raises:
        DataError: every problem of every task.
    """
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    if read := dates(tokenizer):
        say(
            f"the chat template reads today's date ({', '.join(read)}): rows are encoded again "
            "when it changes, and a run does not resume on another day. Set model.chat_template to "
            "one with a fixed date"
        )
    goals = plugins.objectives(config, allow_code)
    examples = [_examples(one, goals.book, tokenizer, config) for one in goals.each]
    if config.batch.packing is True and not all(one.packs for one in examples):
        found = "true, with an objective that does not say that it can pack"
        raise ConfigError([config.error("batch.packing", found, "auto or false")])
    formats = plugins.formats(config, allow_code)
    of_stream = {name: examples[goals.of[s]] for s, name in enumerate(config.streams)}
    tasks = prepare(config, of_stream, formats, say, rebuild)
    # In every process alike: it reads the rows' columns and communicates nothing.
    for number, one in enumerate(examples):
        mine = [s for s in range(len(tasks)) if goals.of[s] == number]
        one.settle({s: (tasks[s].train, tasks[s].validation) for s in mine})
    data = Data(tokenizer, tasks, goals, examples)
    given = config.evaluate.generate
    if given.every is None:
        return data
    return replace(data, asking=asking(config, data, "validation", given.rows, allow_code))


def asking(
    config: Config,
    data: Data,
    split: Literal["validation", "test"],
    rows: int | None = None,
    allow_code: Collection[str] = (),
) -> Asking | None:
    """The questions of every task that has metrics; None where no task has.

    Args:
        data: its tasks' validation rows are those of `split`.
        rows: of each task at most; None: all.

    Raises:
        DataError: a row has no question.
    """
    forms, names, asked = plugins.formats(config, allow_code), list(config.tasks), []
    encoder = Encoder(data.tokenizer, ENDLESS, special_text=config.batch.special_text)
    encoded = {task.name: task.validation for task in data.tasks}
    for name, mine in plugins.metrics(config, allow_code).items():
        if mine:
            sources, number = sources_of(config.tasks[name], split), names.index(name)
            made = encoded[name], sources, forms[name], encoder, rows
            asked.append(ask(name, number, mine, *made))
    settings = config.evaluate.generate
    return Asking(asked, len(names), data.tokenizer, settings) if asked else None


def agree(config: Config, flags: Mapping[str, object], say: Say = say_once) -> None:
    """Agree that every rank was started alike: one that was not would hang the others, or train
    something else. A collective.

    Versions that differ are a warning only.

    Args:
        flags: the program's own options.

    Raises:
        ValueError: it shows what differs, by key and rank.
    """
    resolved = config.resolved()
    del resolved["cache"]  # a host may have its own
    comm.same({**resolved, "flags": flags}, "configurations")
    for line in comm.differences(provenance.versions()):
        say(f"warning: versions differ: {line}")


def _examples(
    objective: Callable, book: Book, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Examples:
    """The objective's own, or next-token prediction's."""
    make = maker_of_examples(objective)
    if make is not None:
        return make(book, tokenizer, config)
    batch = config.batch
    encoder = Encoder(tokenizer, batch.max_length, batch.too_long, batch.special_text)
    return NextToken(book, tokenizer.pad_token_id or 0, encoder)


def in_memory(config: Config, tokenizer: Any, tasks: list[TaskData]) -> Data:
    """Rows of next-token prediction that are no files: for tests and benchmarks."""
    goals = plugins.objectives(config)
    examples = [NextToken(goals.book, tokenizer.pad_token_id or 0)]
    return Data(tokenizer, tasks, goals, examples)


def start_engine(
    config: Config, data: Data, allow_code: Collection[str] = (), say: Say = say_once
) -> Engine:
    """The model and its optimizer on DeepSpeed. A collective.

    Raises:
        ModelError: the model cannot be loaded or trained as the config asks.
    """
    if config.engine.deterministic:
        only_deterministic()
    torch.manual_seed(config.train.seed)  # new parameters (LoRA): the same on every rank
    model = plugins.loader(config, allow_code)(config, data.tokenizer, data.examples, empty=False)
    if new := stop_at(model, stops(data)):
        names = ", ".join(data.tokenizer.convert_ids_to_tokens(sorted(new)))
        say(f"models are saved with settings for generation that stop at {names}, as rows do")
    engine = Engine(model, config, optimizer(config), say)
    _remark_on_bf16(config, engine, say)
    if config.model.precision == "bf16" and config.engine.offload.optimizer != "nvme":
        masters.dither(engine, config.train.seed)
    return engine


def _remark_on_bf16(config: Config, engine: Engine, say: Say) -> None:
    precision = config.model.precision
    if precision == "fp32" or engine.device.type != "cpu" or comm.rank() != 0:
        return
    times = accelerate.bf16_over_fp32()
    if times > SLOW:
        say(
            f"model.precision: {precision} is slow on this CPU: a matrix product takes {times:.0f} "
            "times as long as in fp32. Set model.precision: fp32."
        )


def stops(data: Data) -> frozenset[int]:
    """Ids at which a model of these rows stops: eos, and special tokens that end their texts."""
    found: list[list[int]] = []
    for s, task in enumerate(data.tasks):
        if name := getattr(data.examples[data.goals.of[s]], "text_column", None):
            found += last_ids(task.train, name, evenly(len(task.train), ENOUGH))
    return ends(found, data.tokenizer) if found else frozenset()


def build(
    config: Config,
    data: Data,
    *,
    engine: Engine | None = None,
    packed: bool | None = None,
    holder: Holder | None = None,
    allow_code: Collection[str] = (),
    say: Say = say_once,
) -> Run:
    """The parts of a run. A collective; the process group exists.

    The engine holds the starting weights here, in a resumed run too: an objective's reference
    belongs to them, before `restore` reads the checkpoint.

    Args:
        engine: None: `start_engine`.
        packed: whether rows are packed; None: as `batch.packing` says, which may measure the model.
        holder: the balancer with its tasks; None: the config's.
        allow_code: packages outside this one whose code may run.
        say: takes messages for people.

    Raises:
        ConfigError, ModelError: what the config asks cannot be done.
        ValueError: the ranks' configs, data or balancers differ.
    """
    tasks, goals = data.tasks, data.goals
    mix = mix_for(config, tasks)
    steps = steps_of(config, mix)
    identity = provenance.identity(config, tasks, steps)
    # Ranks with other rows would draw other batches, and hang in a collective at best.
    comm.same(identity, "data")
    engine = engine or start_engine(config, data, allow_code, say)
    if packed is None:
        can = any(one.packs for one in data.examples)
        packed = can and packing.decide(config, engine, len(data.tokenizer), say)

    def layouts(tokens: int) -> Layouts:
        ranks = comm.world(), comm.rank()
        return layouts_for(config, tasks, data.examples, goals.of, *ranks, packed, tokens)

    evaluated = layouts(config.evaluate.tokens or config.batch.tokens)
    settings = config.resolved()["model"]
    weights = reference.fill(engine, goals.each, goals.specs, tasks, evaluated, settings, say)
    # A checkpoint belongs to these answers: another start would give others.
    if weights is not None:
        identity["starting model (content)"] = weights
    validation = validation_groups_for(config, tasks, evaluated)
    _describe(config, tasks, mix.shares, validation.groups, say)
    holder = holder or plugins.holder(config, allow_code)
    comm.same(holder.state_dict()["meta"], "balancers")  # all measure what it needs
    output = Path(config.output).expanduser()
    batches = TrainBatches(tasks, mix, layouts(config.batch.tokens))
    anchors, patience = None, _patience(config)
    if patience is not None and patience.times is not None:
        # The other run's folder may have changed: on --resume the tasks must be done
        # when they were.
        source = f"steps by {getattr(config.evaluate.patience, 'from')}"
        identity[source] = dict(zip(config.tasks, patience.times, strict=True))
    if patience is not None and patience.action == "anchor":
        folder = output / "anchors"
        anchors = Anchors(engine, goals.each, tasks, evaluated, batches, folder, say)
    return Run(
        config=config,
        names=list(config.tasks),
        book=goals.book,
        steps=steps,
        engine=engine,
        objective=goals.as_one,
        holder=holder,
        batches=batches,
        validation=validation,
        checkpoints=Checkpoints(
            output=output,
            keep=config.checkpoint.keep,
            identity=identity,
            tokenizer=data.tokenizer,
            versions=provenance.versions(),
            layout={"processes": comm.world(), "zero": zero_stage(config)},
            loader=_own_loader(config),
            say=say,
        ),
        differentiated=gram.supply(holder.balancer.needs, engine.module, config),
        probe_every=probe_every(config, validation),
        average=config.average and Average(engine, config.average),
        patience=patience,
        anchors=anchors,
        asking=data.asking,
    )


def _patience(config: Config) -> Patience | None:
    """Raises ConfigError where the run that says when tasks are done cannot be read."""
    given = config.evaluate.patience
    if given is None:
        return None
    source, times = getattr(given, "from"), None
    if source is not None:
        where = "evaluate", "patience", "from"
        try:
            known = report.best_steps(Path(source).expanduser())
        except (OSError, ValueError, KeyError, TypeError) as error:
            wanted = "a run's folder, or the JSON of one in a study's results"
            raise ConfigError([config.error(where, source, wanted, f"{error}.")]) from None
        missing = [name for name in config.tasks if name not in known]
        if missing:
            found = f"{source}, a run of {', '.join(known)}"
            raise ConfigError([config.error(where, found, f"one with {', '.join(missing)} too")])
        times = tuple(float(known[name]) for name in config.tasks)
    return Patience(given.evaluations, given.action, given.margin, given.keep, times)


def _own_loader(config: Config) -> tuple[str, dict[str, Any]] | None:
    """Name and keywords of a loader whose module no class of transformers opens."""
    spec = config.model.loader
    return None if spec.name in PLAIN else (spec.name, spec.keywords)


def restore(run: Run, resume: bool | int, say: Say = say_once) -> RunState:
    """Where the run stands. A collective.

    Args:
        resume: True: at its newest checkpoint, step 0 where there is none. A number: at the
            checkpoint of that step. False: at step 0.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the run has changed since.
    """
    weights = run.holder.weights  # of the tasks before the first update
    if resume is False:
        return RunState(weights=weights)
    # Every rank looks by itself: its host may not see the folder.
    found = comm.together(lambda: run.checkpoints.find(None if resume is True else resume))
    comm.same({"checkpoint": str(found)}, "newest checkpoints")
    say(
        f"resuming from {found}"
        if found
        else f"--resume: no complete checkpoint in {run.checkpoints.output}; starting at step 0"
    )
    passed = comm.on_first(run.checkpoints.passed)
    if found:
        state = run.checkpoints.load(run.engine, run.holder, found, run.average)
        if state.step > run.steps:
            raise CheckpointError(
                f"{found}: is of step {state.step}, and the run has only {run.steps} steps "
                "(train.steps, or train.epochs over the data)."
            )
        if run.anchors:
            run.anchors.restore(state)
    else:
        comm.together(run.checkpoints.check_beginning)
        state = RunState(weights=weights)
    if new := sorted(set(passed) - set(state.passed)):
        say(
            f"the batches of steps {', '.join(map(str, new))} are passed over: the run went back "
            "for them before it ended"
        )
        state.passed = sorted([*state.passed, *new])
    return state


def open_trackers(
    run: Run, state: RunState, tasks: Sequence[TaskData], allow_code: Collection[str] = ()
) -> None:
    """Write down what the run is, and open the trackers on rank 0. A collective.

    A resumed run's metrics.jsonl is first cut back to what the checkpoint knew of it.
    """
    config, output = run.config, run.checkpoints.output

    def open_on_first() -> list[trackers.Tracker]:
        if comm.rank() > 0:
            return []
        # By this mark a later start knows that the folder is a run's.
        manifest.mark(output, RUN)
        name = f"run.resumed-{state.step:08d}.json" if state.step else "run.json"
        record = provenance.record(config, tasks, run.steps, comm.world(), run.checkpoints.identity)
        for step, later in run_records(output).items():
            if step > state.step:  # of steps that `--resume=STEP` takes back
                later.unlink()
        write_json(output / name, record)
        trackers.cut_metrics(output, state.metrics_bytes, say_once)
        settings = {"output": output, "steps": run.steps, "start": state.step}
        paths = [("trackers", str(i)) for i in range(len(config.trackers))]
        opened = [resolve(config, path, plugins.TRACKER, allow_code)(**settings) for path in paths]
        for always in (trackers.Jsonl, PageTracker):  # the last table and resume read the first
            if not any(isinstance(one, always) for one in opened):
                opened.append(always(**settings))
        # The page reads the others' files.
        return sorted(opened, key=lambda one: isinstance(one, PageTracker))

    run.trackers = comm.together(open_on_first)


def _describe(
    config: Config, tasks: Sequence[TaskData], shares: Sequence[float], groups: int, say: Say
) -> None:
    for task, share in zip(tasks, shares, strict=True):
        say(f"{task.name}: {share:.1%} of the examples")
        for split, _, lines in task.reports():
            say("\n".join(f"  {split}: {line}" for line in lines))
        for line in task.remarks():
            say(f"  {line}")
    wanted = config.evaluate.probe.groups
    if groups < wanted:
        say(
            f"evaluate.probe.groups: {groups}, not {wanted}: the smallest task has no rows for "
            "more groups of this size"
        )
