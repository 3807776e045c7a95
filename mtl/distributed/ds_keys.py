"""The keys of a DeepSpeed configuration that DeepSpeed does not know.

DeepSpeed ignores an unknown key at the top and in most blocks. No list of its keys exists, so its
own reader reads a mapping that writes down what it is asked for.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from mtl.config.words import did_you_mean, model_of, type_at

Found = tuple[tuple[str, ...], str, str, str]  # key, found, wanted, hint


def problems(settings: dict[str, Any]) -> list[Found]:
    """What DeepSpeed would ignore or refuse in its configuration.

    Blocks that it reads only later, or hands on whole, are not judged.
    """
    # Here, because `engine` must choose the accelerator before DeepSpeed is imported.
    from deepspeed.runtime.config import DeepSpeedConfig

    # The sizes of a batch depend on the world; ours decide them.
    read = _Read({k: v for k, v in settings.items() if k != "train_batch_size"})
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        return [found for each in error.errors() for found in _refused(each, settings)]
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        return [((), "a setting that DeepSpeed refuses", "one it takes", f"It says: {error}")]
    return list(read.unknown())


class _Read(dict):
    """A mapping that remembers its reader's questions."""

    def __init__(self, values: dict[str, Any]):
        super().__init__({k: _Read(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.asked: set[str] = set()
        self.is_whole = False  # whether it was taken as a whole

    def unknown(self, above: tuple[str, ...] = ()) -> Iterator[Found]:
        """Keys that nobody asked for, in mappings of which some key was asked for."""
        for key, value in dict.items(self):
            if self.asked and not self.is_whole and key not in self.asked:
                hint = did_you_mean(key, sorted(self.asked)) or "It would be ignored."
                yield (*above, key), f"the key {key!r}", "a key that DeepSpeed knows", hint
            elif isinstance(value, _Read):
                yield from value.unknown((*above, key))

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.is_whole = True
        return super().__iter__()

    def items(self) -> Any:
        self.is_whole = True
        return super().items()

    def keys(self) -> "_Read":
        return self  # `key in settings.keys()` is a question too

    def __copy__(self) -> "_Read":
        return self


def _refused(error: Any, settings: dict[str, Any]) -> Iterator[Found]:
    """What pydantic says of a block, whose key its error leaves out."""
    where = tuple(map(str, error["loc"]))
    for keys in _paths(settings):
        if keys[-len(where) :] == where:
            if error["type"] == "extra_forbidden":
                yield keys, f"the key {keys[-1]!r}", "a key that DeepSpeed knows", _near(keys)
            else:
                yield keys, repr(error["input"]), "what DeepSpeed takes", f"{error['msg']}."


def _near(keys: tuple[str, ...]) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if keys[0] != "zero_optimization":
        return ""
    block = model_of(type_at(DeepSpeedZeroConfig, keys[1:-1])) if keys[2:] else DeepSpeedZeroConfig
    return did_you_mean(keys[-1], block.model_fields)


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
