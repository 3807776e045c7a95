"""From a name in the YAML to the callable it names, bound to the keywords that stand beside it.

A balancer, a data format, an objective and a tracker are one callable each: a built-in's name in a
literal table, or `package.module:attribute` of a package that the command line allows. A mistake
(unknown name, failed import, unknown or missing keyword, a value that the constructor refuses) is a
ConfigError with file and line. Nothing is skipped.
"""

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NoReturn

from pydantic import ValidationError

from mtl.config import Config
from mtl.config.document import ConfigError, Document, Keys, Place, Problem, child, show
from mtl.config.schema import Spec
from mtl.config.words import did_you_mean, either

_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_FORM = "package.module:attribute"


@dataclass(frozen=True)
class Kind:
    """What may stand at a key of the YAML, and how the program calls it.

    Args:
        table: built-in names, each with where it lives ({"CoBa": "balancers.coba:CoBa"}).
        base: what a call gives: a class must derive from it, a function must return it. None: not
            looked at.
        arguments: leading positional arguments that the program passes.
        keywords: keyword arguments that the program passes.
        build: it is complete with the YAML's keywords, so `check` calls it, to hear what its
            constructor refuses.
        inner: with `base`, a keyword whose value is another spec of this kind, built first; code
            from outside may stand there.
        made_once: a class is built with the YAML's keywords, and the program calls its instance.
    """

    table: Mapping[str, str]
    base: type | None = None
    arguments: int = 0
    keywords: tuple[str, ...] = ()
    build: bool = False
    inner: str | None = None
    made_once: bool = False


@dataclass(frozen=True)
class Maker:
    """A class (or a function that makes an object) with its keywords, of which some may be Makers.
    A ValueError or TypeError of its constructor becomes a ConfigError that names the YAML's line:
    that of a keyword where the text begins with `keyword:` or `Class keyword:`, as the constructors
    of this repository write it, else that of the whole spec.
    """

    target: Callable[..., Any]
    keywords: Mapping[str, Any]
    base: type | None
    places: Mapping[str, tuple[Place, Keys]]
    """Where the spec ("") and each of its keywords stand."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        name = self.target.__name__
        keywords = {
            key: value() if isinstance(value, Maker) else value
            for key, value in self.keywords.items()
        }
        try:
            made = self.target(*args, **more, **keywords)
        except (ValueError, TypeError) as error:
            text = str(error) if str(error).startswith(name) else f"{name} refuses it: {error}"
            raise ConfigError([Problem(*self._blamed(str(error)), text)]) from error
        if self.base and not isinstance(made, self.base):
            text = (
                f"found {name}, which made one of type {type(made).__name__}, wanted "
                f"{self.base.__name__}."
            )
            raise ConfigError([Problem(*self.places[""], text)])
        return made

    def _blamed(self, text: str) -> tuple[Place, Keys]:
        key = text.partition(":")[0].removeprefix(f"{self.target.__name__} ")
        return self.places.get(key, self.places[""])


def resolve(
    config: Config, path: str | Sequence[str | int], kind: Kind, allow_code: Collection[str] = ()
) -> Callable[..., Any]:
    """The callable that the spec at `path` names, its keywords bound: a `Maker` of a class, a
    partial of a function.

    Args:
        path: where the spec stands, as `config.get` takes it ("balancer", ("tasks", name,
            "format")).
        allow_code: packages outside this one whose code may run.

    Raises:
        ConfigError: everything that is wrong with it, a line each.
    """
    keys = config.document.keys(path)
    return _Found(config.get(path), keys, kind, allow_code, config.document).made()


def resolve_in(
    document: Document, path: str, kind: Kind, allow_code: Collection[str] = ()
) -> Callable[..., Any]:
    """`resolve` of a spec that stands in a document of its own, such as a command line's.

    Raises:
        ConfigError: everything that is wrong with it, a line each.
    """
    keys = document.keys(path)
    spec = Spec.model_validate(functools.reduce(child, keys, document.data))
    return _Found(spec, keys, kind, allow_code, document).made()


def check(
    kinds: Mapping[str, Kind], allow_code: Collection[str] = ()
) -> Callable[[Document], list[Problem]]:
    """For `load(..., check=check(...))`: what is wrong with the specs, reported together with the
    rest of the YAML.

    Args:
        kinds: what may stand where; `*` in a path is any task or item ("balancer",
            "tasks.*.format", "trackers.*").
        allow_code: packages outside this one whose code may run.
    """

    def problems(document: Document) -> list[Problem]:
        found: list[Problem] = []
        for pattern, kind in kinds.items():
            for keys, value in _matches(document.data, tuple(pattern.split("."))):
                try:
                    spec = Spec.model_validate(value)
                except ValidationError:
                    continue  # config.py has reported it
                try:
                    made = _Found(spec, keys, kind, allow_code, document).made()
                    if kind.build:
                        made()
                except ConfigError as error:
                    found += error.problems
        return found

    return problems


def _matches(data: Any, pattern: Keys, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if not pattern:
        yield above, data
        return
    # Keys of a mapping, numbers of a list; a scalar has nothing below it.
    every = (
        data.keys()
        if isinstance(data, dict)
        else map(str, range(len(data)))
        if isinstance(data, list)
        else ()
    )
    for key in every:
        if pattern[0] in ("*", key):
            yield from _matches(child(data, key), pattern[1:], (*above, key))


@dataclass(frozen=True)
class _Found:
    """A spec at its place in the YAML. Every step raises a ConfigError that names the place."""

    spec: Spec
    keys: Keys
    kind: Kind
    allow_code: Collection[str]
    document: Document

    def made(self) -> Callable[..., Any]:
        """What `resolve` gives."""
        target = self._suited(self._attribute(*self._allowed()))
        keywords = self._keywords(target)
        if not isinstance(target, type) and not self.kind.base:
            return functools.partial(target, **keywords)
        places = {key: self._place(key) for key in ("", *keywords)}
        return Maker(target, keywords, self.kind.base, places)

    def _allowed(self) -> tuple[str, str]:
        """Module and attribute; nothing of either has run."""
        name, table = self.spec.name, self.kind.table
        dotted = table.get(name, name)
        if not _DOTTED.fullmatch(dotted):
            self._fail(show(name), either([*table, _FORM]), did_you_mean(name, table))
        module, _, attribute = dotted.partition(":")
        package = module.partition(".")[0]
        if name not in table and package not in self.allow_code:
            self._fail(
                f"{show(name)}, code from outside",
                "a built-in name, or code that is allowed",
                f"To let it run, add --allow-code {package} to the command line.",
            )
        return module, attribute

    def _attribute(self, module: str, attribute: str) -> Any:
        dotted, package = show(f"{module}:{attribute}"), module.partition(".")[0]
        try:
            target = import_module(module)
        # A module runs as it is imported, so it may raise anything.
        except Exception as error:
            # The package itself is missing, and not something that it imports.
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            self._fail(
                f"{dotted}, whose import fails ({_reason(error)})",
                "a module that can be imported",
                "Is it installed, in the current directory or in PYTHONPATH?" if absent else "",
                error,
            )
        for name in attribute.split("."):
            if not hasattr(target, name):
                self._fail(
                    f"{dotted}, which is not there",
                    f"an attribute of {module}",
                    did_you_mean(name, dir(target)),
                )
            target = getattr(target, name)
        return target

    def _suited(self, target: Any) -> Callable[..., Any]:
        """The target, if it is one of the kind."""
        dotted, base = show(self.kind.table.get(self.spec.name, self.spec.name)), self.kind.base
        if not callable(target):
            self._fail(f"{dotted}, of type {type(target).__name__}", "a class or a function")
        if base and isinstance(target, type) and not issubclass(target, base):
            self._fail(
                f"{dotted}, which is not a {base.__name__}",
                f"a subclass of {base.__module__}.{base.__qualname__}",
            )
        return target

    def _keywords(self, target: Callable[..., Any]) -> dict[str, Any]:
        """The YAML's keywords, the inner spec among them resolved."""
        keywords, inner = dict(self.spec.keywords), self.kind.inner
        problems = list(_misfits(target, self.spec, self.keys, self.kind, self.document))
        if inner in keywords:
            try:
                spec = Spec.model_validate(keywords[inner])
                keywords[inner] = replace(self, spec=spec, keys=(*self.keys, inner)).made()
            except ValidationError:
                pass  # neither a name nor a mapping with one: the constructor says what it wanted
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return keywords

    def _place(self, keyword: str) -> tuple[Place, Keys]:
        keys = (*self.keys, keyword) if keyword else self.keys
        return self.document.place(keys), keys

    def _fail(
        self, found: str, wanted: str, hint: str = "", cause: BaseException | None = None
    ) -> NoReturn:
        problem = self.document.problem(self.keys, found, wanted, hint)
        # Where the spec is a mapping, its name's own line.
        at_name = self.document.place((*self.keys, "name"))
        raise ConfigError([problem._replace(place=at_name)]) from cause


def _misfits(
    target: Callable[..., Any], spec: Spec, keys: Keys, kind: Kind, document: Document
) -> Iterator[Problem]:
    """Where the keywords (and what the program passes) do not fit the signature."""
    # A class that is made once takes the YAML's keywords; its instance is what the program calls.
    arguments = 0 if kind.made_once and isinstance(target, type) else kind.arguments
    try:
        signature = inspect.signature(target)
    except ValueError:
        yield document.problem(
            keys, f"{show(spec.name)}, whose signature is unknown", "one written in Python"
        )
        return
    try:
        # None stands for each value: only their number and names are tried.
        passed = signature.bind_partial(
            *[None] * arguments, **dict.fromkeys(kind.keywords)
        ).arguments
    except TypeError as error:
        wanted = (
            [f"{kind.arguments} argument{'s' * (kind.arguments > 1)}"] if kind.arguments else []
        )
        wanted += [f"{name}=" for name in kind.keywords]
        yield document.problem(
            keys,
            f"{show(spec.name)}, whose signature is {signature} ({error})",
            f"one that takes {', '.join(wanted)}",
        )
        return
    every = signature.parameters.values()
    named = {
        p.name: p
        for p in every
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in passed
    }
    # With **keywords the callable itself decides which it knows.
    if not any(p.kind is p.VAR_KEYWORD for p in every):
        accepted = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in named.values()
        )
        for key in spec.keywords:
            if key not in named:
                yield document.problem(
                    (*keys, key),
                    "an unknown keyword",
                    f"one of {accepted}" if accepted else f"none: {spec.name} takes no keywords",
                    did_you_mean(key, named),
                )
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in spec.keywords:
            yield document.problem(
                (*keys, name), "nothing", f"a value, which {spec.name} has no default for"
            )


def _reason(error: Exception) -> str:
    """The exception in a line, with the line of code that raised it where that is not the import
    itself.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename
    ]
    # The first frame is our own call of import_module.
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{at}"
