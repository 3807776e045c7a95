"""From a checkpoint's `model/` to the folder a user takes away. Works on files: no process group, no DeepSpeed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Copy a Hugging Face folder (a model, or an adapter), its floating-point tensors in another dtype where asked.

    The target appears whole or not at all; an older one is replaced.

    Args:
        source: a checkpoint's `model` folder.
        target: where to; its parent is made.
        dtype: "fp32", "bf16", or None: as it is.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    if dtype is not None:
        for file in temporary.glob("*.safetensors"):
            tensors = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        config = temporary / "config.json"
        if config.exists():  # an adapter has none
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
            config.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target
