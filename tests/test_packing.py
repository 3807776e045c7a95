"""Packed sequences: kept apart by the models that do, and noticed in those that do not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from toys import tiny_gpt2, tiny_llama

from mtl.config import ConfigError, parse
from mtl.data.collate import collate
from mtl.data.encoded import Encoded, TaskData
from mtl.data.next_token import NextToken
from mtl.data.plan import layouts_for
from mtl.losses import head
from mtl.losses.causal_lm import causal_lm
from mtl.models.packing import decide, measure

VOCABULARY = 200
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
ISOLATING = {
    "llama": lambda: tiny_llama(),
    "gpt2": lambda: tiny_gpt2(),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)),
}
LEAKING = {
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
                     word_embed_proj_dim=64, max_position_embeddings=128, dropout=0.0)
    ),
}  # fmt: skip


def made(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def engine_of(module: nn.Module) -> SimpleNamespace:
    """As much of an engine as the measurement uses; the real one is measured beside the gradients."""
    return SimpleNamespace(module=module, eval=module.eval, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ISOLATING)
def test_isolation_holds(name, dtype):
    found = measure(engine_of(made(ISOLATING[name]).to(dtype)), VOCABULARY)
    assert found.holds, found
    assert found.leak == 0 and found.apart < (1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", LEAKING)
def test_leaks_are_caught(name, dtype):
    found = measure(engine_of(made(LEAKING[name]).to(dtype)), VOCABULARY)
    assert not found.holds and found.leak > 1e-3, found


class WrongPositions(nn.Module):
    """Keeps sequences apart, but counts positions on through the row: nothing leaks, and yet packed is not apart."""

    def __init__(self):
        super().__init__()
        self.model = tiny_gpt2()

    def forward(self, input_ids, position_ids, use_cache):
        through = torch.arange(input_ids.shape[1])[None]
        embedded = self.model.transformer.wte(input_ids) + self.model.transformer.wpe(through)
        return SimpleNamespace(logits=self.model.lm_head(embedded))


def test_positions_that_do_not_restart_are_caught():
    found = measure(engine_of(WrongPositions()), VOCABULARY)
    assert found.leak == 0 and found.apart > 1e-2 and not found.holds


class Whispers(nn.Module):
    """Each later token hears a little of the row's first: less than two batch shapes may differ by rounding in bf16."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(
            torch.randn(VOCABULARY, VOCABULARY, generator=generator).bfloat16()
        )

    def forward(self, input_ids, position_ids, use_cache):
        logits = self.table[input_ids]
        heard = torch.arange(input_ids.shape[1])[None, :, None] >= 5
        return SimpleNamespace(logits=logits + heard * 0.05 * (input_ids[:, :1, None] % 2))


def test_a_leak_below_rounding_is_caught():
    found = measure(engine_of(Whispers()), VOCABULARY)
    assert found.apart <= found.tolerance and found.leak > 1e-3 and not found.holds


def test_the_measurement_is_in_eval_mode_and_leaves_no_gradient():
    module = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    assert measure(engine_of(module), VOCABULARY).holds
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", ISOLATING)
def test_packed_is_padded(name):
    """Per-task losses and gradients of the same examples: in rows of one, of many, and in several micro-batches."""
    rng = np.random.default_rng(0)
    pieces = []
    for i, n in enumerate((3, 17, 9, 2, 12, 5)):
        target = rng.random(n) < 0.5
        target[0], target[-1] = False, True
        pieces.append((rng.integers(0, VOCABULARY, n), target, i % 2))
    module = made(ISOLATING[name]).eval()
    head.install(module)

    def run(micros: list[list[list]], packed: bool) -> tuple[np.ndarray, torch.Tensor]:
        module.zero_grad()
        terms = [causal_lm(module, collate(rows, 1, packed), 2) for rows in micros]
        sum((t.sums * torch.tensor([1.0, 0.3])).sum() for t in terms).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        return sum(t.sums for t in terms).detach().numpy(), gradient

    padded, wanted = run([[[piece] for piece in pieces]], False)
    one_row, rows, singles = (
        [[pieces]],
        [[pieces[:2], pieces[2:4]], [pieces[4:]]],
        [[[piece]] for piece in pieces],
    )
    for micros, packed in ((one_row, True), (rows, True), (singles, False)):
        sums, gradient = run(micros, packed)
        np.testing.assert_allclose(sums, padded, rtol=1e-6)
        assert (gradient - wanted).norm() < 1e-6 * wanted.norm()


def config_of(packing: str, model: str = "name: m"):
    return parse(
        f"""
model: {{{model}}}
tasks: {{a: {{train: x, validation: x, format: text}}}}
train: {{steps: 1}}
batch:
  packing: {packing}
output: o
"""
    )


def test_deciding():
    sound, leaking = engine_of(tiny_llama()), engine_of(made(LEAKING["opt"]))
    said: list[str] = []
    assert decide(config_of("auto"), sound, VOCABULARY, said.append)
    assert decide(config_of("true"), sound, VOCABULARY, said.append)
    assert not decide(config_of("auto"), leaking, VOCABULARY, said.append)
    assert not decide(config_of("false"), sound, VOCABULARY, said.append)
    assert [text.split(":")[0] for text in said] == [
        "batches are packed", "batches are packed", "batches are padded, because OPTForCausalLM does not isolate",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError, match=r":6: batch.packing: found true, wanted auto or false.*OPTForCausalLM"
    ):
        decide(config_of("true"), leaking, VOCABULARY, said.append)


def attended(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def apart(q, k, v, cu_seqlens_q, **_):
    ends = cu_seqlens_q.tolist()
    parts = ([x[None, a:b] for x in (q, k, v)] for a, b in zip(ends, ends[1:], strict=False))
    return torch.cat([attended(*part)[0] for part in parts])


@pytest.fixture
def flash(monkeypatch):
    """A model on FlashAttention: transformers' own choice between its two kernels, torch in their place."""
    kernels = (lambda q, k, v, **_: attended(q, k, v)), apart, None, None, None
    nothing = (lambda **_: {}), (lambda **_: {})
    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention",
        lambda *_, **__: (kernels, nothing),
    )
    module = tiny_llama()
    module.config._attn_implementation = "flash_attention_2"
    return engine_of(module)


def test_flash_attention_keeps_apart_in_one_row_only(flash):
    assert measure(flash, VOCABULARY, rows=1).holds
    found = measure(flash, VOCABULARY, rows=2)
    assert not found.holds and found.leak > 1e-3
    said: list[str] = []
    assert decide(config_of("auto", "name: m, attention: hub/flash-attn2"), flash, 200, said.append)
    # A kernel whose name does not say so gets several rows, and is measured in several.
    assert not decide(config_of("auto", "name: m, attention: hub/other"), flash, 200, said.append)


@pytest.mark.parametrize("kernel", ("flash_attention_2", "hub/flash-attn2"))
def test_flash_attention_is_given_one_row(kernel):
    config = config_of("auto\n  row_length: 4096", f"name: m, attention: {kernel}")
    split = Encoded.of([(np.zeros(9, dtype=np.int32), np.arange(9) > 0)])
    for tokens in (4096, 1024, 8192):  # evaluate.tokens may differ from batch.tokens
        made = layouts_for(
            config, [TaskData("a", split, split)], [NextToken(None, 0)], [0], 1, 0, True, tokens
        )
        assert made.each[0].row_length == tokens


def test_a_row_is_no_longer_than_a_micro_batch_of_its_pass():
    config = config_of("auto\n  row_length: 2048")
    split = Encoded.of([(np.zeros(9, dtype=np.int32), np.arange(9) > 0)])
    made = layouts_for(
        config, [TaskData("a", split, split)], [NextToken(None, 0)], [0], 1, 0, True, 1024
    )
    assert made.each[0].row_length == 1024
