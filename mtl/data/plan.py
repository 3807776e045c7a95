"""From the YAML to the arithmetic of order and batches."""

from collections.abc import Sequence

from mtl.config import Config, ConfigError
from mtl.config.schema import takes_one_row
from mtl.data.batches import Layout, Layouts, ValidationGroups
from mtl.data.collate import row_length_for
from mtl.data.encoded import TaskData
from mtl.data.examples import Examples
from mtl.data.mix import Mix, Order, shares_for, steps_for

# Found with benchmarks/slopes.py and the clock, for 6 tasks and batches of 16 (docs/balancers.md).
PROBED = 1.25  # examples that a probe reads for each that a batch has
# least of each task: with 4 (not with 3), two equally frequent labels are alike in every group
LEAST = 4
EVERY = {False: 5, True: 9}  # optimizer steps between probes, [with LoRA]
READ = 24 / 16  # what a probe read there for each example of a batch


def mix_for(config: Config, tasks: Sequence[TaskData]) -> Mix:
    """Which rows stand in which global batch."""
    sizes, settings = [len(task.train) for task in tasks], config.streams.values()
    shares = shares_for(
        config.mix.shares,
        sizes,
        temperature=config.mix.temperature,
        share=[task.share for task in settings],
        epochs=[task.epochs for task in settings],
    )
    examples, train = config.batch.examples, config.train
    # None stays None: this run is no replica.
    order = train.order and Order(
        **dict(train.order),
        # A window is one pass over all tasks' rows, in batches.
        window=steps_for(1, sizes, examples),
        steps=train.steps or steps_for(train.epochs, sizes, examples),
    )
    return Mix([task.name for task in tasks], sizes, shares, examples, train.seed, order)


def steps_of(config: Config, mix: Mix) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ConfigError: the learning rate's warm-up is longer. Known here where epochs are given.
    """
    steps = config.train.steps or steps_for(config.train.epochs, mix.sizes, mix.examples)
    if config.schedule.warmup > steps:
        found, wanted = f"{config.schedule.warmup:,}", f"at most the run's steps, {steps:,}"
        raise ConfigError([config.error("schedule.warmup", found, wanted)])
    return steps


def validation_groups_for(
    config: Config, tasks: Sequence[TaskData], layout: Layout | Layouts
) -> ValidationGroups:
    """Which validation rows a probe reads. The published CoBa reads as many as a batch has,
    different ones at every step.
    """
    probe, splits = config.evaluate.probe, [task.validation for task in tasks]
    examples: list[int] | None = None
    if probe.examples == "batch":
        lengths, rows = (
            [split.positions.mean() for split in splits],
            [len(split) for split in splits],
        )
        examples = probed(config.batch.examples, lengths, rows, probe.groups)
    elif probe.examples != "all":
        examples = [probe.examples] * len(tasks)
    return ValidationGroups(tasks, probe.groups, config.train.seed, layout, examples)


def probed(batch: int, positions: Sequence[float], rows: Sequence[int], groups: int) -> list[int]:
    """Examples of each task in a probe, for a batch of `batch` examples, by the tasks' mean lengths
    and numbers of rows.

    Cheap tasks get more. For a given cost, the sum of squared errors, 1/n each, is least with n ~ 1
    / sqrt(cost).
    """
    mean = sum(positions) / len(positions)
    wanted = [round(PROBED * batch / len(positions) * (mean / each) ** 0.5) for each in positions]
    # LEAST wins over the rows there are: ValidationGroups then makes fewer groups.
    return [max(LEAST, min(n, has // groups)) for n, has in zip(wanted, rows, strict=True)]


def probe_every(config: Config, groups: ValidationGroups) -> int:
    """Optimizer steps between probes: as configured, else as many as keep their cost near a
    twentieth of a step's on a CPU.

    There a forward is a sixth of a step. With LoRA, which saves the weights' gradients, it is a
    third. benchmarks/slopes.py measures the slopes' error with so few probes.
    """
    least = EVERY[config.trains_adapter]
    # The largest group: the last of a task's may be a row longer or shorter.
    most = max(sum(len(rows) for rows in groups.rows(group)) for group in range(groups.groups))
    return config.evaluate.probe.every or max(
        least, round(least * most / (READ * config.batch.examples))
    )


def layouts_for(
    config: Config,
    tasks: Sequence[TaskData],
    examples: Sequence[Examples],
    of: Sequence[int],
    world: int,
    rank: int,
    packed: bool,
    tokens: int,
) -> Layouts:
    """How each objective's examples become micro-batches of `tokens` positions.

    Args:
        examples: of each objective.
        of: (S,) the number of each stream's objective.
        packed: whether examples that can share a row do (`batch.packing` and the model decide).
        tokens: `batch.tokens`, or that of evaluation.
    """
    dense_mask = not takes_one_row(config.model.attention)
    # Without a dense mask a row is the whole micro-batch, whose size differs from pass to pass.
    given = config.batch.row_length if dense_mask else None
    found = []
    for number, each in enumerate(examples):
        streams = [s for s, mine in enumerate(of) if mine == number]
        splits = [split for s in streams for split in (tasks[s].train, tasks[s].validation)]
        # Both splits use this layout, so the longest example of either has to fit in a row.
        longest = max(int(split.positions.max()) for split in splits)
        row_length = min(tokens, given or row_length_for(longest, tokens, dense_mask))
        # None: with one objective every row is its own, and there is nothing to pick out.
        whose = None if len(examples) == 1 else streams
        packs = packed and each.packs
        found.append(
            # pad_id 0 is not used: each objective's `Examples` bring their own.
            Layout(world, rank, tokens, 0, packs, row_length, each, streams=whose, objective=number)
        )
    return Layouts(found)
