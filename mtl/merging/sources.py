"""From what the command line names to folders of whole models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mtl.config import Config
from mtl.merging.files import Stored
from mtl.merging.piece import MergeError
from mtl.models.files import same_model

ADAPTER = "adapter_config.json"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def of_run(run: Path, steps: tuple[int, int] | None) -> tuple[str, list[Path]]:
    """A run's base, and folders of models along its way.

    Args:
        run: its `output:`.
        steps: first and last step of the checkpoints that are meant; None: each task's best, a
            folder as often as tasks name it.

    Raises:
        MergeError: it is no run, or keeps none of these.
    """
    record = run / "run.json"
    if not record.is_file():
        raise MergeError(f"{run}: found no run.json, wanted the folder of a run (its `output:`).")
    config = json.loads(record.read_text(encoding="utf-8"))["config"]
    name = _base(config["model"]["name"], config.get("train", {}).get("from"))
    found = bests(run) if steps is None else checkpoints(run, *steps)
    if not found:
        hint = (
            "Train with `checkpoint.bests: each`, or add --steps FIRST:LAST."
            if steps is None
            else "`checkpoint.every` and `checkpoint.keep` say what is kept."
        )
        what = "best model of a task" if steps is None else f"checkpoint of steps {steps}"
        raise MergeError(f"{run}: found no {what}. {hint}")
    return name, found


def bests(run: Path) -> list[Path]:
    """Each task's best model, RUN/bests/step-*: a folder that several tasks share so many times.

    Which they are stands in the newest checkpoint. A task that was never better than at the start
    has none: it adds nothing.
    """
    state = newest(run).get("run", {})
    steps = sorted(int(best["step"]) for best in (state.get("bests") or {}).values())
    return [run / "bests" / f"step-{step:08d}" for step in steps if step]


def newest(run: Path) -> dict[str, Any]:
    """The newest checkpoint's `state.json` and its folder's "name"; nothing where there is none."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        return {}
    name = pointer.read_text(encoding="utf-8").strip()
    state = run / "checkpoints" / name / "state.json"
    return json.loads(state.read_text(encoding="utf-8")) | {"name": name} if state.is_file() else {}


def base(config: Config) -> str:
    """What an experiment's runs start from."""
    return _base(config.model.name, getattr(config.train, "from"))


def _base(name: str, given: str | None) -> str:
    start = Path(name if given is None else given).expanduser()
    # A checkpoint keeps the model in a folder of its own, beside the engine's state.
    if given is not None and (start / "model").is_dir():
        start /= "model"
    # A run that went on training an adapter gives adapters of the same base.
    return base_of_adapters([start], None) or str(start if given is not None else name)


def checkpoints(run: Path, first: int, last: int) -> list[Path]:
    """RUN/checkpoints/step-*/model of a range of steps, both ends in it."""
    found = sorted((run / "checkpoints").glob("step-*/model"))
    # After "step-".
    return [path for path in found if first <= int(path.parent.name[5:]) <= last]


def folder_of(name: str) -> Path:
    """A folder as it is, a hub name's files downloaded or from the hub's cache.

    Raises:
        MergeError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise MergeError(
            f"{name}: found no such folder and no model of this name on the hub "
            f"({type(e).__name__}). Name a folder, or a hub name that can be reached."
        ) from e


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def base_of_adapters(models: list[Path], base: str | None) -> str | None:
    """The base that adapters name; `base` where there are none.

    Raises:
        MergeError: an adapter of another base.
    """
    for model in filter(is_adapter, models):
        settings = json.loads((model / ADAPTER).read_text(encoding="utf-8"))
        theirs = settings["base_model_name_or_path"]
        if base is not None and not same_model(base, theirs):
            raise MergeError(
                f"{model}: found an adapter of {theirs}, wanted one of {base}. Merge it with "
                "others of its base, or name that base."
            )
        base = base or theirs
    return base


def whole(model: Path, scratch: Path, allow_remote_code: bool) -> Path:
    """A model's folder; an adapter is first added to its base, in fp32, in a folder of `scratch`.

    B_i A_j of two runs means nothing: only whole products may be averaged or selected from.
    """
    if not is_adapter(model):
        return model
    from mtl.output.export import whole as export_whole  # it imports PEFT and DeepSpeed

    export_whole(model, scratch, "fp32", allow_remote_code)
    return scratch


def like(base: Stored, model: Stored, scratch: Path, say: Callable[[str], None]) -> Stored:
    """The base with the tensors' names of a sub-model.

    A base from elsewhere may name them otherwise, or hold tied tensors twice; transformers writes
    it as it wrote the sub-model.
    """
    if base.entries.keys() == model.entries.keys():
        return base
    from transformers import AutoModelForCausalLM

    say(f"{base.folder}: tensors have other names; read and written again by transformers")
    loaded = AutoModelForCausalLM.from_pretrained(base.folder, dtype="auto")
    loaded.save_pretrained(scratch)
    # fit.check compares vocabularies, which save_pretrained does not write.
    for name in ("tokenizer.json",):
        if (base.folder / name).is_file():
            (scratch / name).write_bytes((base.folder / name).read_bytes())
    return Stored(scratch)
