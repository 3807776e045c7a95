"""Where each method lives: a literal table, and from a name to the function."""

import inspect
import json
from collections.abc import Callable, Collection
from typing import Any

from mtl.config.document import ConfigError, Document
from mtl.config.spec import Kind, resolve_in

METHODS = {
    "average": "mtl.merging.average:average",
    "average_norm": "mtl.merging.average_norm:average_norm",
    "dare": "mtl.merging.dare:dare",
    "model_stock": "mtl.merging.model_stock:model_stock",
    "search": "mtl.merging.search:search",
    "select": "mtl.merging.select:select",
    "soup": "mtl.merging.soup:soup",
    "task_arithmetic": "mtl.merging.task_arithmetic:task_arithmetic",
    "ties": "mtl.merging.ties:ties",
}


def named(
    name: str, settings: Collection[str] = (), allow_code: Collection[str] = ()
) -> Callable[..., Any]:
    """The method of a name, its settings bound: `keywords` holds them.

    Args:
        name: of the table, or `package.module:attribute`.
        settings: `key=value`, each value YAML.
        allow_code: packages outside this one whose code may run.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    text = f"method: {{name: '{name}'}}"
    document = Document(text, "--method", [f"method.{each}" for each in settings])
    if document.problems:
        raise ConfigError(document.problems)
    method = resolve_in(document, "method", Kind(METHODS, arguments=1), allow_code)
    parameters = inspect.signature(method.func).parameters
    kinds = {int: (int, "a whole number"), float: ((int, float), "a number")}
    problems = []
    for key, value in method.keywords.items():
        known = parameters.get(key)  # none where the method takes any
        types, wanted = kinds.get(known and known.annotation, (object, ""))
        # True is an int to Python.
        if not isinstance(value, types) or (wanted and isinstance(value, bool)):
            problems.append(document.error(("method", key), json.dumps(value), wanted))
    if problems:
        raise ConfigError(problems)
    return method
