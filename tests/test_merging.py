"""Merging of folders: what comes out loads, depends on seed and names alone, and is whole or absent."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import runs
import torch
import toys
from near import near
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtl import process
from mtl.merging import files, sources
from mtl.merging import merge as merging
from mtl.merging.average import average
from mtl.merging.average_norm import average_norm
from mtl.merging.merge import merge
from mtl.merging.model_stock import model_stock
from mtl.merging.piece import MergeError
from mtl.merging.search import search
from mtl.merging.select import select
from mtl.merging.soup import soup
from mtl.merging.task_arithmetic import task_arithmetic
from mtl.output import manifest

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SHARDS = 6


def shifted(model, seed: int, by: float = 1e-3):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=random)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """base, a, b, c: whole and fp32."""
    folder = tmp_path_factory.mktemp("models")
    toys.save(toys.tiny_llama(), folder / "base")
    for i, name in enumerate("abc"):
        toys.save(shifted(toys.tiny_llama(), i + 1), folder / name)
    return folder


def abc(folder: Path) -> list[Path]:
    return [folder / name for name in "abc"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def same(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_loads_and_is_the_mean(models, tmp_path):
    report = merge(str(models / "base"), abc(models), partial(average), tmp_path / "out")
    parts = [AutoModelForCausalLM.from_pretrained(one).state_dict() for one in abc(models)]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in found.state_dict().items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        near(tensor, mean, units=0.6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == toys.CHAT
    assert (tmp_path / "out" / "generation_config.json").is_file()
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["total"] == report.total.figures()
    assert record["total"]["norm_ratio"] == pytest.approx(3**-0.5, abs=0.01)  # independent deltas
    assert record["total"]["elements"] == sum(p.numel() for p in found.parameters())
    assert record["tensors"].keys() == tensors(tmp_path / "out").keys()
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


def test_neither_shards_nor_threads_nor_memory_change_a_bit(models, tmp_path):
    for name in ("base", *"abc"):
        AutoModelForCausalLM.from_pretrained(models / name).save_pretrained(
            tmp_path / name, max_shard_size="60KB"
        )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > SHARDS
    method, base = partial(select, resample="exhaustive"), str(models / "base")
    merge(base, abc(models), method, tmp_path / "one", seed=3, threads=1)
    merge(base, abc(models), method, tmp_path / "four", seed=3, threads=4, memory=1)
    merge(str(tmp_path / "base"), abc(tmp_path), method, tmp_path / "shards", seed=3)
    merge(base, abc(models), method, tmp_path / "other", seed=4)
    assert same(tmp_path / "one", tmp_path / "four") and same(tmp_path / "one", tmp_path / "shards")
    assert not same(tmp_path / "one", tmp_path / "other")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > SHARDS
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept_and_the_base_may_have_another(models, tmp_path, dtype):
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=dtype)
        model.save_pretrained(tmp_path / name)
    merge(
        str(models / "base"), [tmp_path / "a", tmp_path / "b"], partial(average), tmp_path / "out"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {dtype}
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).to(dtype)), name


def test_tied_weights_and_tensors_that_are_no_floats(tmp_path):
    for i, name in enumerate(("base", "a", "b")):
        model = toys.tiny_gpt2()
        toys.save(shifted(model, i) if i else model, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        more = {"transformer.counter": torch.tensor([i, i], dtype=torch.int64)}
        assert "lm_head.weight" not in load_file(file)
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
    merge(
        str(tmp_path / "base"), [tmp_path / "a", tmp_path / "b"], partial(average), tmp_path / "out"
    )
    found = tensors(tmp_path / "out")
    assert found["transformer.counter"].tolist() == [0, 0], "the base's"
    assert "lm_head.weight" not in found
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_base_that_stores_tied_tensors_twice(tmp_path):
    toys.save(toys.tiny_gpt2(), tmp_path / "base")
    toys.save(shifted(toys.tiny_gpt2(), 1), tmp_path / "a")
    file = tmp_path / "base" / "model.safetensors"
    content = load_file(file)
    content["lm_head.weight"] = content["transformer.wte.weight"].clone()
    save_file(content, file, metadata={"format": "pt"})
    merge(str(tmp_path / "base"), [tmp_path / "a"], partial(average), tmp_path / "out")
    assert same(tmp_path / "a", tmp_path / "out")


# --- adapters


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> Path:
    """a, b, c: adapters of the base."""
    folder = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate("abc"):
        base = AutoModelForCausalLM.from_pretrained(models / "base")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        adapted = peft.get_peft_model(base, config)
        random = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.copy_(0.05 * torch.randn(p.shape, generator=random))
        adapted.save_pretrained(folder / name)
        toys.tokenizer().save_pretrained(folder / name)
    return folder


def test_adapters_are_averaged_as_products(models, adapters, tmp_path):
    merge(None, abc(adapters), partial(average), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    apart = []
    for one in abc(adapters):
        base = AutoModelForCausalLM.from_pretrained(models / "base")
        apart.append(peft.PeftModel.from_pretrained(base, one).merge_and_unload().state_dict())
    for name, tensor in found.state_dict().items():
        mean = torch.stack([part[name].double() for part in apart]).mean(0)
        near(tensor, mean, units=2)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_whole_modules_of_adapters_are_selected(models, adapters, tmp_path):
    merge(str(models / "base"), abc(adapters), partial(select), tmp_path / "out", adapters=True)
    found, parts = tensors(tmp_path / "out"), [tensors(one) for one in abc(adapters)]
    origin: dict[str, set[int]] = {}
    for name, tensor in found.items():
        of = [i for i, part in enumerate(parts) if torch.equal(part[name], tensor)]
        origin.setdefault(name.split(".lora_")[0], set()).add(of[0])
    assert len(origin) == 14 and all(len(each) == 1 for each in origin.values()), "A and B together"
    assert len({next(iter(each)) for each in origin.values()}) > 1
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


def test_adapters_are_refused_where_their_parts_would_mix(models, adapters, tmp_path):
    out = tmp_path / "out"
    for method in (partial(average), partial(select, granularity="element")):
        with pytest.raises(MergeError, match="wanted select by module or layer"):
            merge(None, abc(adapters), method, out, adapters=True)
    with pytest.raises(MergeError, match="found an adapter of .*base, wanted one of .*/a"):
        merge(str(models / "a"), abc(adapters), partial(average), out)
    with pytest.raises(MergeError, match="found whole models"):
        merge(None, [adapters / "a", models / "b"], partial(select), out, adapters=True)
    config = json.loads((adapters / "b" / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in (adapters / "b").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(MergeError, match="lora_alpha: it has 99"):
        merge(None, [adapters / "a", other], partial(select), out, adapters=True)
    assert not out.exists()


# --- refusals


def changed(models: Path, folder: Path, **changes) -> Path:
    toys.save(shifted(toys.tiny_llama(**changes), 9), folder)
    return folder


def refused(models: Path, model: Path, tmp_path: Path, text: str, base: str = "base") -> None:
    with pytest.raises(MergeError, match=text):
        merge(str(models / base), [models / "a", model], partial(average), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_another_shape_is_refused_with_the_first_five(models, tmp_path):
    with pytest.raises(MergeError) as error:
        other = changed(models, tmp_path / "x", intermediate_size=96)
        merge(str(models / "base"), [other], partial(average), tmp_path / "out")
    text = str(error.value)
    assert "config intermediate_size: it has 96, the base 128" in text
    assert text.count(": shape of ") == 5 and "and 1 more" in text
    assert "mlp.down_proj.weight: it has [64, 96], the base [64, 128]" in text


def test_other_names_are_refused(models, tmp_path):
    other = changed(models, tmp_path / "x", num_hidden_layers=1)
    refused(models, other, tmp_path, r"tensor model\.layers\.1\.\S+ is missing")


def test_another_vocabulary_is_refused(models, tmp_path):
    other = changed(models, tmp_path / "x")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace(toys.UNUSED, "<|other|>"))
    refused(models, other, tmp_path, r"vocabulary of '<\|other\|>': it has id 258, the base None")


def test_another_type_is_refused(models, tmp_path):
    other = tmp_path / "x"
    AutoModelForCausalLM.from_pretrained(models / "b", dtype=torch.bfloat16).save_pretrained(other)
    refused(models, other, tmp_path, r"dtype of \S+: it has BF16, \S+/a F32")


def test_quantized_weights_are_refused(models, tmp_path):
    """Their codes would be the base's, under scales that are averaged."""
    other = changed(models, tmp_path / "x")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    refused(models, other, tmp_path, "x: found quantized weights, wanted fp32")


def test_the_base_itself_is_refused(models, tmp_path):
    refused(models, models / "base", tmp_path, "base: found the base itself")


def test_a_model_of_another_base_is_refused(models, tmp_path):
    toys.save(toys.tiny_llama(seed=5), tmp_path / "x")
    refused(models, tmp_path / "x", tmp_path, "x: found 1.* times the base's length")


def test_a_folder_that_is_not_empty_is_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    merge(str(models / "base"), abc(models), partial(average), tmp_path / "out")
    before = runs.contents(tmp_path)
    with pytest.raises(MergeError, match="wanted a new or empty folder"):
        merge(str(models / "base"), abc(models), partial(select), tmp_path / "out")
    assert runs.contents(tmp_path) == before


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    written = []

    def full(file: int, data: bytes, at: int) -> int:
        written.append(at)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os_pwrite(file, data, at)

    os_pwrite = os.pwrite
    monkeypatch.setattr(files.os, "pwrite", full)
    with pytest.raises(MergeError, match="the disk is full"):
        merge(str(models / "base"), abc(models), partial(average), tmp_path / "out")
    assert len(written) > 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, text", [(None, "found no weights"), (b"x" * 100, "cannot be read as safetensors")]
)
def test_a_folder_without_whole_weights_is_refused(models, tmp_path, content, text):
    (tmp_path / "x").mkdir()
    if content:
        (tmp_path / "x" / "model.safetensors").write_bytes(content)
    refused(models, tmp_path / "x", tmp_path, text)


def test_a_method_that_answers_nonsense_is_named(models, tmp_path):
    with pytest.raises(MergeError, match=r"task_arithmetic: \S+ is not finite"):
        method = partial(task_arithmetic, scale=float("inf"))
        merge(str(models / "base"), abc(models), method, tmp_path / "out")

    def first(piece):
        return piece.base[:1]

    with pytest.raises(MergeError, match=r"first: found \[1(, \d+)?\] for .*, wanted a tensor of"):
        merge(str(models / "base"), abc(models), partial(first), tmp_path / "out")


# --- with losses


class Losses:
    """By how far a tensor is from a model's, for two tasks and halves that differ."""

    def __init__(self, folder: Path, target: torch.Tensor):
        found = tensors(folder)["model.embed_tokens.weight"].double()
        far = float((found - target.double()).norm())
        self.losses = torch.tensor([far, far]).numpy()

    def group(self, g: int):
        return self.losses + g


def toward(*folders: Path):
    every = [tensors(folder)["model.embed_tokens.weight"] for folder in folders]
    return lambda folder: Losses(folder, torch.stack(every).mean(0))


def test_soup_and_search_choose_on_one_half_and_report_on_the_other(models, tmp_path):
    evaluate = toward(models / "a", models / "c")
    for method in (soup, search):
        out = tmp_path / method.__name__
        report = merge(
            str(models / "base"),
            abc(models),
            partial(method),
            out,
            evaluate=evaluate,
            tasks=["x", "y"],
        )
        assert report.weights == pytest.approx([0.5, 0, 0.5], abs=0.1)
        assert report.tasks["rows"] == "the half of validation that did not choose"
        assert report.tasks["losses"]["merged"][0] == pytest.approx(
            1 + evaluate(out).losses[0], rel=1e-6
        )
    assert report.tasks["losses"].keys() == {*map(str, abc(models)), "merged"}
    with pytest.raises(MergeError, match="add --config"):
        merge(str(models / "base"), abc(models), partial(soup), tmp_path / "none")


def test_a_merge_worse_than_the_worst_is_refused_unless_forced(models, tmp_path):
    evaluate, method = toward(models / "base"), partial(task_arithmetic, scale=5.0)
    given = {"evaluate": evaluate, "tasks": ["x", "y"]}
    with pytest.raises(MergeError, match="that of the worst sub-model"):
        merge(str(models / "base"), abc(models), method, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())
    merge(str(models / "base"), abc(models), method, tmp_path / "out", force=True, **given)


# --- the program


def program(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
    main = runpy.run_path(str(runs.ROOT / "launch" / "merge.py"))["main"]
    code = process.exit_code(main)
    return code, *capsys.readouterr()


def test_program(models, tmp_path, monkeypatch, capsys):
    given = ["--base", models / "base", "--models", *abc(models), "--out", tmp_path / "out"]
    more = ["--method", "select", "--set", "granularity=row", "--set", "weights=[1, 1, 2]"]
    code, out, err = program(monkeypatch, capsys, *given, *more)
    assert code == 0 and out.splitlines()[0].startswith("select of 3 sub-models, 107,200 param")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["settings"] == {"granularity": "row", "weights": [1, 1, 2]}
    code, out, err = program(monkeypatch, capsys, *given, *more)
    assert code == 1 and "wanted a new or empty folder" in err


def test_a_method_of_ones_own(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "mymerge.py").write_text(
        "def last(piece, *, shift=0.0):\n    return piece.models[-1] + shift\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--base", models / "base", "--models", *abc(models), "--out", tmp_path / "out"]
    given += ["--method", "mymerge:last"]
    code, _, err = program(monkeypatch, capsys, *given)
    assert code == 1 and "--allow-code mymerge" in err
    code, _, err = program(monkeypatch, capsys, *given, "--allow-code", "mymerge")
    assert code == 0 and same(tmp_path / "out", models / "c")


def test_a_run_gives_base_and_models(models, tmp_path):
    run = tmp_path / "run"
    for name, step in (("a", 10), ("b", 20), ("c", 30)):
        target = run / "checkpoints" / f"step-{step:08d}"
        target.mkdir(parents=True)
        (target / "model").symlink_to(models / name)
    with pytest.raises(MergeError, match="found no run.json"):
        merging.found(None, [], run, None)
    record = {"config": {"model": {"name": str(models / "base")}}}
    (run / "run.json").write_text(json.dumps(record))
    base, found = merging.found(None, [], run, "15:30")
    assert base == str(models / "base")
    assert [path.parent.name for path in found] == ["step-00000020", "step-00000030"]
    with pytest.raises(MergeError, match="checkpoint.bests: each"):
        merging.found(None, [], run, None)
    (run / "bests").mkdir()
    for name, step in (("a", 10), ("c", 30), ("b", 20)):  # 20: the best single one, no task's
        (run / "bests" / f"step-{step:08d}").symlink_to(models / name)
    (run / "bests" / ".step-00000040.tmp").mkdir()  # of a run that was killed
    state = {"x": {"step": 30}, "y": {"step": 10}, "z": {"step": 30}, "never": {"step": 0}}
    write_state(run, {"bests": state, "single": {"step": 20}})
    assert [path.name[-2:] for path in sources.bests(run)] == ["10", "30", "30"]
    assert merging.found(None, [], run, None) == (str(models / "base"), sources.bests(run))
    with pytest.raises(MergeError, match="wanted FIRST:LAST"):
        merging.found(None, [], run, "15-30")
    with pytest.raises(MergeError, match="--steps: found '15:30' without --run"):
        merging.found(None, [models / "a"], None, "15:30")

    # A run that began from another model's weights has that one as its base.
    record["config"]["train"] = {"from": str(models / "other")}
    (run / "run.json").write_text(json.dumps(record))
    assert merging.found(None, [], run, None)[0] == str(models / "other")


def write_state(run: Path, state: dict) -> None:
    newest = run / "checkpoints" / "step-00000030"
    newest.mkdir(parents=True, exist_ok=True)
    (newest / "state.json").write_text(json.dumps({"run": state}))
    (newest.parent / "latest").write_text(newest.name)


def test_a_sub_models_manifest_is_not_carried_over(models, tmp_path):
    """It lists other checksums: an export of the merge would be refused as damaged."""
    shutil.copytree(models / "a", tmp_path / "a")
    manifest.mark(tmp_path / "a", "best")
    manifest.seal(tmp_path / "a")
    merge(str(models / "base"), [tmp_path / "a", models / "b"], partial(average), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in (models / "a").iterdir()} | {"merge.json", "README.md"}


def test_a_model_given_twice_counts_twice(models, tmp_path):
    """The mean of the tasks' own bests, where two tasks share one: theta = sum_k theta_{s_k} / K."""
    a, b, _ = abc(models)
    for method in (average, average_norm, task_arithmetic):
        twice, weighed = tmp_path / f"{method.__name__}2", tmp_path / f"{method.__name__}w"
        merge(str(models / "base"), [a, b, a], partial(method), twice, force=True)
        given = partial(method, weights=[2.0, 1.0])
        merge(str(models / "base"), [a, b], given, weighed, force=True)
        assert tensors(twice).keys() == tensors(weighed).keys()
        for name, tensor in tensors(weighed).items():
            assert torch.equal(tensors(twice)[name], tensor), (method.__name__, name)
    report = json.loads((tmp_path / "average2" / "merge.json").read_text())
    assert report["models"] == [str(a), str(b)] and report["settings"] == {"weights": [2.0, 1.0]}
    given = partial(average, weights=[1.0, 2.0, 3.0])
    report = merge(str(models / "base"), [a, b, a], given, tmp_path / "given")
    assert report.settings == {"weights": [4.0, 2.0]}
    with pytest.raises(MergeError, match="weights: found .*, wanted 3, one for each"):
        merge(str(models / "base"), [a, b, a], partial(average, weights=[1.0]), tmp_path / "few")
    once = merge(str(models / "base"), [a, b, a], partial(model_stock), tmp_path / "stock")
    assert once.models == [str(a), str(b)] and once.settings == {}


MEASURE = """
import resource, sys
from functools import partial
from pathlib import Path
from mtl.merging.merge import merge
from mtl.merging.average import average
from mtl.merging.select import select
folder = Path(sys.argv[1])
merge(str(folder / "small"), [folder / "small-a"], partial(average), folder / "warm", force=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
models = [folder / name for name in "abc"]
merge(str(folder / "base"), models, partial(eval(sys.argv[2])), folder / sys.argv[2], memory=2**20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "select"])
def test_a_gigabyte_in_shards_fits_into_300_mb(tmp_path, method):
    """Sixty-four bf16 tensors of 16 MiB in eight files; four such models."""

    def write(folder: Path, seed: int, files_: int, elements: int) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        random, weight_map = torch.Generator().manual_seed(seed), {}
        for f in range(files_):
            name = f"model-{f}.safetensors"
            content = {
                f"layers.{f * 8 + i}.weight": torch.randn(elements, generator=random).bfloat16()
                for i in range(8)
            }
            weight_map |= dict.fromkeys(content, name)
            save_file(content, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )

    for i, name in enumerate(("small", "small-a")):
        write(tmp_path / name, i, 1, 64)
    write(tmp_path / "base", 0, 8, 2**23)
    base = files.Stored(tmp_path / "base")
    for name in "abc":
        (tmp_path / name).mkdir()
        for file in (*base.files, files.INDEX, "config.json"):
            (tmp_path / name / file).write_bytes((tmp_path / "base" / file).read_bytes())
        with (tmp_path / name / "model-0.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x80" + name.encode() if name != "c" else b"\x80\x3f")
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), method],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    )
    assert found.returncode == 0, found.stderr
    assert sum((tmp_path / method / file).stat().st_size for file in base.files) > 2**30
    assert int(found.stdout) < 300
