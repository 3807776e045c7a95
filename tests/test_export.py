"""A checkpoint becomes a folder that transformers or PEFT loads, with every tensor whole and a card that says what it is."""

import json
import os
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import attack_files
import peft
import pytest
import runs
import torch
import toys
import yaml as pyyaml
from huggingface_hub import HfApi, ModelCard
from near import near
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtl import process
from mtl.config import parse
from mtl.models.errors import ModelError
from mtl.output import manifest
from mtl.output.export import DTYPES, ExportError, export

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROGRAM = runs.ROOT / "launch" / "export.py"
LORA = "model.lora={r: 4, target_modules: all-linear}"


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def full(yaml) -> Path:
    output = yaml.parent / "full"
    runs.train(yaml, "engine.zero=3", f"output={output}", world=2).well()
    return output / "checkpoints" / "step-00000012"


@pytest.fixture(scope="module")
def adapter(yaml) -> Path:
    output = yaml.parent / "adapter"
    runs.train(yaml, "engine.zero=3", LORA, f"output={output}", world=2).well()
    return output / "checkpoints" / "step-00000012"


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def prompt(folder: Path) -> dict[str, torch.Tensor]:
    return AutoTokenizer.from_pretrained(folder)(
        "abc =", return_tensors="pt", return_token_type_ids=False
    )


def test_a_whole_model(full, tmp_path):
    out = export(full, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert shapes(loaded) == shapes(toys.tiny_llama())
    before = toys.tiny_llama().state_dict()
    assert all(
        not torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items()
    ), "all were trained"
    assert AutoTokenizer.from_pretrained(out).chat_template == toys.CHAT
    assert (out / "generation_config.json").is_file()
    assert loaded.generate(**prompt(out), max_new_tokens=3, do_sample=False).shape == (1, 8)


USER = (
    "{% for m in messages %}{{ '<|unused|>' if m.role == 'user' else '<|start|>' }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>\n{% endif %}"
)


@pytest.mark.parametrize("change", [None, LORA], ids=["full", "lora"])
def test_a_saved_model_stops_where_turns_end(yaml, tmp_path, change):
    """The template has no end token (as GLM's): `<|unused|>` begins the user's turns and ends ours."""
    (tmp_path / "user.jinja").write_text(USER)
    changes = [
        f"model.chat_template={tmp_path}/user.jinja",
        "train.steps=1",
        *filter(None, [change]),
    ]
    ended = runs.train(yaml, *changes, f"output={tmp_path}/run")
    ended.well()
    assert "stop at <|unused|>, as rows do" in ended.err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    for merge in (False, True) if change else (False,):
        out = export(checkpoint, tmp_path / f"out-{merge}", merge=merge)
        stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        assert stops == sorted(map(toys.tokenizer().convert_tokens_to_ids, (toys.END, toys.UNUSED)))


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_files_have_the_umasks_mode(full, tmp_path, dtype):
    """safetensors' own is 0600."""
    modes = {path.stat().st_mode & 0o777 for path in (full / "model").iterdir()}
    assert len(modes) == 1, "in the checkpoint"
    before = os.umask(0o027)
    try:
        out = export(full, tmp_path / "out", dtype)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_the_program_offers_every_type(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM))["main"]()
    assert f"{{{','.join(DTYPES)}}}" in capsys.readouterr().out


def test_an_adapter_stays_small_and_names_its_base(adapter, yaml, tmp_path):
    out = export(adapter, tmp_path / "out")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(yaml.parent / "model")
    tensors = load_file(out / "adapter_model.safetensors")
    base = {name: parameter.shape for name, parameter in toys.tiny_llama().named_parameters()}
    assert len(tensors) == 2 * 7 * 2  # A and B of seven products in two layers
    for name, tensor in tensors.items():
        inner = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"
        rows, columns = base[inner]
        assert tensor.shape == ((4, columns) if ".lora_A." in name else (rows, 4)), name
        assert tensor.abs().max() > 0, name
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert loaded.generate(**prompt(out), max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_an_adapters_checkpoint_holds_no_frozen_weight(adapter):
    trained = sum(
        tensor.numel()
        for tensor in load_file(adapter / "model" / "adapter_model.safetensors").values()
    )
    frozen = sum(parameter.numel() for parameter in toys.tiny_llama().parameters())
    assert frozen > 8 * trained
    engine = sum(path.stat().st_size for path in (adapter / "engine").iterdir())
    assert 12 * trained < engine < 4 * frozen, (
        "fp32 parameters and two moments, and no room for the rest"
    )
    (weights,) = (adapter / "model").glob("*.safetensors")
    assert 4 * trained < weights.stat().st_size < 4 * trained + 8192
    for path in (adapter / "engine").glob("*_model_states.pt"):
        names = torch.load(path, weights_only=False)["module"]
        assert all("lora_" in name for name in names), path


def test_merged_is_base_and_adapter_together(adapter, tmp_path):
    out = export(adapter, tmp_path / "out", merge=True)
    assert not (out / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert type(merged).__name__ == "LlamaForCausalLM" and shapes(merged) == shapes(
        toys.tiny_llama()
    )
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(adapter / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        near(merged(ids).logits, apart(ids).logits, units=100)
        assert (merged(ids).logits - toys.tiny_llama()(ids).logits).abs().max() > 1e-4, (
            "the adapter does something"
        )
    assert AutoTokenizer.from_pretrained(out).chat_template == toys.CHAT


def test_an_adapters_own_folder_is_merged_too(adapter, tmp_path):
    one, other = (
        load_file(export(source, tmp_path / name, merge=True) / "model.safetensors")
        for name, source in (("one", adapter), ("other", adapter.parent.parent / "model"))
    )
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("merge", [False, True])
def test_dtype(adapter, tmp_path, merge):
    out = export(adapter, tmp_path / "out", "bf16", merge=merge)
    tensors = load_file(next(out.glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    if merge:
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_shards_are_cast_one_by_one(full, tmp_path):
    copy = tmp_path / "run" / "checkpoints" / "step-00000012"
    shutil.copytree(full / "model", copy / "model")
    (copy / "model" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(full / "model").save_pretrained(
        copy / "model", max_shard_size="100KB"
    )
    assert len(list((copy / "model").glob("*.safetensors"))) > 2
    seal(copy)
    out = export(copy, tmp_path / "out", "bf16")
    loaded, whole = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (out, full / "model")
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in whole.parameters())


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_card(kind, request, yaml, tmp_path):
    checkpoint = request.getfixturevalue(kind)
    text = (export(checkpoint, tmp_path / "out") / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = pyyaml.safe_load(head)
    assert "base_model" not in metadata, "a folder, which the hub refuses; the text names it"
    assert f"`{yaml.parent / 'model'}` fine-tuned" in body
    assert metadata["library_name"] == {"full": "transformers", "adapter": "peft"}[kind]
    assert "CoBa" in metadata["tags"]
    passes = [line for line in runs.metrics(checkpoint.parent.parent) if "eval/macro" in line]
    for name, rows in (("copy", 24), ("chat", 12), ("prose", 8)):
        (line,) = (line for line in body.splitlines() if line.startswith(f"| {name} | {rows} |"))
        assert line.endswith(
            f"| {passes[0][f'eval/{name}/loss']:.4f} | {passes[-1][f'eval/{name}/loss']:.4f} |"
        )
    blocks = [pyyaml.safe_load(part.partition("```")[0]) for part in body.split("```yaml\n")[1:]]
    assert blocks[0] == {"balancer": {"name": "CoBa", "window": 5, "warmup": 3}}
    assert parse(pyyaml.safe_dump(blocks[1])).resolved() == blocks[1], (
        "the config in it is a config"
    )
    assert "at step 12 of 12" in body and f"torch {torch.__version__}".split("+")[0] in body


def test_the_card_is_of_the_start_that_made_the_checkpoint(full, tmp_path, monkeypatch):
    """A run of 8 steps that went on to 12, and from there to 20; its card written from within."""
    run = tmp_path / "run"
    shutil.copytree(full, run / "checkpoints" / full.name)
    record = json.loads((full.parent.parent / "run.json").read_text())
    for name, steps in (("run", 8), ("run.resumed-00000008", 12), ("run.resumed-00000012", 20)):
        (run / f"{name}.json").write_text(json.dumps(record | {"steps": steps}))
    monkeypatch.chdir(run / "checkpoints")
    text = (export(Path(full.name), tmp_path / "out") / "README.md").read_text()
    assert "at step 12 of 12" in text


def test_the_card_names_a_base_model_on_the_hub(full, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(full, run / "checkpoints" / full.name)
    record = json.loads((full.parent.parent / "run.json").read_text())
    record["config"]["model"]["name"] = "someone/a-model"
    (run / "run.json").write_text(json.dumps(record))
    text = (export(run / "checkpoints" / full.name, tmp_path / "out") / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "someone/a-model" and data.pipeline_tag == "text-generation"
    assert data.tags == ["coba-mtl", "multitask", "CoBa"]


@pytest.mark.parametrize("public", [[], ["--public"]])
def test_push(full, tmp_path, monkeypatch, capsys, public):
    """What goes to the hub is the folder, into a repository that is private unless asked."""
    calls = []

    def create_repo(self, repo, **more):
        calls.append((repo, more))
        return SimpleNamespace(repo_id=f"me/{repo}")

    def upload_folder(self, **more):
        calls.append((more["repo_id"], sorted(p.name for p in more["folder_path"].iterdir())))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    code, out, _ = call(monkeypatch, capsys, full, tmp_path / "out", "--push", "mine", *public)
    assert code == 0 and out.endswith("pushed: https://hub/commit\n")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    private = {"private": not public, "exist_ok": True}
    assert calls == [("mine", private), ("me/mine", files)]
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(files)


def test_a_push_that_the_hub_refuses(full, tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, full, tmp_path / "out", "--push", "no/such/name")
    assert code == 1 and "error: --push no/such/name: the hub refused" in err
    assert "The folder is written" in err and (tmp_path / "out" / "README.md").is_file()


def test_the_end_of_a_run_is_the_same_export(full, tmp_path):
    out, end = export(full, tmp_path / "out"), full.parent.parent / "model"
    assert runs.contents(out) == runs.contents(end)


def seal(checkpoint: Path) -> None:
    manifest.mark(checkpoint, "checkpoint")
    manifest.seal(checkpoint)


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    code = process.exit_code(runpy.run_path(str(PROGRAM), run_name="export")["main"])
    return code, *capsys.readouterr()


def test_the_program(adapter, tmp_path, monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch, capsys, adapter, tmp_path / "out", "--merge", "--dtype", "bf16"
    )
    assert code == 0 and out == f"merged model, of step-00000012: {tmp_path}/out\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_folder_without_a_manifest_is_exported_as_it_is(full, tmp_path):
    """It was made otherwise, so nobody knows what it should be."""
    theirs = tmp_path / "theirs"
    shutil.copytree(full / "model", theirs / "model")
    file = theirs / "model" / "model.safetensors"
    file.write_bytes(attack_files.flip(file.read_bytes(), random.Random(0)))
    out = export(theirs, tmp_path / "out")
    assert (out / file.name).read_bytes() == file.read_bytes()
    seal(theirs)
    file.write_bytes((full / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ExportError, match=r"model\.safetensors: its content is not what was"):
        export(theirs, tmp_path / "sealed")


def test_what_cannot_be_exported(full, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "run").mkdir()
    for arguments, text in (
        ([tmp_path / "nowhere", tmp_path / "out"], "found no such folder"),
        (
            [full.parent.parent, tmp_path / "out"],
            f"found a run, wanted a checkpoint of it, such as {full}",
        ),
        (
            [tmp_path / "run", tmp_path / "out"],
            "found no model in it; wanted a checkpoint's folder",
        ),
        ([full, tmp_path / "out", "--merge"], "found a whole model, wanted an adapter"),
        ([full, tmp_path / "mine"], "found something other than an export"),
    ):
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert code == 1 and text in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "mine").iterdir()] == [
        "thesis.tex"
    ]


def test_a_base_model_that_is_gone(adapter, tmp_path):
    copy = tmp_path / "checkpoints" / "step-00000012"
    shutil.copytree(adapter / "model", copy / "model")
    settings = json.loads((copy / "model" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "model" / "adapter_config.json").write_text(json.dumps(settings))
    seal(copy)
    with pytest.raises(ModelError, match="the adapter's base model .*gone' could not be loaded"):
        export(copy, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
