"""A YAML document that remembers where every key stands.

YAML 1.2 core schema: `1e-4` is a number; `no`, `on` and dates are text; `010` is ten and `0o17`
fifteen. Keys are text, as written. Anchors and merge keys (`<<`) work, the same key twice is an
error. No tag ever creates an object.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Keys = tuple[str, ...]
"""A key's path: ("tasks", "define", "train", "0"); an item of a list stands under its number,
counted from 0.
"""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
MOST = 20_000  # values in a document; a few aliases of aliases would make billions
DEEPEST = 50  # levels of a document
BRACKETS = 200  # open at once, where reading ends; what is deeper than DEEPEST is an error anyway
_BASES = {"0o": 8, "0x": 16}
_KEY = r'(?:"[^"]*"|[^."=]+)'
_OVERRIDE = re.compile(rf"({_KEY}(?:\.{_KEY})*)=(.*)", re.DOTALL)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, a line each: `file:line: key: found ...,
    wanted .... Next move.`
    """

    def __init__(self, problems: "Iterable[str | Problem]"):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Place(NamedTuple):
    """Where a key stands: a file and its line (from 1), or the `--set` that gave it."""

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}"


class Problem(NamedTuple):
    """One thing that is wrong, and where."""

    place: Place
    keys: Keys
    text: str

    def __str__(self) -> str:
        return ": ".join([str(self.place), *([dotted(self.keys)] if self.keys else []), self.text])


class _Loader(yaml.SafeLoader):
    # Empty: nothing of YAML 1.1 (`no`, 1:30, dates) is inherited.
    yaml_implicit_resolvers: dict = {}

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        # The scanner's work grows with the square of the brackets that are open: a second at 1,000.
        if self.flow_level >= BRACKETS:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read as the same value: text that either takes for
    something else is quoted.
    """


for _name, _regex in _SCALARS.items():
    # None: tried on every scalar, whatever character it begins with.
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_regex})$"), None)
    # Beside PyYAML's own of YAML 1.1, which the dumper keeps.
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_regex})$"), None)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile("^<<$"), None)


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    rare = not {"\x85", "\u2028", "\u2029"}.isdisjoint(
        text
    )  # line breaks to YAML 1.1: PyYAML folds them into spaces
    return dumper.represent_scalar(_TAG + "str", text, style='"' if rare else None)


_Dumper.add_representer(str, _text_node)


class Document:
    """A YAML text: its values (`data`: plain dicts, lists and scalars), their places, and its
    mistakes.

    Args:
        text: the YAML.
        origin: its file's name in errors.
        overrides: `key.path=value`, each value YAML; they are set in order.
        files: keys whose value may be the path of a JSON file instead, which is read in its place.
        default: what stands at keys that the text leaves out, where an override changes a part.
        short: which key of a mapping a text in its place stands for.
    """

    def __init__(
        self,
        text: str = "",
        origin: str = "config",
        overrides: Iterable[str] = (),
        files: Sequence[Keys] = (),
        default: Callable[[Keys], Any] = lambda keys: None,
        short: Callable[[Keys], str] = lambda keys: "name",
    ):
        self.origin = origin
        self._default, self._short = default, short
        self.problems: list[Problem] = []
        self._count = 0
        # The root has a place always, so `place` finds one for any path.
        self._places: dict[Keys, Place] = {(): Place(origin)}
        root = self._compose(text, Place(origin, 1))
        self.data: Any = None
        if root is not None:
            self._places[()] = self._at(root, Place(origin, 1))
            self.data = self._value(root, (), self._places[()], ())
        # Text that is not YAML has been reported already.
        if not self.problems and not isinstance(self.data, dict):
            found = "an empty file" if root is None else show(self.data)
            self._wrong((), self._places[()], found, "a mapping of keys to values")
        self._files = files
        for override in overrides:
            self._override(override)
        # After the overrides: one may name another file, or have read it to change a key.
        for keys in files:
            above = functools.reduce(child, keys[:-1], self.data)
            if isinstance(name := child(above, keys[-1]), str):
                above[keys[-1]] = self._read(name, keys)

    @classmethod
    def read(
        cls,
        path: str | Path,
        overrides: Iterable[str] = (),
        files: Sequence[Keys] = (),
        default: Callable[[Keys], Any] = lambda keys: None,
        short: Callable[[Keys], str] = lambda keys: "name",
    ) -> "Document":
        """Read a UTF-8 file.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise ConfigError(
                [
                    (
                        f"{path}: found no such file, wanted a YAML config. Paths start at the "
                        "current "
                        f"directory, {Path.cwd()}."
                    )
                ]
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                [
                    (
                        f"{path}: found bytes that are not UTF-8 ({error.reason} at byte "
                        f"{error.start}), wanted UTF-8 text."
                    )
                ]
            ) from None
        except OSError as error:
            raise ConfigError(
                [f"{path}: found an unreadable file ({error.strerror}), wanted a YAML config."]
            ) from None
        return cls(text, str(path), overrides, files, default, short)

    def keys(self, path: str | Sequence[str | int]) -> Keys:
        """The keys of a dotted path. A key that contains dots may be quoted (`tasks."v1.5".cap`);
        unquoted, the longest key that exists wins.
        """
        if not isinstance(path, str):
            return tuple(str(key) for key in path)
        rest, keys, here = re.findall(_KEY, path), (), self.data
        while rest:
            count = 1
            if isinstance(here, dict):
                joined = (n for n in range(len(rest), 1, -1) if ".".join(rest[:n]) in here)
                count = next(joined, 1)
            key = ".".join(rest[:count])
            key = key[1:-1] if key.startswith('"') else key
            keys, rest = (*keys, key), rest[count:]
            here = child(here, key)
        return keys

    def place(self, path: str | Sequence[str | int]) -> Place:
        """Where the key stands; where it is missing, the place of the nearest key above it."""
        keys = self.keys(path)
        return next(
            self._places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self._places
        )

    def problem(
        self, path: str | Sequence[str | int], found: str, wanted: str, hint: str = ""
    ) -> Problem:
        return Problem(self.place(path), self.keys(path), _text(found, wanted, hint))

    def error(
        self, path: str | Sequence[str | int], found: str, wanted: str, hint: str = ""
    ) -> str:
        """One line for a ConfigError: `file:line: key: found ..., wanted .... Hint`."""
        return str(self.problem(path, found, wanted, hint))

    def _compose(self, text: str, place: Place) -> yaml.Node | None:
        try:
            return yaml.compose(text, _Loader)
        except RecursionError:
            self._wrong((), place, "brackets hundreds of levels deep", f"at most {DEEPEST}")
            return None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            # A --set has no lines.
            if place.line is not None:
                place = Place(place.origin, mark.line + 1 if mark else None)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            column = f", column {mark.column + 1}" if mark else ""
            hint = "Indent with spaces." if "'\\t'" in reason else ""
            self._wrong((), place, f"text that is not YAML ({reason}{column})", "YAML 1.2", hint)
            return None

    def _override(self, text: str) -> None:
        place = Place(f"--set {text}")
        match = _OVERRIDE.fullmatch(text)
        if not match:
            hint = "Write --set train.steps=10."
            self._wrong((), place, "text of another form", "KEY=VALUE", hint)
            return
        # `--set key=` means null; PyYAML makes no node of an empty text.
        node = (
            self._compose(match[2], place)
            if match[2].strip()
            else yaml.ScalarNode(_TAG + "null", "")
        )
        if node is None or not isinstance(self.data, dict):  # either has been reported
            return
        keys, here = self.keys(match[1]), self.data
        for depth, key in enumerate(keys[:-1], start=1):
            below = child(here, key)
            if below is None:
                # Items of a default list can be set one by one: trackers.0=tensorboard.
                below = self._default(keys[:depth])
                below = list(below) if isinstance(below, list | tuple) else {}
            elif isinstance(below, str) and keys[:depth] in self._files:
                below = self._read(below, keys[:depth]) or {}
            elif isinstance(below, str):  # `balancer: CoBa` is short for `balancer: {name: CoBa}`
                below = {self._short(keys[:depth]): below}
            if not self._put(here, keys[:depth], below, place):
                return
            self._places.setdefault(keys[:depth], place)
            here = below
        # Else errors would show the lines of what is replaced.
        for known in [known for known in self._places if known[: len(keys)] == keys]:
            del self._places[known]
        self._put(here, keys, self._value(node, keys, place, ()), place)

    def _read(self, name: str, keys: Keys) -> Any:
        """The content of a JSON file that stands for the value at `keys`; its own keys' places are
        in that file.
        """
        place, wanted = self._places[keys], "a file with a JSON object"
        try:
            text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
            # JSON's own parser is the judge; YAML composes the text again, for lines.
            content = json.loads(text, parse_constant=_no_number)
        except RecursionError:
            return self._wrong(keys, place, f"{name}, hundreds of levels deep", wanted)
        except OSError as error:
            hint = f"Paths start at the current directory, {Path.cwd()}."
            return self._wrong(
                keys, place, f"{show(name)}, which cannot be read ({error.strerror})", wanted, hint
            )
        except json.JSONDecodeError as error:
            reason = f"{name}:{error.lineno}: {error.msg}, column {error.colno}"
            return self._wrong(keys, place, f"text that is not JSON ({reason})", wanted)
        except ValueError as error:
            return self._wrong(keys, place, f"text that is not JSON ({name}: {error})", wanted)
        if not isinstance(content, dict):
            return self._wrong(keys, place, f"{show(content)} in {name}", wanted)
        # JSON is YAML, but for tabs between tokens; in its strings there are none.
        node = self._compose(text.replace("\t", " "), Place(name, 1))
        return None if node is None else self._value(node, keys, Place(name, 1), ())

    def _put(self, here: Any, keys: Keys, value: Any, place: Place) -> bool:
        key = keys[-1]
        if isinstance(here, dict):
            here[key] = value
        elif isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            here[int(key)] = value
        elif isinstance(here, list):
            self._wrong(
                keys,
                place,
                f"item {key} of a list of {len(here)}",
                "one that is there, counted from 0",
            )
            return False
        else:
            self._wrong(
                keys, place, f"{show(here)} at {dotted(keys[:-1])}", "a mapping or a list there"
            )
            return False
        return True

    def _value(self, node: yaml.Node, keys: Keys, place: Place, above: tuple[int, ...]) -> Any:
        """The node's value. `above`: the nodes it stands in, as an alias may name one of them."""
        place = self._at(node, place)
        self._places.setdefault(keys, place)
        if self._is_too_much(keys, place, len(above)):
            return None
        if id(node) in above:
            return self._wrong(
                keys, place, "an alias of a mapping or list it stands in", "plain values"
            )
        above = (*above, id(node))
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            value = {}
            for key, (key_node, value_node) in self._pairs(node, keys, place, above).items():
                at = self._at(key_node, place)
                # The key's line first: a value may begin further down, and setdefault keeps this.
                self._places.setdefault((*keys, key), at)
                value[key] = self._value(value_node, (*keys, key), at, above)
            return value
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [
                self._value(item, (*keys, str(i)), place, above)
                for i, item in enumerate(node.value)
            ]
        try:
            if isinstance(node, yaml.ScalarNode):
                # KeyError: an unknown tag. ValueError: a text that its tag does not fit.
                return _scalar(kind, node.value)
        except (KeyError, ValueError):
            pass
        return self._wrong(
            keys,
            place,
            f"the tag {node.tag.replace(_TAG, '!!')}",
            "plain values",
            "Remove the tag.",
        )

    def _is_too_much(self, keys: Keys, place: Place, depth: int) -> bool:
        """Count one more value; whether there are too many, or too deep. It is reported once."""
        self._count += 1
        # ==, so that it is said once; the return below is true from here on.
        if self._count == MOST:
            self._wrong((), place, f"{MOST:,} values and more, aliases read out", "fewer")
        if depth == DEEPEST:
            self._wrong(keys, place, "values too deep in others", f"at most {DEEPEST} levels")
        return self._count >= MOST or depth >= DEEPEST

    def _pairs(
        self, node: yaml.MappingNode, keys: Keys, place: Place, above: tuple[int, ...]
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        if self._is_too_much(keys, place, len(above)):
            return own
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(source, yaml.MappingNode) and id(source) not in above:
                        pairs = self._pairs(source, keys, place, (*above, id(source)))
                        merged = pairs | merged  # of several sources the first one wins
                    else:
                        self._wrong(
                            keys, self._at(key, place), "<< of something else", "<< of mappings"
                        )
            elif not isinstance(key, yaml.ScalarNode):
                self._wrong(keys, self._at(key, place), "a key that is a mapping or a list", "text")
            elif key.value in own:
                self._wrong(
                    (*keys, key.value),
                    self._at(key, place),
                    f"the key a second time (first: {self._at(own[key.value][0], place)})",
                    "it once",
                )
            else:
                own[key.value] = key, value
        # A mapping's own keys win over merged ones.
        return merged | own

    def _at(self, node: yaml.Node, place: Place) -> Place:
        return place if place.line is None else Place(place.origin, node.start_mark.line + 1)

    def _wrong(self, keys: Keys, place: Place, found: str, wanted: str, hint: str = "") -> None:
        self.problems.append(Problem(place, keys, _text(found, wanted, hint)))


def _text(found: str, wanted: str, hint: str) -> str:
    return f"found {found}, wanted {wanted}.{hint and ' ' + hint}"


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "int":
        return int(text, _BASES.get(text[:2], 10))
    if kind == "float":
        # Python writes YAML's .inf and .nan without the dot.
        return float(re.sub(r"\.(?=[inIN])", "", text))
    return {"str": text}[kind]


def dump(data: Any) -> str:
    """YAML text that `Document` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def child(value: Any, key: str) -> Any:
    """What stands under a key of a mapping or a number of a list; None where there is none."""
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list | tuple) and key.isdecimal() and int(key) < len(value):
        return value[int(key)]
    return None


def dotted(keys: Keys) -> str:
    """A path as `--set` takes it: `tasks."v1.5".cap`."""
    odd = re.compile(r'[\s.:="]|^$')
    return ".".join(
        json.dumps(key, ensure_ascii=not key.isprintable())
        if odd.search(key) or not key.isprintable()
        else key
        for key in keys
    )


def show(value: Any) -> str:
    """A value as an error shows it: text in quotes, a long value cut."""
    if isinstance(value, Mapping):
        return f"a mapping ({_few(dotted((str(key),)) for key in value)})"
    if isinstance(value, list | tuple):
        return f"a list ({_few(map(show, value))})"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _few(words: Iterable[str]) -> str:
    # One more than is shown, to know whether there are more.
    first = list(itertools.islice(words, 6))
    return ", ".join([*first[:5], *(["..."] if len(first) > 5 else [])]) or "empty"
