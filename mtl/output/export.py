"""From a checkpoint to the folder a user takes away. Works on files: no process group, no
DeepSpeed.
"""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mtl
from mtl import process
from mtl.models.files import as_umask_says
from mtl.output import card, manifest
from mtl.output.files import flush

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
EXPORT = "export"  # the kind of folder that the mark names
# A wrong name, no token, a refusal; and no network, whose class is that of the hub's HTTP library.
_HUB_ERRORS = (HFValidationError, LocalTokenNotFoundError, *HfHubHTTPError.__bases__)


class ExportError(ValueError):
    """A checkpoint that cannot be exported as asked."""


def export(
    checkpoint: Path,
    target: Path,
    dtype: str | None = None,
    *,
    merge: bool = False,
    allow_remote_code: bool = False,
    weights: str = "model",
) -> Path:
    """Write a checkpoint's model, or adapter, as a Hugging Face folder with tokenizer and model
    card.

    The target appears whole or not at all. An older export is replaced, if nobody has added or
    changed a file in it; anything else is not. The checkpoint's model is compared with its manifest
    first. The run's log and record are not needed: without them the card says less.

    Args:
        checkpoint: a folder `step-...` of a run, or an adapter's; with `weights` empty a model's.
        target: where to; its parent is made.
        dtype: "fp32", "bf16", or None: as trained.
        merge: add an adapter to its base model, in fp32, and write the whole.
        allow_remote_code: whether code that comes with the base model may run (`merge` only).
        weights: "model", the trained ones, "average" (`average:` of the YAML), or "": those in
            `checkpoint` itself. A card that stands there is kept: a merge's.

    Raises:
        ExportError: there is no model in `checkpoint`, or it is damaged; nothing to merge, no base
            model; or `target` is something else.
    """
    if not checkpoint.is_dir():
        raise ExportError(f"{checkpoint}: found no such folder, wanted a checkpoint's.")
    if (checkpoint / "run.json").is_file():
        newest = max(
            (checkpoint / "checkpoints").glob("step-*"), default="RUN/checkpoints/step-..."
        )
        raise ExportError(
            f"{checkpoint}: found a run, wanted a checkpoint of it, such as {newest}."
        )
    source = checkpoint if (checkpoint / ADAPTER).is_file() else checkpoint / weights
    is_adapter = (source / ADAPTER).is_file()
    if not is_adapter and not (source / "config.json").is_file():
        raise ExportError(
            f"{checkpoint}: found no {weights} in it; wanted a checkpoint's folder, such as "
            "RUN/checkpoints/step-00000120."
        )
    if merge and not is_adapter:
        raise ExportError(
            f"{checkpoint}: found a whole model, wanted an adapter to merge. Export it without "
            "merging."
        )
    if merge and (kind := _task_type(source)) not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise ExportError(
            f"{checkpoint}: found an adapter of type {kind}, wanted one of a causal language model "
            "or of a classifier to merge. Export it without merging."
        )
    # Every checkpoint has a manifest, half a one too. Without it the folder was made otherwise.
    under = "" if source == checkpoint else f"{weights}/"
    has_card = weights == "" and (source / "merge.json").is_file()
    has_manifest = (checkpoint / manifest.NAME).exists()
    if has_manifest and (damage := manifest.damage(checkpoint, under)):
        raise ExportError(
            "\n  ".join([f"{checkpoint} is damaged. Export another checkpoint.", *damage[:10]])
        )
    # Beside the target, so that the rename stays in one file system.
    temporary = target.with_name(f".{target.name}.tmp")
    for folder in (target, temporary):
        _check_replaceable(folder)
    manifest.discard(temporary, EXPORT)
    manifest.mark(temporary, EXPORT)
    try:
        if merge:
            whole(source, temporary, dtype, allow_remote_code)
        else:
            _copy(source, temporary)
            if dtype is not None:
                _cast(temporary, dtype)
        if not has_card:
            text = card.card(checkpoint, adapter=is_adapter and not merge, weights=weights)
            (temporary / "README.md").write_text(text, encoding="utf-8")
        as_umask_says(temporary)
        manifest.seal(temporary)
        manifest.discard(target, EXPORT)
    # Ctrl-C too must not leave half an export.
    except BaseException:
        manifest.discard(temporary, EXPORT)
        raise
    temporary.rename(target)
    flush(target.parent)
    return target


def _copy(source: Path, target: Path) -> None:
    """Every file below a folder but the manifest."""
    whole = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with process.bar("export", whole, "B", scale=True) as bar:

        def copy(one: str, other: str) -> str:
            made = shutil.copy2(one, other)
            bar.update(Path(one).stat().st_size)
            return made

        without = shutil.ignore_patterns(manifest.NAME)
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=without, copy_function=copy)


def _check_replaceable(folder: Path) -> None:
    """Raise ExportError where a folder holds anything but an export as we wrote it, or half of
    one.
    """
    if manifest.is_free(folder):
        return
    if not manifest.is_ours(folder, EXPORT):
        raise ExportError(
            f"{folder}: found something other than an export with our mark ({manifest.NAME}). Name "
            "another folder; nothing was changed."
        )
    if manifest.is_whole(folder, EXPORT):
        changed = [str(folder / name) for name in manifest.strangers(folder)]
        if changed := changed + manifest.damage(folder):
            raise ExportError(
                f"{folder}: found files added or changed since the export: "
                f"{'; '.join(changed[:3])}. Name another folder, or move this one away; nothing "
                "was changed."
            )


def _task_type(adapter: Path) -> str | None:
    return json.loads((adapter / ADAPTER).read_text(encoding="utf-8")).get("task_type")


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload an exported folder to a repository on the hub, which is made where there is none.

    Args:
        folder: what `export` wrote.
        repo: `owner/name`, or `name` of whoever is logged in (`hf auth login`, or HF_TOKEN).
        public: whether a new repository may be seen by everyone. One that exists stays as it is.

    Returns:
        The address of the commit.

    Raises:
        ExportError: the hub refuses.
    """
    api = HfApi()
    try:
        found = api.create_repo(repo, private=not public, exist_ok=True)
        made = api.upload_folder(
            repo_id=found.repo_id,
            folder_path=folder,
            commit_message=f"Upload a model made by coba-mtl {mtl.__version__}",
        )
    except _HUB_ERRORS as e:
        text = " ".join(str(e).split())[:500]
        raise ExportError(
            f"--push {repo}: the hub refused {folder}: {text} The folder is written; log in with "
            "`hf auth login` or set HF_TOKEN, and try again."
        ) from e
    return made.commit_url


def _cast(folder: Path, dtype: str) -> None:
    size = 0
    for file in folder.glob("*.safetensors"):
        tensors = {
            n: t.to(DTYPES[dtype]) if t.is_floating_point() else t
            for n, t in load_file(file).items()
        }
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, file, metadata={"format": "pt"})
    for name, keys in (
        ("config.json", ("dtype",)),
        ("model.safetensors.index.json", ("metadata", "total_size")),
    ):
        path = folder / name
        if path.exists():  # an adapter has no config, and a small model no index
            content = json.loads(path.read_text(encoding="utf-8"))
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = (
                size if keys[-1] == "total_size" else str(DTYPES[dtype]).removeprefix("torch.")
            )
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def whole(source: Path, target: Path, dtype: str | None, allow_remote_code: bool) -> None:
    """Write an adapter's base with the adapter added, as `export` does.

    Raises:
        ModelError: the base model cannot be had.
    """
    from mtl.models import (
        adapters,
        save,
    )  # here: it imports DeepSpeed, which nothing else of this file needs

    # An adapter's tensors have one dtype, that of training.
    with safe_open(next(source.glob("*.safetensors")), framework="pt") as file:
        trained = file.get_tensor(next(iter(file.keys()))).dtype
    state = source.parent / "state.json"
    run = json.loads(state.read_text(encoding="utf-8"))["identity"] if state.is_file() else {}
    merged, tokenizer = adapters.merge(
        source, allow_remote_code, run.get("model.quantize"), run.get("model.precision", "fp32")
    )
    merged.to(DTYPES[dtype] if dtype else trained).save_pretrained(
        target, max_shard_size=save.SHARD
    )
    tokenizer.save_pretrained(target)
    if (source / GENERATION).is_file():  # it stops where rows do; the base model's may not
        shutil.copy2(source / GENERATION, target)
