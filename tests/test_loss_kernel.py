"""`model.loss_kernel`: a fused kernel in place of the head's slices gives the same losses and gradients, or is refused.

Torch's is the real one. Liger's itself runs under Triton's interpreter, on a CPU: `pip install liger-kernel`, then
`TRITON_INTERPRET=1 pytest tests/test_loss_kernel.py`. Elsewhere a stand-in with its signature does, which shows what it is given.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import toys
from test_head import GROUPED, MODELS, gradients, inputs, lora_on_the_head

from mtl.config import ConfigError, parse
from mtl.losses import head
from mtl.models import load
from mtl.models.errors import ModelError

IS_REAL = (
    importlib.util.find_spec("liger_kernel") is not None
    and os.environ.get("TRITON_INTERPRET") == "1"
)
PLAIN = (
    "llama",
    "llama tied",
    "gpt2",
    "phi, bias",
    "gemma3",
    "qwen3",
    "mixtral",
    "opt, nested",
    "neox",
    "falcon",
)
SCALED = "cohere, scale", "granite, scale", "gemma2, soft cap"


def stand_in(hidden, weight, labels, bias=None, *, reduction, accum_dtype):
    assert reduction == "none" and accum_dtype == torch.float32
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    if not IS_REAL:
        for name in (
            "liger_kernel",
            "liger_kernel.transformers",
            "liger_kernel.transformers.functional",
        ):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        module.liger_fused_linear_cross_entropy = stand_in
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("which", head.KERNELS)
@pytest.mark.parametrize("name", PLAIN)
def test_the_kernel_gives_the_losses_and_gradients_of_full_logits(name, which):
    torch.manual_seed(0)
    made = MODELS[name]()
    rest, targets = inputs()
    logits = made(**rest).logits
    wanted = F.cross_entropy(logits.flatten(0, 1)[targets.at], targets.labels, reduction="none")
    head.install(made, which)
    rows = []
    made.get_output_embeddings().register_forward_hook(
        lambda part, given, out: rows.append(out.numel() // out.shape[-1])
    )
    found = made(**rest, targets=targets).loss
    assert found.dtype == torch.float32 and found.shape == targets.at.shape
    assert rows == [1, 1, 1], "the model's own head saw one position, and twice the large one"
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    ours, theirs = gradients(made, found), gradients(made, wanted)
    assert (ours - theirs).norm() < 2e-6 * theirs.norm() and theirs.norm() > 0
    made(**rest, targets=targets)
    assert rows == [1, 1, 1, 1], "checked once"
    with torch.no_grad():
        assert torch.equal(made(**rest, targets=targets).loss, found)
    none = made(
        **rest, targets=head.Targets(targets.at[:0], targets.labels[:0], len(targets.at))
    ).loss
    assert none.shape == (0,) and none.requires_grad


@pytest.mark.parametrize("which", head.KERNELS)
@pytest.mark.parametrize("name", SCALED)
def test_a_head_that_does_more_than_multiply_is_refused(name, which):
    torch.manual_seed(0)
    made = MODELS[name]()
    head.install(made, which)
    rest, targets = inputs()
    with pytest.raises(
        ValueError, match=f"{which}: .*ForCausalLM scales or caps its logits.* Leave the key out"
    ):
        made(**rest, targets=targets)


def test_a_mild_soft_cap_is_seen():
    """At the logits of a model that has learned nothing, a cap of 30 changes the seventh digit."""
    import transformers as hf

    made = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GROUPED, final_logit_softcapping=30.0, initializer_range=0.05)
    )
    head.install(made, "liger")
    rest, targets = inputs()
    with pytest.raises(ValueError, match="scales or caps"):
        made(**rest, targets=targets)


def test_an_adapter_on_the_head_is_refused():
    with pytest.raises(
        TypeError, match="LlamaForCausalLM's head is a .*, wanted a plain linear module"
    ):
        head.install(lora_on_the_head(), "liger")


def config_for(folder: str, *overrides: str):
    return parse(
        f"model: {{name: {folder}, precision: fp32, loss_kernel: liger}}\ntasks: {{a: {{train: a, validation: a, format: text}}}}\n"
        "train: {steps: 1}\nengine: {zero: 2}\noutput: x",
        overrides=overrides,
    )


def test_what_it_needs_is_said(tmp_path, monkeypatch):
    folder = toys.save(toys.tiny_llama(), tmp_path)
    assert load.load(config_for(folder), toys.tokenizer()) is not None
    with pytest.raises(
        ConfigError, match="model.loss_kernel: found liger, wanted null at engine.zero 3"
    ):
        config_for(folder, "engine.zero=3")
    adapter = "model.lora={r: 4, target_modules: [q_proj, lm_head]}"
    with pytest.raises(
        ModelError, match="needs a head that is one linear module without an adapter, found a "
    ):
        load.load(config_for(folder, adapter), toys.tokenizer())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match="needs a GPU, found a CPU. Leave the key out"):
        load.load(config_for(folder), toys.tokenizer())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed. Run: pip install liger-kernel"):
        load.load(config_for(folder), toys.tokenizer())


def test_torchs_kernel_is_for_fp32(tmp_path, monkeypatch):
    """Its losses of bf16 states are bf16, and it would leave autocast aside."""
    folder = toys.save(toys.tiny_llama(), tmp_path)
    config = config_for(folder, "model.loss_kernel=torch")
    assert load.load(config, toys.tokenizer()) is not None
    for precision in ("bf16", "bf16_autocast"):
        wanted = f"found torch, wanted liger or null with precision {precision}"
        with pytest.raises(ConfigError, match=wanted):
            config_for(folder, "model.loss_kernel=torch", f"model.precision={precision}")
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ModelError, match="loss_kernel: torch needs torch 2.13 or newer, found"):
        load.load(config, toys.tokenizer())
