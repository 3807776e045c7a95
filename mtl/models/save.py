"""A trained model on disk, as a Hugging Face folder."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mtl.distributed import comm
from mtl.distributed.engine import Engine
from mtl.models import adapters
from mtl.models import folder as folders
from mtl.models.files import as_umask_says

SHARD = "5GB"  # the largest file of a saved model


def save(
    trained: Engine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    loader: tuple[str, dict[str, Any]] | None = None,
) -> None:
    """Write the model, or its adapter, as a Hugging Face folder of safetensors with its tokenizer.
    A collective.

    Rank 0 writes. Every tensor's shape is checked, because parameters that ZeRO 3 partitions have
    shape (0,) until they are gathered.

    Args:
        loader: name and keywords of a loader whose module no class of transformers opens.
            `loader.json` then says what opens the folder.
    """
    is_adapter = adapters.is_adapted(trained.module)
    trained_only = is_adapter or getattr(trained.module, "trained_only", False)
    state = trained.state_dict(trainable_only=trained_only)
    if is_adapter:  # PEFT asks for each name of a tied table
        state |= {name: state[other] for name, other in _aliases(trained.module) if other in state}

    transformers_logging.disable_progress_bar()  # it would write over the run's own bar and table

    def write() -> None:
        if comm.rank() == 0:
            if is_adapter:
                trained.module.save_pretrained(folder, state_dict=state)
                generation = getattr(trained.module, "generation_config", None)
                # A classifier has none; its configuration names the labels.
                (generation or trained.module.config).save_pretrained(folder)
            else:
                trained.module.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
                if loader is not None:
                    note = folders.note(trained.module, *loader)
                    text = json.dumps(note, indent=2) + "\n"
                    (folder / folders.LOADER).write_text(text, encoding="utf-8")
            tokenizer.save_pretrained(folder)
            as_umask_says(folder)

    def attempt() -> None:
        try:
            write()
        except SafetensorError as error:  # its text ends with "(os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            why = (
                (int(number[1]), os.strerror(int(number[1]))) if number else (errno.EIO, str(error))
            )
            raise OSError(*why, str(folder)) from error

    # Rank 0 writes, and all hear whether it could.
    comm.together(attempt)


def _aliases(model: nn.Module) -> Iterator[tuple[str, str]]:
    """For parameters with several names: each further name, and the first."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            yield name, known
