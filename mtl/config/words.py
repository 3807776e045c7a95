"""The types of a pydantic model in words, for the "wanted" of errors and for the docs."""

import difflib
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from mtl.config.document import Keys, dotted

_NAMES = {int: "a whole number", float: "a number", str: "text"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Wanted(str):
    """A type's name in words, given in its annotation."""


def next_move(found: Any, declared: Any) -> str:
    """A hint for a user who wrote `found` where `declared` is wanted; often empty."""
    options, kinds = _options(declared), _kinds(declared)
    if isinstance(found, str):
        if bool in kinds and found.lower() in ("yes", "no", "on", "off", "true", "false"):
            return "YAML 1.2 has true and false only, without quotes."
        if kinds & {int, float} and _is_number(found):
            return "Remove the quotes."
        return did_you_mean(found, options)
    elif str in kinds and isinstance(found, bool | int | float):
        return "Put it in quotes."
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def wanted(kind: Any) -> str:
    """A type in words: "a whole number >= 1 or null"."""
    kind, metadata = _split(kind)
    # Words given beside a type win over what the type itself would say.
    names = [item for item in metadata if isinstance(item, Wanted)]
    if names:
        return names[0]
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in _SIGNS.items()
        if hasattr(item, name)
    ]
    return f"{_plainly(kind)} {' and '.join(limits)}".strip()


def _plainly(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple and args[-1] is ...:
        return f"a list, each item {wanted(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {wanted(args[0])}"
    if origin in (Union, UnionType, Literal) or kind is bool:
        return either(_alternatives(kind))
    return _NAMES.get(kind) or getattr(kind, "wanted", "a mapping")


def _alternatives(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["null"]
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return [word for arg in get_args(kind) for word in _alternatives(arg)]
    return [wanted(kind)]


def either(words: Iterable[Any]) -> str:
    """ "a, b or c" """
    words = [str(word) for word in words]
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def did_you_mean(word: Any, choices: Iterable[str]) -> str:
    """ "Did you mean steps?", or nothing where nothing is close."""
    folded = {choice.casefold(): choice for choice in choices}
    # The YAML may have a number or null where a word is wanted.
    close = difflib.get_close_matches(str(word).casefold(), list(folded), n=1)
    return f"Did you mean {folded[close[0]]}?" if close else ""


def elsewhere(root: type[BaseModel], key: str) -> str:
    """For a key that belongs under another one."""
    # A path with * cannot be written: it stands for any task.
    places = [dotted(keys) for keys, _, _ in fields(root) if keys[-1] == key and "*" not in keys]
    return f"Did you mean {either(places)}?" if places else ""


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return (get_args(kind)[0], kind.__metadata__) if get_origin(kind) is Annotated else (kind, ())


def branches(kind: Any) -> list[Any]:
    """The types of a union; else the one."""
    kind = _split(kind)[0]
    return (
        [_split(arg)[0] for arg in get_args(kind)]
        if get_origin(kind) in (Union, UnionType)
        else [kind]
    )


def _kinds(kind: Any) -> set[Any]:
    return {get_origin(branch) or branch for branch in branches(kind)}


def _options(kind: Any) -> list[str]:
    return [
        str(arg)
        for branch in branches(kind)
        if get_origin(branch) is Literal
        for arg in get_args(branch)
    ]


def model_of(kind: Any) -> type[BaseModel]:
    return next(
        branch
        for branch in branches(kind)
        if isinstance(branch, type) and issubclass(branch, BaseModel)
    )


def type_at(root: type[BaseModel], keys: Keys) -> Any:
    """The declared type of a key; Any inside a mapping that is free."""
    kind: Any = root
    for key in keys:
        for branch in branches(kind):
            if isinstance(branch, type) and issubclass(branch, BaseModel):
                kind = (
                    get_type_hints(branch, include_extras=True)[key]
                    if key in branch.model_fields
                    else Any
                )
                break
            if get_origin(branch) is dict:
                kind = get_args(branch)[1]
                break
            if get_origin(branch) is tuple:
                args = get_args(branch)
                kind = args[0] if args[-1] is ... else args[int(key)]
                break
        # No branch has keys of its own, so anything may stand here.
        else:
            return Any
    return kind


def fields(model: type[BaseModel], above: Keys = ()) -> Iterator[tuple[Keys, Any, Any]]:
    """Every key: its path (`*` for a name that is free), its type, its pydantic field; a section
    before its keys.
    """
    for key, kind in get_type_hints(model, include_extras=True).items():
        # Class variables and private attributes have type hints too.
        if key not in model.model_fields:
            continue
        keys = (*above, key)
        yield keys, kind, model.model_fields[key]
        for branch in branches(kind):
            if get_origin(branch) is dict:
                keys, branch = (*keys, "*"), get_args(branch)[1]
            if is_section(branch):
                yield from fields(branch, keys)


def is_section(kind: Any) -> bool:
    """Whether it is a model with fixed keys."""
    return (
        isinstance(kind, type)
        and issubclass(kind, BaseModel)
        # A Spec allows extra keys, which are the callable's own.
        and kind.model_config.get("extra") == "forbid"
    )
