"""Reading a config: strictly (no text becomes a number, no unknown key is skipped), with every
mistake reported at once.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mtl.config.document import ConfigError, Document, Keys, Problem, child, show
from mtl.config.foreign import HERE
from mtl.config.rules import contradictions
from mtl.config.schema import FILES, Config, TaskName
from mtl.config.words import did_you_mean, either, elsewhere, model_of, next_move, type_at, wanted

SHORT = "name", "path"  # keys that a text alone may stand for


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    check: Callable[[Document], Iterable[Problem]] | None = None,
) -> Config:
    """Read a config.

    Args:
        path: the YAML file.
        overrides: `key.path=value`, each value YAML; they are set in order, over the file's values.
        check: finds further problems to report together with ours (`mtl.config.spec.check`).

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    return _config(Document.read(path, overrides, FILES, _default, _short), check)


def parse(
    text: str,
    origin: str = "config",
    overrides: Iterable[str] = (),
    check: Callable[[Document], Iterable[Problem]] | None = None,
) -> Config:
    """`load` from a string; `origin` stands for the file's name in errors."""
    return _config(Document(text, origin, overrides, FILES, _default, _short), check)


def _short(keys: Keys) -> str:
    """`name`, or `path` where a mapping has that instead, as `model.adapter` does."""
    try:
        return next(key for key in model_of(type_at(Config, keys)).model_fields if key in SHORT)
    except (StopIteration, KeyError):  # an unknown key, which is reported later
        return SHORT[0]


def _default(keys: Keys) -> Any:
    """What a key is where nobody sets it, as the YAML would write it; None where that is open."""
    kind = type_at(Config, keys[:-1])
    try:
        field = model_of(kind).model_fields[keys[-1]]
    except (StopIteration, KeyError):  # within a mapping that is free; an unknown key
        return None
    if field.is_required():
        return None
    # mode="json": tuples become lists, as the YAML has them.
    return TypeAdapter(field.annotation).dump_python(field.get_default(), mode="json")


def _config(document: Document, check: Callable[[Document], Iterable[Problem]] | None) -> Config:
    problems = list(document.problems)
    config = None
    if isinstance(document.data, dict):
        try:
            config = Config.model_validate(document.data)
        except ValidationError as error:
            problems += _faults(document, error)
        problems += contradictions(document, {problem.keys for problem in problems})
        problems += check(document) if check else ()
    if problems:
        # What a --set did wrong has no line and comes last.
        problems.sort(key=lambda problem: (problem.place.line is None, problem.place.line or 0))
        raise ConfigError(problems)
    assert config is not None
    # The model is frozen; pydantic lets private attributes change.
    config._document = document
    return config


def _faults(document: Document, error: ValidationError) -> list[Problem]:
    known, problems = {problem.keys for problem in document.problems}, []
    faults = error.errors()
    for fault in faults:
        location = fault["loc"]
        inner = (other["loc"] for other in faults if other["loc"] != location)
        if fault["type"] == "too_short" and any(loc[: len(location)] == location for loc in inner):
            continue  # pydantic counts only valid items, and reports the invalid ones too
        problem = _problem(document, fault["type"], location)
        if problem.keys not in known:  # the branches of a union say the same thing
            known.add(problem.keys)
            problems.append(problem)
    return problems


def _problem(document: Document, kind: str, location: Sequence[str | int]) -> Problem:
    """One of pydantic's errors in our words. We use its place, and whether a key is missing or
    unknown.
    """
    keys, here = _named(document.data, list(map(str, location)), is_missing=kind == "missing")
    # pydantic's mark of a mapping's key that is wrong itself.
    if location and location[-1] == "[key]":
        return document.problem(
            keys, f"the name {show(keys[-1])}", wanted(TaskName), "Rename the task."
        )
    if kind == "extra_forbidden":
        if len(keys) == 1 and keys[0] in HERE:
            return document.problem(keys, "a key of another framework", HERE[keys[0]])
        known = model_of(type_at(Config, keys[:-1])).model_fields
        hint = did_you_mean(keys[-1], known) or elsewhere(Config, keys[-1])
        return document.problem(keys, "an unknown key", either(known), hint)
    declared = type_at(Config, keys)
    # Equal lengths: the location holds no union's branch. Within one, the value is wrong.
    if kind == "missing" and len(keys) == len(location):
        return document.problem(keys, "nothing", wanted(declared))
    return document.problem(keys, show(here), wanted(declared), next_move(here, declared))


def _named(data: Any, location: Sequence[str], is_missing: bool) -> tuple[Keys, Any]:
    """The keys that pydantic's location names, and their value. The rest of the location names a
    union's branch, not a key.

    Args:
        is_missing: whether the location's last key is one that is not there.
    """
    keys: Keys = ()
    for step in location:
        if not _has(data, step):
            if is_missing and isinstance(data, dict) and len(keys) == len(location) - 1:
                return (*keys, step), None
            break
        keys, data = (*keys, step), child(data, step)
    return keys, data


def _has(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and key.isdecimal() and int(key) < len(value)
