"""DoRA and rank-stabilized LoRA: the same losses however parameters are cut, and exports that are what their papers' formulas say."""

import json
from pathlib import Path

import peft
import pytest
import runs
import torch
import toys
from distributed import run_distributed
from near import near
from safetensors.torch import load_file
from test_equivalence import configuration
from transformers import AutoModelForCausalLM

from mtl.distributed import engine
from mtl.models import load
from mtl.output.export import export
from mtl.train.optimizer import optimizer

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK, ALPHA, STEPS = 4, 6.0, 6
VARIANTS = ["dora", "rslora"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Each variant's run on two processes: with the whole model on each (ZeRO 2), and with the model in parts (ZeRO 3)."""
    yaml = runs.write(tmp_path_factory.mktemp("adapters"))
    found = {}
    for variant in VARIANTS:
        for zero in (2, 3):
            found[f"{variant} {zero}"] = output = yaml.parent / f"{variant}-{zero}"
            lora = f"model.lora={{r: {RANK}, alpha: {ALPHA}, {variant}: true}}"
            settings = [
                lora,
                f"engine.zero={zero}",
                f"train.steps={STEPS}",
                "optimizer.lr=0.01",
                f"output={output}",
            ]
            runs.train(yaml, *settings, world=2).well()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_and_in_parts_it_trains_alike(trained, variant):
    curves = [
        [
            line["train/loss"]
            for line in runs.metrics(trained[f"{variant} {zero}"])
            if "train/loss" in line
        ]
        for zero in (2, 3)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=5e-5) and len(curves[0]) == STEPS
    first, last = (
        line["eval/macro"] for line in runs.metrics(trained[f"{variant} 3"]) if "eval/macro" in line
    )
    assert last < first - 0.1


def modes(folder: str) -> list[set[bool]]:
    """Which modes the engine's modules are in: as built, and after each of some calls."""
    config = configuration(
        folder, model__lora="{r: 2, alpha: 4, dropout: 0.1, target_modules: all-linear}"
    )
    built = engine.Engine(load.load(config, toys.tokenizer()), config, optimizer(config))
    found = [{part.training for part in built.module.modules()}]
    for call in (
        built.train,
        built.train,
        built.eval,
        built.eval,
        built.module.train,
        built.eval,
        built.train,
    ):
        call()
        found.append({part.training for part in built.module.modules()})
    return found


def test_every_part_is_in_the_mode_that_was_asked_for(tmp_path):
    [found] = run_distributed(modes, 1, toys.save(toys.tiny_llama(), tmp_path))
    assert found == [{False, True}, {True}, {True}, {False}, {False}, {True}, {False}, {True}]


def formula(variant: str, weight: torch.Tensor, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """Kalajdzievski 2023 (arXiv 2312.03732): W + alpha / sqrt(r) B A. Liu et al. 2024 (arXiv 2402.09353), equation 5: m V / |V|
    with V = W + alpha / r B A and its norm over each output's row."""
    scale = ALPHA / (RANK**0.5 if variant == "rslora" else RANK)
    moved = weight + scale * adapter["lora_B.weight"] @ adapter["lora_A.weight"]
    if variant == "rslora":
        return moved
    return adapter["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_whole_and_merged_by_the_formula(trained, variant, tmp_path):
    checkpoint = trained[f"{variant} 3"] / "checkpoints" / f"step-{STEPS:08d}"
    tensors = load_file(export(checkpoint, tmp_path / "adapter") / "adapter_model.safetensors")
    base = toys.tiny_llama().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(
        export(checkpoint, tmp_path / "merged", merge=True)
    )
    parts = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * (variant == "dora")
    linear = [name for name in base if name.endswith("_proj.weight")]
    assert len(tensors) == len(parts) * len(linear) and len(linear) == 14
    for name in linear:
        prefix = "base_model.model." + name.removesuffix("weight")
        adapter = {part: tensors[prefix + part] for part in parts}
        rows, columns = base[name].shape
        shapes = {
            "lora_A.weight": (RANK, columns),
            "lora_B.weight": (rows, RANK),
            "lora_magnitude_vector": (rows,),
        }
        assert {part: tuple(tensor.shape) for part, tensor in adapter.items()} == {
            part: shapes[part] for part in parts
        }
        assert all(tensor.abs().max() > 0 for tensor in adapter.values()), name
        if variant == "dora":
            moved = (adapter["lora_magnitude_vector"] - base[name].norm(dim=1)).abs().max()
            assert moved > 1e-4, "magnitudes begin at the weights' norms and are trained"
        near(merged.state_dict()[name], formula(variant, base[name], adapter), units=8)
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[f"use_{variant}"]
        is True
    )

    apart, ids = (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        torch.arange(20)[None],
    )
    with torch.no_grad():
        near(merged(ids).logits, apart(ids).logits, units=100)
        assert (merged(ids).logits - toys.tiny_llama()(ids).logits).abs().max() > 1e-3
