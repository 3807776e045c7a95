"""The head in slices: the losses and gradients of plain full logits, and never all logits at once."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from toys import tiny_gpt2, tiny_llama

from mtl.losses import head
from mtl.losses.head import Targets

V = 211  # no other size of any model here
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}


def llama(**changes: object) -> hf.LlamaForCausalLM:
    return tiny_llama(vocab_size=V, eos_token_id=1, pad_token_id=1, **changes)


def lora_on_the_head() -> peft.PeftModel:
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(llama(), settings)


# What stands between a decoder and its logits: nothing, a tied table, a bias, a scale, a soft cap, an adapter, experts.
MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(vocab_size=V),
    "phi, bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "cohere, scale": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.3)),
    "granite, scale": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gemma2, soft cap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GROUPED, final_logit_softcapping=0.5)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    ),
    "opt, nested": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)
    ),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES)),
    "llama, lora on the head": lora_on_the_head,
}


def inputs(seed: int = 0) -> tuple[dict[str, torch.Tensor], Targets]:
    """Three rows of 12, about half of the positions with a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (3, 12), generator=generator)
    at = torch.nonzero(torch.rand(36, generator=generator) < 0.5).flatten()
    return {"input_ids": ids, "use_cache": False}, Targets(
        at, torch.randint(2, V, at.shape, generator=generator), len(at)
    )


def gradients(model: torch.nn.Module, losses: torch.Tensor) -> torch.Tensor:
    """Of unevenly weighted losses, so that a mistaken order would show."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(
        (losses * torch.linspace(0.1, 2, len(losses))).sum(), trained, allow_unused=True
    )
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("rows", [1, 5, 10_000])
@pytest.mark.parametrize("name", MODELS)
def test_slices_give_the_losses_and_gradients_of_full_logits(name, rows, monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: rows)
    torch.manual_seed(0)
    model = MODELS[name]()
    rest, targets = inputs()
    logits = model(**rest).logits
    wanted = F.cross_entropy(logits.flatten(0, 1)[targets.at], targets.labels, reduction="none")
    head.install(model)
    found = model(**rest, targets=targets).loss
    assert found.dtype == torch.float32 and found.shape == targets.at.shape
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    ours, theirs = gradients(model, found), gradients(model, wanted)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm() and theirs.norm() > 0
    torch.testing.assert_close(model(**rest).logits, logits)  # without targets it answers as before


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_targets_than_slices(number, monkeypatch):
    """A rank cuts into as many slices as the rank that has most targets."""
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 1)
    model = llama()
    head.install(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    rest, targets = inputs()
    cut = Targets(targets.at[:number], targets.labels[:number], 4)
    losses = model(**rest, targets=cut).loss
    torch.testing.assert_close(losses, model(**rest, targets=targets).loss[:number])
    assert losses.shape == (number,) and calls.count(1) == 4 + len(targets.at)
    losses.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_dropout_in_the_head_is_the_same_in_the_backward_pass(monkeypatch):
    """Adapters on the head may drop out: a slice that is computed again must drop what it dropped before."""
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 5)
    settings = peft.LoraConfig(
        r=4,
        target_modules=["lm_head"],
        lora_dropout=0.5,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), settings).train()
    head.install(model)
    rest, targets = inputs()
    (scale,) = [p for name, p in model.named_parameters() if "lora_B" in name]

    def total() -> torch.Tensor:
        torch.manual_seed(1)
        return model(**rest, targets=targets).loss.double().sum()

    loss = total()
    state = torch.get_rng_state()
    (found,) = torch.autograd.grad(loss, scale)
    assert torch.equal(torch.get_rng_state(), state)
    step = 1e-3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            scale.add_(sign * step)
            values.append(total())
    assert float((values[0] - values[1]) / 2) == pytest.approx(
        float((found * step).sum()), rel=1e-3
    )


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made with a dimension of the vocabulary, the table itself left out."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and V in tensor.shape and 64 not in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // V)
        return made


def test_no_more_logits_than_a_slice_are_ever_made(monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 4)
    rest, targets = inputs()
    found = {}
    for sliced in (True, False):
        model = llama()
        head.install(model)
        with Largest() as largest:
            if sliced:
                losses = model(**rest, targets=targets).loss
            else:
                losses = F.cross_entropy(
                    model(**rest).logits.flatten(0, 1)[targets.at], targets.labels, reduction="none"
                )
            losses.sum().backward()
        found[sliced] = largest.rows
    assert found == {True: 4, False: 36}


def test_between_forward_and_backward_only_the_first_slice_is_held(monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 4)
    rest, targets = inputs()
    model = llama()
    head.install(model)
    held = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if V in tensor.shape and 64 not in tensor.shape:
            held[tensor.data_ptr()] = tensor.numel() // V
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**rest, targets=targets)
    assert list(held.values()) == [4]


def test_the_losses_are_fp32_in_a_bf16_model(monkeypatch):
    monkeypatch.setattr(head, "slice_rows", lambda hidden: 5)
    model = llama().bfloat16()
    rest, targets = inputs()
    logits = model(**rest).logits.flatten(0, 1)[targets.at]
    head.install(model)
    found = model(**rest, targets=targets).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found,
        F.cross_entropy(logits.float(), targets.labels, reduction="none"),
        rtol=2e-3,
        atol=0,
    )


def test_a_model_that_is_all_head_is_refused():
    with pytest.raises(TypeError, match="Linear has no decoder beside its head"):
        head.decoder_of(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LlamaModel has no decoder beside its head"):
        head.decoder_of(tiny_llama().model)
    assert (
        head.decoder_of(tiny_llama())[1] == "model"
        and head.decoder_of(lora_on_the_head())[1] == "model"
    )
    assert head.decoder_of(MODELS["opt, nested"]())[1] == "model.decoder"
