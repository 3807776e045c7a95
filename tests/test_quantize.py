"""Adapters on quantized weights (QLoRA): trained, kept, continued and exported; and every way in which it cannot be done, said."""

import importlib.util
import shutil
from pathlib import Path

import peft
import pytest
import runs
import torch
import toys
from near import near
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mtl.check import memory
from mtl.config import Config, ConfigError, parse
from mtl.models import load
from mtl.models.errors import ModelError
from mtl.output.export import export

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
bitsandbytes = pytest.importorskip("bitsandbytes")

QLORA = ["model.lora={r: 4}", "model.quantize=nf4"]
KINDS = {
    "nf4": (bitsandbytes.nn.Linear4bit, torch.uint8),
    "int8": (bitsandbytes.nn.Linear8bitLt, torch.int8),
}


def config_for(folder: object, *overrides: str) -> Config:
    return parse(
        f"model: {{name: {folder}, precision: fp32}}\ntasks: {{a: {{train: a, validation: a, format: text}}}}\n"
        "train: {steps: 1}\noutput: x",
        overrides=overrides,
    )


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("quantize"))


@pytest.fixture(scope="module")
def run(yaml) -> Path:
    runs.train(yaml, *QLORA, world=2).well()
    return yaml.parent / "run"


def quantized_modules(module: torch.nn.Module, kind: str) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in module.named_modules() if isinstance(part, KINDS[kind][0])}


def test_the_loss_falls_and_only_adapters_are_kept(run):
    losses = [line["eval/macro"] for line in runs.metrics(run) if "eval/macro" in line]
    assert losses[-1] < losses[0] - 0.2, losses
    checkpoint = run / "checkpoints" / "step-00000012"
    for path in (checkpoint / "engine").glob("*_model_states.pt"):
        names = torch.load(path, weights_only=False)["module"]
        assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names), (
            "neither weights nor their scales"
        )
    trained = sum(
        tensor.numel()
        for tensor in load_file(checkpoint / "model" / "adapter_model.safetensors").values()
    )
    engine = sum(path.stat().st_size for path in (checkpoint / "engine").iterdir())
    assert engine < 16 * trained + 100_000


def test_it_goes_on_bit_for_bit(run, yaml):
    again = yaml.parent / "again"
    shutil.copytree(run, again)
    (again / "checkpoints" / "latest").write_text("step-00000006")
    runs.train(yaml, *QLORA, f"output={again}", world=2, resume=True).well()
    assert runs.untimed(run) == runs.untimed(again)
    one, other = (
        load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, again)
    )
    assert (
        all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        and one.keys() == other.keys()
    )


def test_another_quantization_is_another_run(run, yaml):
    again = yaml.parent / "other"
    shutil.copytree(run, again)
    ended = runs.train(yaml, QLORA[0], f"output={again}", world=2, resume=True)
    assert ended.codes == [1, 1] and "model.quantize: checkpoint 'nf4', now None" in ended.err


def test_merged_is_the_model_that_was_trained(run, yaml, tmp_path):
    """The adapter belongs to the quantized weights: merged into them, not into those before quantization."""
    merged = AutoModelForCausalLM.from_pretrained(
        export(run / "checkpoints" / "step-00000012", tmp_path / "out", merge=True)
    )
    assert (
        not quantized_modules(merged, "nf4")
        and "quantization_config" not in merged.config.to_dict()
    )
    trained = load.load(config_for(yaml.parent / "model", *QLORA), toys.tokenizer()).eval()
    peft.set_peft_model_state_dict(trained, load_file(run / "model" / "adapter_model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(yaml.parent / "model", dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(plain, run / "model").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = trained(ids).logits
        near(merged(ids).logits, wanted, units=100)
        assert (other(ids).logits - wanted).abs().max() > 1e-3


def test_the_card_says_so(run):
    assert "LoRA on nf4 weights" in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantized_model(yaml, kind, checkpointing):
    """After an evaluation, too: bitsandbytes then lays weights out anew on some CPUs, for a kernel without a gradient."""
    config = config_for(
        yaml.parent / "model", "model.lora={r: 4}", f"model.quantize={kind}", "model.precision=bf16_autocast",
        f"model.activation_checkpointing={str(checkpointing).lower()}",
    )  # fmt: skip
    mine = load.load(config, toys.tokenizer())
    found = quantized_modules(mine, kind)
    assert len(found) == 2 * 7 and all(
        part.weight.dtype == KINDS[kind][1] for part in found.values()
    )
    assert {p.dtype for p in mine.parameters() if p.requires_grad} == {torch.float32}
    before = {name: part.weight.clone() for name, part in found.items()}
    plain = _dequantized(yaml, kind)
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():  # B begins at 0, which would hide A's gradient
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            with torch.no_grad():
                mine.get_parameter(name).copy_(parameter)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        mine.eval()(ids)
    gradients = []
    for one in (mine, plain):
        one.train()(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if "lora_" in n})
    for name, gradient in gradients[1].items():
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < 0.05, (
            name,
            float(error),
        )  # products are in bf16 and, of int8, from weights rounded to bf16
    assert all(torch.equal(part.weight, before[name]) for name, part in found.items())


def _dequantized(yaml: Path, kind: str) -> torch.nn.Module:
    settings = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "int8": {"load_in_8bit": True},
    }
    quantization = BitsAndBytesConfig(**settings[kind])
    base = AutoModelForCausalLM.from_pretrained(
        yaml.parent / "model", dtype=torch.float32, quantization_config=quantization
    )
    return peft.get_peft_model(
        base.dequantize(torch.float32),
        peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"),
    )


def test_int8_in_bf16_trains(yaml):
    output = yaml.parent / "int8"
    settings = [
        "model.lora={r: 4}",
        "model.quantize=int8",
        "model.precision=bf16",
        "train.steps=6",
        f"output={output}",
    ]
    ended = runs.train(yaml, *settings).well()
    losses = [line["eval/macro"] for line in runs.metrics(output) if "eval/macro" in line]
    assert losses[-1] < losses[0] - 0.1, losses
    assert "cast" not in ended.err, "a line for every product of every layer"


@pytest.mark.parametrize("kind, size", [("nf4", 0.5 + 1 / 64 + 1 / 4096), ("int8", 1)])
def test_memory_counts_quantized_weights(yaml, kind, size):
    config = config_for(
        yaml.parent / "model", "model.lora={r: 4}", f"model.quantize={kind}", "model.precision=bf16"
    )
    skeleton = load.skeleton(config, toys.tokenizer())
    (found,) = (
        part for part in memory.estimate(config, 2, skeleton, 1, 10, 5) if part.name == "weights"
    )
    base = toys.tiny_llama()
    linear = sum(
        part.weight.numel()
        for name, part in base.named_modules()
        if isinstance(part, torch.nn.Linear) and name != "lm_head"
    )
    adapters = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in base.parameters()) - linear
    assert found.bytes == pytest.approx(size * linear + 2 * (rest + adapters))
    loaded = load.load(config, toys.tokenizer())
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert found.bytes == pytest.approx(held, rel=0.02), "the scales are beside the parameters"


def test_what_cannot_be(yaml):
    for overrides, texts in (
        (["model.quantize=nf4"], ["model.quantize: found nf4, wanted null", "add model.lora"]),
        (
            [*QLORA, "engine.zero=3"],
            ["model.quantize: found nf4, wanted null at engine.zero 3", "Use zero 2"],
        ),
        (
            ["model.lora={r: 4}", "model.quantize=int8"],
            ["model.precision: found fp32, wanted bf16 or bf16_autocast"],
        ),
        (["model.lora={r: 4}", "model.quantize=fp8"], ["wanted nf4, int8 or null"]),
    ):
        with pytest.raises(ConfigError) as caught:
            config_for("x", *overrides)
        assert all(text in str(caught.value) for text in texts), caught.value


def test_without_bitsandbytes(yaml, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    for how in (load.load, load.skeleton):
        with pytest.raises(
            ModelError, match="not installed. Run: pip install bitsandbytes"
        ):
            how(config_for(yaml.parent / "model", *QLORA), toys.tokenizer())


def test_bitsandbytes_without_a_kernel_for_the_device(yaml, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError(
            "Could not run 'bitsandbytes::quantize_4bit' with arguments\nfrom the 'CPU' backend."
        )

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", refuse)
    with pytest.raises(
        ModelError,
        match="nf4 needs bitsandbytes, which does not work on cpu.* from the 'CPU' backend",
    ):
        load.load(config_for(yaml.parent / "model", *QLORA), toys.tokenizer())
