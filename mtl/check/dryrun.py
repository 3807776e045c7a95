"""What a run would do, without doing it: the arithmetic of its batches, its data, an example of
each task, its memory.

Everything here is computed by the run's own code (`Mix`, `deal`, `ValidationGroups`,
`load.skeleton`), in one process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtl.check import memory
from mtl.config import Config
from mtl.data.batches import Layout, ValidationGroups
from mtl.data.collate import deal, widened
from mtl.data.encoded import Encoded, TaskData
from mtl.data.mix import Mix
from mtl.data.plan import layout_for, mix_for, probe_every, steps_of, validation_groups_for
from mtl.distributed import engine
from mtl.distributed.ds_config import ds_config, zero_stage
from mtl.models import load

SAMPLED = 100  # steps whose batches are cut to measure the arithmetic, spread evenly over the run
SHOWN = 400  # tokens of an example that are shown


@dataclass(frozen=True)
class BatchSizes:
    """How global batches are cut with one layout, over `steps` of the run's steps.

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


def batch_sizes(tasks: Sequence[TaskData], mix: Mix, layout: Layout, steps: int) -> BatchSizes:
    """Cut a sample of the run's global batches as its ranks would."""
    micros, tokens, positions, largest, most = [], [], [], 0, 0
    for step in sorted({int(s) for s in np.linspace(0, steps - 1, min(steps, SAMPLED))}):
        task, row = mix.batch(step)
        splits = [tasks[k].train for k in task]
        lengths = [int(split.positions[n]) for split, n in zip(splits, row, strict=True)]
        targets = [int(split.targets[n]) for split, n in zip(splits, row, strict=True)]
        ranks = deal(lengths, layout.world, layout.tokens, layout.row_length)
        sizes = [_positions(micro, lengths, layout.tokens) for rank in ranks for micro in rank]
        micros.append(len(ranks[0]))
        tokens.append(sum(lengths))
        positions.append(sum(sizes))
        largest = max(largest, *sizes)
        most = max(
            most,
            *(sum(targets[i] for row in micro for i in row) for rank in ranks for micro in rank),
        )
    return BatchSizes(np.array(micros), np.array(tokens), np.array(positions), largest, most)


def layouts(
    config: Config, tasks: Sequence[TaskData], world: int, tokens: int
) -> dict[str, Layout]:
    """The layouts that the run may use, by name. With `packing: auto` there are two, and a
    measurement at the start decides.
    """
    wanted = {"auto": (True, False), True: (True,), False: (False,)}[config.batch.packing]
    names = {True: "packed", False: "padded"}
    return {
        names[packed]: layout_for(config, tasks, world, 0, 0, packed, tokens) for packed in wanted
    }


def batches(config: Config, tasks: Sequence[TaskData], world: int) -> list[str]:
    """The arithmetic of steps, batches and validation for `world` processes."""
    mix = mix_for(config, tasks)
    steps, examples = steps_of(config, mix), config.batch.examples
    rows = sum(mix.sizes)
    lines = [
        (
            f"{steps:,} steps of {examples:,} examples on {_of(world, 'process', 'processes')}: "
            f"{steps * examples:,} draws of {rows:,} rows"
        )
    ]
    for name, layout in layouts(config, tasks, world, config.batch.tokens).items():
        found = batch_sizes(tasks, mix, layout, steps)
        width = f", rows of {layout.row_length:,}" if layout.row_length else ""
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

    evaluate = config.evaluate
    for name, layout in layouts(
        config, tasks, world, evaluate.tokens or config.batch.tokens
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
    return lines


def data(tasks: Sequence[TaskData]) -> list[str]:
    """Rows, tokens and what was dropped, with places."""
    lines = []
    for task in tasks:
        for split, encoded in (("train", task.train), ("validation", task.validation)):
            first, *rest = encoded.problems()
            lines.append(f"{task.name} ({split}): {first}; {_span(encoded.lengths)} tokens a row")
            lines += [f"  {line}" for line in rest]
    return lines


def example(split: Encoded, i: int, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """Row i as the model reads it, special tokens included; its targets in color or in double
    brackets.
    """
    ids, target = split.ids(i).tolist(), split.target(i)
    first = int(target.argmax())
    start = max(0, first - SHOWN // 2) if len(ids) > SHOWN else 0
    stop = min(len(ids), start + SHOWN)
    edges = [start, *(j for j in range(start + 1, stop) if target[j] != target[j - 1]), stop]
    # Decode the whole text up to each edge: single tokens lose leading spaces and parts of
    # characters.
    texts = [
        tokenizer.decode(ids[start:edge], clean_up_tokenization_spaces=False) for edge in edges[1:]
    ]
    shown, before = [], ""
    for edge, text in zip(edges, texts, strict=False):
        part = text[len(before) :] if text.startswith(before) else text
        mark = ("\033[32m{}\033[0m" if color else "[[{}]]") if target[edge] else "{}"
        shown.append(mark.format(part))
        before = text
    left = [f"({start:,} tokens before) "] if start else []
    right = [f" (and {len(ids) - stop:,} more tokens)"] if stop < len(ids) else []
    return "".join([*left, *shown, *right])


def needs(
    config: Config, tasks: Sequence[TaskData], tokenizer: PreTrainedTokenizerBase, world: int
) -> list[str]:
    """The memory of one rank, a line each. Reads the model's configuration, not its weights.

    Raises:
        ModelError: the model cannot be trained as the configuration asks.
        ConfigError: `engine.deepspeed` contradicts it.
    """
    ds_config(config, world, engine.device().type)
    skeleton = load.skeleton(config, tokenizer)
    mix = mix_for(config, tasks)
    found = [
        batch_sizes(tasks, mix, one, steps_of(config, mix))
        for one in layouts(config, tasks, world, config.batch.tokens).values()
    ]
    largest, targets = max(one.largest for one in found), max(one.targets for one in found)
    stage = zero_stage(config)
    asked = f" (not {config.engine.zero}: bf16 starts there)" if stage != config.engine.zero else ""
    head = (
        f"{type(skeleton).__name__}, {config.model.precision}, ZeRO {stage}{asked}, "
        f"{_of(world, 'process', 'processes')}"
    )
    return [head, *memory.table(memory.estimate(config, stage, skeleton, world, largest, targets))]


def _micros_of_part(
    tasks: Sequence[TaskData], groups: ValidationGroups, layout: Layout, part: int
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
