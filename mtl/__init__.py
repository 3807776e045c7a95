"""Fine-tune one language model on many tasks at once so that all of them converge together."""

import os
from collections.abc import Collection
from typing import Any

__version__ = "0.1.0"


def load(folder: str | os.PathLike[str], allow_code: Collection[str] = ()) -> Any:
    """The model of an exported folder, ready to use, as `mtl.models.folder.load` describes."""
    from mtl.models import folder as folders  # here: torch takes seconds

    return folders.load(folder, allow_code)
