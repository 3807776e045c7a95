"""What a run would do, without doing it: the arithmetic of its batches, its data, an example of
each task, its memory.

Everything here is computed by the run's own code (`Mix`, `deal`, `ValidationGroups`,
`load.skeleton`), in one process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mtl.check import memory
from mtl.config import Config
from mtl.data.batches import Layouts, ValidationGroups
from mtl.data.collate import deal, widened
from mtl.data.encoded import TaskData
from mtl.data.examples import Examples
from mtl.data.mix import Mix
from mtl.data.plan import layouts_for, mix_for, probe_every, steps_of, validation_groups_for
from mtl.distributed import engine
from mtl.distributed.ds_config import ds_config, zero_stage
from mtl.models.errors import MissingKernel
from mtl.models.loaders import Loader

SAMPLED = 100  # steps whose batches are dealt to measure the arithmetic, spread evenly over the run


class EncodedData(Protocol):
    """`mtl.build.Data`: the encoded rows, and how each objective's become batches."""

    tokenizer: Any
    tasks: Sequence[TaskData]
    goals: Any
    examples: Sequence[Examples]


@dataclass(frozen=True)
class BatchSizes:
    """How global batches are dealt with one layout, over `steps` of the run's steps.

    Attributes:
        micros: (steps,) micro-batches of every rank.
        tokens: (steps,) tokens of a global batch.
        positions: (steps,) token positions computed for it over all ranks, padding and dummy rows
            included.
        largest: positions of the largest micro-batch.
        targets: most target tokens of a micro-batch.
    """

    micros: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    largest: int
    targets: int


def batch_sizes(tasks: Sequence[TaskData], mix: Mix, layouts: Layouts, steps: int) -> BatchSizes:
    """A sample of the run's global batches, dealt as the run would."""
    micros, tokens, positions, largest, most = [], [], [], 0, 0
    # A set: in a short run several points fall on one step.
    for step in sorted({int(s) for s in np.linspace(0, steps - 1, min(steps, SAMPLED))}):
        stream, row = mix.batch(step)
        sizes, count, total = [], 0, 0
        for layout in layouts.each:
            mine = layout.streams
            rows = [(s, n) for s, n in zip(stream, row, strict=True) if mine is None or s in mine]
            if not rows:
                continue
            lengths = [int(tasks[s].train.positions[n]) for s, n in rows]
            targets = [int(tasks[s].train.targets[n]) for s, n in rows]
            ranks = deal(lengths, layout.world, layout.tokens, layout.row_length)
            count, total = count + len(ranks[0]), total + sum(lengths)
            dealt = [micro for rank in ranks for micro in rank]
            sizes += [_positions(micro, lengths, layout.tokens) for micro in dealt]
            most = max(most, *(sum(targets[i] for row in micro for i in row) for micro in dealt))
        micros.append(count)
        tokens.append(total)
        positions.append(sum(sizes))
        largest = max(largest, *sizes)
    return BatchSizes(np.array(micros), np.array(tokens), np.array(positions), largest, most)


def layouts(config: Config, data: EncodedData, world: int, tokens: int) -> dict[str, Layouts]:
    """The layouts the run may use, by name. With `packing: auto` the model decides at start-up."""
    wanted = {"auto": (True, False), True: (True,), False: (False,)}[config.batch.packing]
    if not any(one.packs for one in data.examples):
        wanted = (False,)
    names = {True: "packed", False: "padded"}
    return {
        names[packed]: layouts_for(
            config, data.tasks, data.examples, data.goals.of, world, 0, packed, tokens
        )
        for packed in wanted
    }


def _warmup(balancer: Any, steps: int) -> list[str]:
    """A remark where the balancer, or the one within it, warms up as long as the run lasts."""
    while balancer is not None:
        given = getattr(balancer, "warmup", 0)
        if given >= steps:
            name = type(balancer).public().__name__
            return [
                f"remark: {name} gives equal weights for {given:,} steps (balancer.warmup), and "
                f"the run has {steps:,}: it never acts"
            ]
        balancer = getattr(balancer, "balancer", None)
    return []


def batches(config: Config, data: EncodedData, balancer: Any, world: int) -> list[str]:
    """The arithmetic of steps, batches and validation for `world` processes."""
    tasks = data.tasks
    mix = mix_for(config, tasks)
    steps, examples = steps_of(config, mix), config.batch.examples
    rows = sum(mix.sizes)
    lines = [
        (
            f"{steps:,} steps of {examples:,} examples on {_of(world, 'process', 'processes')}: "
            f"{steps * examples:,} draws of {rows:,} rows"
        )
    ]
    for name, layout in layouts(config, data, world, config.batch.tokens).items():
        found = batch_sizes(tasks, mix, layout, steps)
        lengths = [one.row_length for one in layout.each if one.row_length]
        width = f", rows of {max(lengths):,}" if lengths else ""
        lines.append(
            f"{name}{width}: {_span(found.micros)} micro-batches a process and step; "
            f"{_span(found.tokens)} tokens in "
            f"{_span(found.positions)} positions a step, "
            f"{found.tokens.sum() / found.positions.sum():.0%} of them tokens"
        )
    if config.batch.packing == "auto":
        lines.append(
            "packing is auto: packed if the model is measured to keep sequences apart when the run "
            "starts, else padded"
        )
    if world > examples:
        lines.append(
            f"warning: {world - examples} of {world} processes get no example of a batch: raise "
            "batch.examples"
        )
    drawn = mix.drawn(steps)
    head = ["task", "share", "rows", "examples a step", "steps an epoch", "passes in the run"]
    table = [
        [
            name,
            f"{share:.1%}",
            f"{size:,}",
            f"{share * examples:.2f}",
            f"{size / (share * examples):,.1f}",
            f"{count / size:.2f}",
        ]
        for name, share, size, count in zip(mix.names, mix.shares, mix.sizes, drawn, strict=True)
    ]
    lines += _aligned([head, *table])
    if config.mix.follow is not None:
        lines.append(
            f"from step {config.mix.every:,} on the shares are the balancer's weights "
            "(mix.follow): these figures of batches and passes hold for the shares before"
        )

    evaluate = config.evaluate
    for name, layout in layouts(
        config, data, world, evaluate.tokens or config.batch.tokens
    ).items():
        parts = validation_groups_for(config, tasks, layout)
        counts = [_micros_of_part(tasks, parts, layout, part) for part in range(parts.parts)]
        passes = math.ceil(steps / evaluate.every) + 1
        lines.append(
            f"validation, {name}: {passes:,} full passes of {sum(counts):,} micro-batches a "
            "process; a probe every "
            f"{_of(probe_every(config, parts), 'step', 'steps')} reads 1 of {parts.groups} groups, "
            f"{_span(np.array([sum(map(len, parts.rows(g))) for g in range(parts.groups)]))} "
            "examples in "
            f"{_span(np.array(counts[: parts.groups]))} micro-batches"
        )
    return lines + _warmup(balancer, steps)


def data(tasks: Sequence[TaskData]) -> list[str]:
    """Rows, tokens and what was dropped, with places."""
    lines = []
    for task in tasks:
        for split, encoded, (first, *rest) in task.reports():
            lines.append(f"{task.name} ({split}): {first}; {_span(encoded.lengths)} tokens a row")
            lines += [f"  {line}" for line in rest]
        lines += [f"{task.name}: {line}" for line in task.remarks()]
    return lines


def needs(config: Config, data: EncodedData, loader: Loader, world: int) -> list[str]:
    """The memory of one rank, a line each. Reads the model's configuration, not its weights.

    Raises:
        ModelError: the model cannot be trained as the configuration asks.
        ConfigError: `engine.deepspeed` contradicts it.
    """
    ds_config(config, world, engine.device().type)
    remarks = []
    try:
        skeleton = loader(config, data.tokenizer, data.examples, empty=True)
    except MissingKernel as e:  # here; the machines that train may have it, and memory is the same
        remarks = [f"remark: {e} The run needs it where it trains."]
        plain = config.model.model_copy(update={"attention": None})
        config = config.model_copy(update={"model": plain})
        skeleton = loader(config, data.tokenizer, data.examples, empty=True)
    tasks, mix = data.tasks, mix_for(config, data.tasks)
    found = [
        batch_sizes(tasks, mix, one, steps_of(config, mix))
        for one in layouts(config, data, world, config.batch.tokens).values()
    ]
    largest, targets = max(one.largest for one in found), max(one.targets for one in found)
    stage = zero_stage(config)
    # At stage 0 DeepSpeed cannot keep fp32 master weights beside bf16 ones (`zero_stage`).
    asked = f" (not {config.engine.zero}: bf16 starts there)" if stage != config.engine.zero else ""
    head = (
        f"{type(skeleton).__name__}, {config.model.precision}, ZeRO {stage}{asked}, "
        f"{_of(world, 'process', 'processes')}"
    )
    return [
        *remarks,
        head,
        *memory.table(memory.estimate(config, stage, skeleton, world, largest, targets)),
    ]


def _micros_of_part(
    tasks: Sequence[TaskData], groups: ValidationGroups, layout: Layouts, part: int
) -> int:
    return len(layout.deal([task.validation for task in tasks], *groups.examples(part)))


def _positions(micro: list[list[int]], lengths: Sequence[int], tokens: int) -> int:
    """Token positions of a collated micro-batch: rows times the widened longest row. An empty one
    has a dummy row of two.
    """
    return (
        len(micro) * widened(len(micro), max(sum(lengths[i] for i in row) for row in micro), tokens)
        if micro
        else 2
    )


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}-{high:,} (mean {values.mean():,.1f})"


def _of(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(
            x.ljust(w) if c == 0 else x.rjust(w)
            for c, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
