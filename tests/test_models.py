"""Anything `AutoModelForCausalLM` loads: unlike architectures through one step, tokenizers with more or fewer tokens than usual,
and models that are refused with the switch that lets them in."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import toys
import transformers
from distributed import run_distributed
from near import near, strayed
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtl
from mtl import plugins
from mtl.config import parse
from mtl.config.spec import resolve
from mtl.data.collate import collate
from mtl.data.encode import load_tokenizer
from mtl.data.encoded import DataError
from mtl.distributed import comm, engine
from mtl.losses import head
from mtl.losses.causal_lm import causal_lm
from mtl.models import load, packing
from mtl.models.errors import ModelError
from mtl.output.export import export
from mtl.train.optimizer import optimizer
from mtl.train.step import fetch, train_step

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "GPT2": {
        "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "Phi": {},
    "Gemma": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
}  # fmt: skip
FP32_EPS = torch.finfo(torch.float32).eps


def build(name: str) -> transformers.PreTrainedModel:
    own_names = {"vocab_size": 259, "bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 257}
    sizes = (own_names if name == "GPT2" else SIZES) | ARCHITECTURES[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**sizes), dtype=torch.float32
    )


def one_step(names: list[str]) -> list[dict[str, float]]:
    """Each model through one step of ours, and a copy through one of plain PyTorch with transformers' own loss."""
    config = parse(
        "model: {name: x, precision: fp32}\ntasks: {a: {train: a, validation: a, format: text}}\ntrain: {steps: 1}\n"
        "optimizer: {name: sgd, lr: 0.1, clip: null}\noutput: x\nengine: {zero: 2}"
    )
    rng = np.random.default_rng(0)
    rows = []
    for n in (9, 5, 12):
        ids, target = rng.integers(0, 257, n).astype(np.int32), np.arange(n) >= 3
        rows.append([(ids, target, 0)])
    batch = collate(rows, 257, packed=False)
    # Whole sequences, as transformers takes them; ours leave out the last token, which is only predicted.
    whole = torch.full((3, 12), 257)
    mask, labels = torch.zeros_like(whole), torch.full_like(whole, -100)
    for i, ((ids, target, _),) in enumerate(rows):
        whole[i, : len(ids)], mask[i, : len(ids)] = torch.from_numpy(ids), 1
        labels[i, : len(ids)] = torch.from_numpy(np.where(target, ids, -100))
    found = []
    for name in names:
        mine = build(name)
        plain = copy.deepcopy(mine).train()
        head.install(mine)
        trained = engine.Engine(mine, config, optimizer(config))
        isolated = packing.measure(trained, 259)
        report = train_step(trained, causal_lm, fetch(lambda: [batch], 1), np.ones(1), 0.1, ["a"])
        loss = plain(input_ids=whole, attention_mask=mask, labels=labels).loss
        loss.backward()
        before = {n: p.detach().clone() for n, p in plain.named_parameters()}
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        after = trained.state_dict()
        found.append({
            "loss": abs(float(report.losses[0]) / float(loss.detach()) - 1),
            "parameters": max(
                float((after[n] - p).abs().max() / p.abs().max()) for n, p in plain.named_parameters()
            ),
            "moved": max(float((before[n] - p).abs().max()) for n, p in plain.named_parameters()),
            "packs": isolated.holds,
        })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def stepped() -> dict[str, dict[str, float]]:
    return dict(
        zip(ARCHITECTURES, run_distributed(one_step, 1, list(ARCHITECTURES))[0], strict=True)
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_that_of_plain_pytorch(stepped, name):
    found = stepped[name]
    # Both sides add in fp32, in another order: a few units of rounding, relative to what is compared.
    assert found["loss"] < 8 * FP32_EPS and found["parameters"] < 64 * FP32_EPS
    assert found["moved"] > 1e-3 and found["packs"]


ROUTED = 0.02


def router_steps(slices: int) -> dict[str, Any]:
    """Mixtral through one step of ours in two micro-batches a process, and through one of plain PyTorch."""
    head.slice_rows = lambda hidden: slices
    mine = build("Mixtral")
    plain = copy.deepcopy(mine).train()
    config = parse(
        "model: {name: x, precision: fp32}\ntasks: {a: {train: a, validation: a, format: text}}\ntrain: {steps: 1}\n"
        f"objective: {{name: causal_lm, router_loss: {ROUTED}}}\n"
        "optimizer: {name: sgd, lr: 0.1, clip: null}\noutput: x\nengine: {zero: 2}"
    )
    objective = resolve(config, "objective", plugins.OBJECTIVE, ())
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 257, n).astype(np.int32), np.arange(n) >= 3, 0) for n in (9, 5, 12, 8)]
    micros = [collate([[row]], 257, False, most=9) for row in rows]
    head.install(mine)
    trained = engine.Engine(mine, config, optimizer(config))
    before = trained.state_dict()
    report = train_step(
        trained,
        objective,
        fetch(lambda: micros[comm.rank() :: comm.world()], 1),
        np.ones(1),
        0.1,
        ["a"],
    )
    after = trained.state_dict()

    total, routed, tokens = 0.0, 0.0, sum(len(m.labels) for m in micros)
    for micro in micros:
        outputs = plain(
            input_ids=micro.input_ids,
            attention_mask=micro.attention_mask,
            output_router_logits=True,
        )
        share = len(micro.labels) / tokens
        token_mean = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1)[micro.at], micro.labels
        )
        total, routed = total + share * token_mean, routed + share * ROUTED * outputs.aux_loss
    (total + routed).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    return {
        "losses": (report.losses.tolist(), [float(total.detach())]),
        "penalties": (report.penalties, {"router_loss": float(routed.detach())}),
        "apart": strayed(
            {n: after[n] for n, _ in plain.named_parameters()},
            {n: p.detach() for n, p in plain.named_parameters()},
            {n: before[n] for n, _ in plain.named_parameters()},
        )
        if after
        else None,
        "router moved": max(
            float((after[n] - before[n]).abs().max()) for n in after if ".gate." in n
        )
        if after
        else None,
    }


@pytest.mark.parametrize("slices", [3, 1000])
def test_the_router_loss_is_a_term_of_its_own(slices):
    ranks = run_distributed(router_steps, 2, slices)
    for found in ranks:
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
        assert found["penalties"][0] == pytest.approx(found["penalties"][1], rel=1e-6)
    assert ranks[0]["apart"] < 1e-4 < ranks[0]["router moved"]


def test_a_router_loss_is_refused_where_there_is_no_router(tmp_path):
    ended = runs.train(
        runs.write(tmp_path), *STEPS, "objective={name: causal_lm, router_loss: 0.02}"
    )
    assert ended.codes == [1]
    assert (
        "objective.router_loss: found 0.02, wanted 0: this model gives no router loss (aux_loss)."
        in ended.err
    )


def more_tokens(folder: Path) -> Path:
    """The usual toy run, with a tokenizer that has three tokens more than the model."""
    path = runs.write(folder)
    tokenizer = toys.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>", "<think>"]})
    tokenizer.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "prose.train.jsonl").read_text().splitlines()]
    (folder / "prose.train.jsonl").write_text(
        "".join(json.dumps({"text": f"<tool>{row['text']}</tool>"}) + "\n" for row in rows)
    )
    return path


STEPS = ["train.steps=3", "evaluate.every=100"]
ROWS = "model.lora={r: 2, modules_to_save: [embed_tokens, lm_head]}"


@pytest.mark.parametrize("zero, world", [(2, 1), (3, 2)])
def test_new_tokens_get_rows_and_are_trained(tmp_path, zero, world):
    yaml = more_tokens(tmp_path)
    runs.train(yaml, *STEPS, f"engine.zero={zero}", world=world).well()
    loaded, tokenizer = (
        kind.from_pretrained(tmp_path / "run" / "model")
        for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert len(tokenizer) == 262
    assert loaded.get_input_embeddings().weight.shape == loaded.lm_head.weight.shape == (262, 64)
    assert loaded.config.vocab_size == 262
    ids = tokenizer("<tool>ab", return_tensors="pt", return_token_type_ids=False)
    assert ids["input_ids"][0, 0] == 259 and torch.isfinite(loaded(**ids).logits).all()


def test_new_tokens_beside_an_adapter_must_be_trained_with_it(tmp_path):
    yaml = more_tokens(tmp_path)
    ended = runs.train(yaml, *STEPS, "model.lora.r=2")
    assert ended.codes == [1]
    assert (
        "model.lora.modules_to_save: found [], wanted embed_tokens and lm_head in it" in ended.err
    )
    assert "The tokenizer has 262 tokens, the model 259" in ended.err
    runs.train(yaml, *STEPS, ROWS).well()
    merged = export(
        tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "merged", merge=True
    )
    whole, apart = AutoModelForCausalLM.from_pretrained(merged), mtl.load(tmp_path / "run/model")
    assert whole.get_input_embeddings().weight.shape == (262, 64)
    ids = torch.arange(250, 262)[None]
    near(apart(ids).logits, whole(ids).logits, units=100)


def test_a_tokenizer_without_a_pad_token(tmp_path):
    """Padding is masked by length: whatever fills it, the losses are the same."""
    yaml = runs.write(tmp_path)
    runs.train(yaml, *STEPS, "batch.packing=false", f"output={tmp_path}/eos").well()
    tokenizer = toys.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id is None
    runs.train(yaml, *STEPS, "batch.packing=false", f"output={tmp_path}/none").well()
    assert runs.untimed(tmp_path / "eos") == runs.untimed(tmp_path / "none")


def config_for(name: Path | str):
    return parse(
        f"model: {{name: {name}, precision: fp32}}\ntasks: {{a: {{train: a, validation: a, format: text}}}}\n"
        "train: {steps: 1}\noutput: x\nengine: {zero: 0}"
    )


def test_damaged_weights_are_an_error_of_the_models_name(tmp_path):
    toys.save(toys.tiny_llama(), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    where = "config:1: model.name: "
    with pytest.raises(ModelError, match=f"^{where}.*A file of its weights is not whole"):
        load.load(config_for(tmp_path), toys.tokenizer())
    weights.write_bytes(whole)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": 32}))
    with pytest.raises(ModelError, match=f"^{where}.*other shapes than its config.json says"):
        load.load(config_for(tmp_path), toys.tokenizer())


def test_a_tokenizer_that_cannot_be_read_is_an_error_of_the_models_name(tmp_path):
    toys.save(toys.tiny_llama(), tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"type": "BPE"', '"type": "Foo"'))
    with pytest.raises(DataError, match="^x:1: model.name: .*tokenizer.json is damaged, or"):
        load_tokenizer(config_for(tmp_path).model, "x:1")


@pytest.mark.parametrize("how", [load.load, load.skeleton])
def test_a_model_with_code_of_its_own_is_refused(tmp_path, how):
    settings = {
        "model_type": "foreign", "architectures": ["Foreign"],
        "auto_map": {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.Foreign"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "foreign.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError) as caught:
        how(config_for(tmp_path), toys.tokenizer())
    assert "it needs code that comes with it" in str(
        caught.value
    ) and "model.allow_remote_code: true" in str(caught.value)
    assert str(caught.value).startswith("config:1: model.name: ")


def test_a_gated_model_names_the_way_in(monkeypatch):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(load.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        ModelError, match="gated repo. Make sure .* `hf auth login` or set HF_TOKEN"
    ):
        load.load(config_for("someone/secret"), toys.tokenizer())


def unused(stage: int) -> float:
    """What one update makes of a parameter, ones, that the forward does not use."""
    config = parse(
        "model: {name: x, precision: fp32}\ntasks: {a: {train: a, validation: a, format: text}}\ntrain: {steps: 1}\n"
        f"optimizer: {{lr: 0.1, weight_decay: 0.1}}\noutput: x\nengine: {{zero: {stage}}}"
    )
    made = build("Llama")
    made.idle = torch.nn.Parameter(torch.ones(2, 2))
    head.install(made)
    trained = engine.Engine(made, config, optimizer(config))
    row = (np.arange(9, dtype=np.int32), np.arange(9) >= 3, 0)
    train_step(
        trained,
        causal_lm,
        fetch(lambda: [collate([[row]], 257, packed=True)], 1),
        np.ones(1),
        0.1,
        ["a"],
    )
    return float(made.idle.detach().mean())


@pytest.mark.parametrize("world", [1, 2])
def test_an_unused_parameter_has_the_gradient_zero_with_any_number_of_processes(world):
    """Left out, it would not decay: the update would depend on the number of processes."""
    assert run_distributed(unused, world, 0) == pytest.approx([1 - 0.1 * 0.1] * world)
