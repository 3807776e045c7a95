"""What `launch/check.py` prints, section by section, in the order in which it becomes known."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mtl.check import dryrun
from mtl.config import Config, dump
from mtl.data.cache import prepare
from mtl.data.encode import load_tokenizer
from mtl.data.formats import Format

Section = tuple[str, list[str]]
"""A title, and lines."""


def encoded(config: Config, formats: Mapping[str, Format]) -> Iterator[Section]:
    """What became of each task's rows; they are in the cache then."""
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    yield "Data", dryrun.data(prepare(config, tokenizer, formats))
    yield "Cache", [f"encoded in {Path(config.cache).expanduser()}"]


def everything(
    config: Config, origin: str, formats: Mapping[str, Format], world: int, color: bool
) -> Iterator[Section]:
    """All that can be said of a run without starting it.

    Args:
        origin: the YAML's path.
        formats: each task's.
        world: processes of the run.
        color: whether targets are shown in green, else in brackets.
    """
    yield f"{origin}, with defaults", dump(config.resolved()).splitlines()
    tokenizer = load_tokenizer(config.model, config.where("model.name"))
    tasks = prepare(config, tokenizer, formats)
    yield "Data", dryrun.data(tasks)
    yield "Batches", dryrun.batches(config, tasks, world)
    shown = "in green" if color else "in [[ ]]"
    for task in tasks:
        example = dryrun.example(task.train, 0, tokenizer, color)
        yield f"{task.name}: {task.train.where(0)}, targets {shown}", example.splitlines()
    yield "Memory of one process", dryrun.needs(config, tasks, tokenizer, world)
