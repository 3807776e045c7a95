"""What the YAML may name, and reading it with all of that checked at once."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from balancers import METHODS, Balancer, Grouped, Holder, Signal
from mtl.config import Config, ConfigError, load
from mtl.config.document import Document, Problem, show
from mtl.config.schema import BEST, Spec, short_name
from mtl.config.spec import Kind, Maker, check, resolve
from mtl.config.words import did_you_mean, either
from mtl.data.examples import Book
from mtl.data.formats import FORMATS, Format, wrong_values
from mtl.generation.metrics import METRICS, Metric
from mtl.losses.objective import (
    OBJECTIVES,
    Objectives,
    losses_of,
    plain,
    teacher_of,
    unit_of,
)
from mtl.models.loaders import LOADERS, Loader
from mtl.output.trackers import TRACKERS

BALANCER = Kind(METHODS, base=Balancer, build=True, inner="balancer")
OBJECTIVE = Kind(OBJECTIVES, arguments=3, made_once=True)
FORMAT = Kind(FORMATS, arguments=1)
LOADER = Kind(LOADERS, arguments=3, keywords=("empty",))
METRIC = Kind(METRICS, arguments=1, made_once=True)
TRACKER = Kind(TRACKERS, keywords=("output", "steps", "start"))
KINDS = {
    "balancer": BALANCER,
    "objective": OBJECTIVE,
    "tasks.*.objective": OBJECTIVE,
    "tasks.*.format": FORMAT,
    "tasks.*.metrics.*": METRIC,
    "model.loader": LOADER,
    "trackers.*": TRACKER,
}


def read(path: str, overrides: Collection[str] = (), allow_code: Collection[str] = ()) -> Config:
    """`config.load`, with wrong names and keywords of plug-ins reported beside the rest.

    Args:
        path: the YAML file.
        overrides: `key.path=value`.
        allow_code: packages outside this one whose code the YAML may name; one in the current
            directory is found too.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    if allow_code and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: nothing here replaces what is installed
    # Names and keywords first: what follows calls the code that they name.
    config = load(path, overrides, check(KINDS, allow_code))
    generated = metrics(config, allow_code)
    problems = list(_misfits(config, objectives(config, allow_code), generated))
    if problems:
        raise ConfigError(problems)
    # Only to hear whether the balancer fits the tasks.
    holder(config, allow_code)
    return config


@dataclass(frozen=True)
class Goals:
    """What a run minimizes.

    Attributes:
        each: the objectives, in the order of the YAML.
        specs: what the YAML says of each.
        of: (S,) the number of each stream's objective.
        book: which task each loss of each stream's rows counts for.
    """

    each: Sequence[Callable]
    specs: Sequence[Spec]
    of: Sequence[int]
    book: Book

    @property
    def as_one(self) -> Objectives:
        return Objectives(self.each)


def objectives(config: Config, allow_code: Collection[str] = ()) -> Goals:
    """The objectives of a config: the run's, and those of single tasks. Equal specs are one."""
    specs, made, of = [], [], []
    for name, task in config.streams.items():
        path = "objective" if task.objective is None else ("tasks", name, "objective")
        spec = config.get(path)
        # Equal specs are one objective: its rows are then dealt together.
        if spec not in specs:
            specs.append(spec)
            made.append(_built(resolve(config, path, OBJECTIVE, allow_code)))
        of.append(specs.index(spec))
    names, streams = list(config.tasks), list(config.streams)
    number = {loss: np.full(len(streams), -1) for one in made for loss in losses_of(one)}
    for s, name in enumerate(streams):
        number[losses_of(made[of[s]])[0]][s] = names.index(name)
    for k, (_, task) in enumerate(config.tasks.items()):
        for other in task.of or ():
            s = streams.index(other)
            loss = task.loss or losses_of(made[of[s]])[0]
            # A loss that is taken is reported by `_misfits`; here it keeps its first task.
            if loss in number and number[loss][s] < 0:
                number[loss][s] = k
    return Goals(made, specs, of, Book(tuple(names), tuple(streams), number))


def _built(target: Callable) -> Callable:
    """A class is built with its keywords; its instance is the objective."""
    return target() if isinstance(target, Maker) else target


def _misfits(
    config: Config, goals: Goals, generated: Mapping[str, Mapping[str, Metric]]
) -> Iterator[Problem]:
    """What names and losses of objectives do not fit together."""
    document, streams = config.document, list(config.streams)
    taken: dict[tuple[str, str], str] = {
        (name, losses_of(goals.each[goals.of[s]])[0]): name for s, name in enumerate(streams)
    }
    for name, task in config.tasks.items():
        numbers = {goals.of[streams.index(other)] for other in task.of or ()}
        if len(numbers) > 1:
            yield document.problem(
                ("tasks", name, "of"), "tasks of several objectives", "tasks of one objective"
            )
        # Of several objectives the first: the rest has been reported.
        for number in list(numbers)[:1]:
            losses = losses_of(goals.each[number])
            loss = task.loss or losses[0]
            if loss not in losses:
                hint = did_you_mean(loss, losses)
                yield document.problem(("tasks", name, "loss"), show(loss), either(losses), hint)
            for other in task.of:
                if (other, loss) in taken:
                    found = f"the loss {loss} of {other}, which is the task {taken[other, loss]}"
                    yield document.problem(("tasks", name), found, "another loss")
                taken[other, loss] = name
        if task.of is None and task.loss is not None:
            first = losses_of(goals.each[goals.of[streams.index(name)]])[0]
            if task.loss != first:
                hint = "Another loss of the same rows is a task of its own, with `of`."
                yield document.problem(("tasks", name, "loss"), show(task.loss), first, hint)
    yield from _formats(config, document)
    yield from _units(config, document, goals)
    yield from _anchors(config, document, goals)
    yield from _metrics(config, document, goals, generated)
    best, measures = config.evaluate.best, goals.as_one.measures
    each = [f"{task}/{name}" for task in config.tasks for name in measures]
    choices = [*BEST, *config.tasks, *measures]
    if config.evaluate.generate.every is not None:
        each += [f"{task}/{name}" for task, mine in generated.items() for name in mine]
        choices += dict.fromkeys(name for mine in generated.values() for name in mine)
    if best not in (*choices, *each):
        hint = did_you_mean(best, [*choices, *each])
        yield document.problem(("evaluate", "best"), show(best), either(choices), hint)


def _metrics(
    config: Config,
    document: Document,
    goals: Goals,
    generated: Mapping[str, Mapping[str, Metric]],
) -> Iterator[Problem]:
    taken, loader = goals.as_one.measures, config.model.loader.name
    for task, mine in generated.items():
        if mine and loader in LOADERS and loader != "causal_lm":
            found = f"metrics of generated answers, with model.loader: {loader}"
            yield document.problem(("tasks", task, "metrics"), found, "a causal language model")
        for number, (name, metric) in enumerate(mine.items()):
            path = ("tasks", task, "metrics", str(number))
            if getattr(plain(metric), "runs_code", False) and not config.evaluate.generate.run_code:
                hint = "It runs what the model writes: see docs/generation.md before."
                wanted = "evaluate.generate.run_code: true beside it"
                yield document.problem(path, show(name), wanted, hint)
            # Measures and metrics share the tags eval/<task>/<name>.
            if name in taken or name in (*BEST, "loss", "average", "time"):
                yield document.problem(path, f"the name {show(name)}, which is taken", "another")


def _formats(config: Config, document: Document) -> Iterator[Problem]:
    for name, task in config.streams.items():
        # A format of the user's own gives these words what meaning it likes.
        if task.format.name in FORMATS:
            for path, found, wanted, words in wrong_values(task.format.keywords):
                path, hint = ("tasks", name, "format", *path), did_you_mean(found, words)
                yield document.problem(path, show(found), wanted, hint)


def _anchors(config: Config, document: Document, goals: Goals) -> Iterator[Problem]:
    patience = config.evaluate.patience
    if patience is None or patience.action != "anchor":
        return
    for name, number in zip(config.streams, goals.of, strict=True):
        if teacher_of(goals.each[number]) is None:
            found = f"anchor, and the task {name}, whose objective has no `teacher`"
            hint = "causal_lm has one."
            path = "evaluate", "patience", "action"
            yield document.problem(path, found, "log, freeze or drop", hint)


def _units(config: Config, document: Document, goals: Goals) -> Iterator[Problem]:
    units = sorted({unit_of(one) for one in goals.each})
    if len(units) < 2:
        return
    found = f"where tasks count {' and '.join(f'{unit}s' for unit in units)}"
    if config.balancer.name == "Tokens":
        yield document.problem(("balancer",), f"Tokens, {found}", "another balancer, such as Equal")
    if config.evaluate.best == "token":
        yield document.problem(("evaluate", "best"), f"token, {found}", "macro, worst or a task")


def holder(config: Config, allow_code: Collection[str] = ()) -> Holder:
    """The balancer with its tasks, those of a `group` counting as one.

    Raises:
        ConfigError: the balancer does not fit the tasks: their number, their names, their groups.
    """
    # Made anew at every call, as a holder keeps its state.
    balancer = resolve(config, "balancer", BALANCER, allow_code)()
    try:
        weights = [task.loss_weight for task in config.tasks.values()]
        grouped = Grouped.of(balancer, {name: task.group for name, task in config.tasks.items()})
        made = Holder(grouped, list(config.tasks), weights)
    except ValueError as error:
        raise ConfigError([f"{config.where('balancer')}: balancer: {error}"]) from error
    if config.mix.follow is not None and (why := _cannot_steer(made.balancer)):
        found = f"balancer, which is {config.balancer.name}"
        raise ConfigError([config.error("mix.follow", found, "null, or another balancer", why)])
    return made


def _cannot_steer(balancer: Balancer) -> str:
    """Why draws cannot follow its weights; nothing where they can."""
    if not (balancer.sums_to_one and balancer.non_negative):
        return "The scale or the sign of its weights has a meaning that shares of draws have not."
    if Signal.TOKENS in balancer.needs:
        return "Its weights follow the draws: the one would drive the other."
    return ""


def formats(config: Config, allow_code: Collection[str] = ()) -> dict[str, Format]:
    """Each stream's format, its keywords bound."""
    return {
        name: resolve(config, ("tasks", name, "format"), FORMAT, allow_code)
        for name in config.streams
    }


def metrics(config: Config, allow_code: Collection[str] = ()) -> dict[str, dict[str, Metric]]:
    """Each stream's metrics of generated answers by name: a built-in's, or that of your
    attribute.
    """
    return {
        stream: {
            short_name(spec.name): _built(
                resolve(config, ("tasks", stream, "metrics", i), METRIC, allow_code)
            )
            for i, spec in enumerate(task.metrics)
        }
        for stream, task in config.streams.items()
    }


def loader(config: Config, allow_code: Collection[str] = ()) -> Loader:
    """What makes the model, its keywords bound."""
    return resolve(config, "model.loader", LOADER, allow_code)
