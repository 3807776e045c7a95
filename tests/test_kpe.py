"""The recipe KPE: a frozen model, one adapter beside its last blocks, three losses of the same rows."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import toys
from distributed import run_distributed
from safetensors.torch import load_file
from test_equivalence import Expose
from torch import nn
from transformers import AutoModel

import mtl
from mtl import build, plugins
from mtl.config import ConfigError
from mtl.data.examples import Piece
from mtl.data.formats import RowProblem
from mtl.distributed import comm, engine
from mtl.models.errors import ModelError
from mtl.recipes.kpe.adapter import Adapter, Fusion
from mtl.recipes.kpe.examples import choices
from mtl.recipes.kpe.objective import INPUTS
from mtl.train import gram
from mtl.train.step import fetch, train_step

YAML = """\
model:
  name: {folder}/{model}
  loader: {{name: kpe, layers: 2, width: 16, heads: 2, dropout: 0.0}}
  precision: fp32
objective: {{name: kpe, knowledge: 48}}
tasks:
  a: {{train: {folder}/a.jsonl, validation: {folder}/a.jsonl, format: choices}}
  b: {{train: {folder}/b.jsonl, validation: {folder}/b.jsonl, format: choices}}
  span: {{of: [a, b], loss: span}}
  relation: {{of: [b], loss: relation}}
batch: {{examples: 6, tokens: 512, max_length: 32}}
mix: {{shares: equal}}
train: {{steps: 6}}
optimizer: {{lr: 1.0e-2, clip: null}}
balancer: {balancer}
evaluate: {{every: 3, best: accuracy, probe: {{every: 2, groups: 2}}}}
checkpoint: {{every: 3, keep: 9}}
engine: {{zero: {zero}, deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}}}
output: {folder}/run
cache: {folder}/cache
"""
WEIGHTS, STAGES = [0.4, 0.1, 0.2, 0.3], (0, 2, 3)
STATES = "model.loader={name: kpe, layers: 2, width: 16, heads: 2, dropout: 0.0, start: states, reads: both}"


def row(draw: np.random.Generator, per_option: bool = False) -> dict[str, Any]:
    def word(n: int = 5) -> str:
        return "".join(draw.choice(list("abcdef"), n))

    c = 3 if per_option else int(draw.integers(2, 5))
    options = [word(int(draw.integers(2, 7))) for _ in range(c)]
    head, tail = "g" + word(3), "h" + word(3)
    relation = ["is a", "has"][int(draw.integers(2))]
    items: list[dict[str, Any]] = [
        {"text": f"{head} {relation} {tail}", "head": head, "tail": tail, "relation": relation},
        {"text": f"{word()} {word()} {word()}"},
    ]
    if per_option:
        items = [{**item, "option": i} for i in range(c) for item in items]
    return {"question": word(), "options": options, "answer": c - 1, "knowledge": items}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kpe")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    toys.save(toys.tiny_bert(num_hidden_layers=3, **dropout), root / "bert")
    toys.save(toys.tiny_llama(), root / "llama")
    draw = np.random.default_rng(0)
    for name, rows in (("a", 12), ("b", 9)):
        lines = [json.dumps(row(draw, per_option=name == "b")) for _ in range(rows)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def config_of(folder: Path, *overrides: str, model: str = "bert", zero: int = 2, text: str = YAML,
              balancer: str = "Equal") -> Any:  # fmt: skip
    path = folder / f"x{comm.rank()}.yaml"
    path.write_text(text.format(folder=folder, model=model, zero=zero, balancer=balancer))
    return plugins.read(str(path), overrides)


def parts(folder: Path, *overrides: str, **more: Any) -> tuple[Any, Any, nn.Module]:
    """Config, data and model; every weight away from 0, so that nothing is equal by chance."""
    config = config_of(folder, *overrides, **more)
    data = build.encode(config, say=lambda text: None)
    torch.manual_seed(1)
    model = plugins.loader(config)(config, data.tokenizer, data.examples, empty=False)
    return config, data, model.eval()


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def pieces(data: Any, *rows: tuple[int, int], key: str = "0/train/0") -> list[list[Piece]]:
    return [[Piece(s, data.tasks[s].train.columns(n), f"{key}/{s}/{n}")] for s, n in rows]


def batch_of(data: Any, *rows: tuple[int, int]) -> Any:
    return data.examples[0].collate(pieces(data, *rows), packed=False, most=1, tokens=512)


def outputs(model: nn.Module, batch: Any) -> tuple[torch.Tensor, ...]:
    return model(**{name: getattr(batch, name) for name in INPUTS})


ROWS = [(0, 0), (1, 1), (0, 3), (1, 4), (0, 7)]
BOTH = pytest.mark.parametrize("model", ["bert", "llama"])


# --- the adapter


def test_fusion_is_torchs_transformer_layer():
    mine = shaken(Fusion(16, 4, 0.0))
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, batch_first=True)
    names = {
        "attention.weight": "self_attn.in_proj_weight", "attention.bias": "self_attn.in_proj_bias",
        "out.weight": "self_attn.out_proj.weight", "out.bias": "self_attn.out_proj.bias",
        "first.weight": "linear1.weight", "first.bias": "linear1.bias",
        "second.weight": "linear2.weight", "second.bias": "linear2.bias",
        "norms.0.weight": "norm1.weight", "norms.0.bias": "norm1.bias",
        "norms.1.weight": "norm2.weight", "norms.1.bias": "norm2.bias",
    }  # fmt: skip
    theirs.load_state_dict({names[name]: value for name, value in mine.state_dict().items()})
    x, seen = torch.randn(3, 7, 16), torch.rand(3, 7) < 0.7
    seen[:, 0] = True
    torch.testing.assert_close(mine(x, seen), theirs(x, src_key_padding_mask=~seen))


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_of_the_adapter(residual):
    adapter = shaken(Adapter(4, 4, 2, 0.0, residual=residual)).double()
    states, known = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    seen = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]]) > 0
    assert torch.autograd.gradcheck(lambda p, a: adapter(p, a, seen), (states, known))


@BOTH
def test_without_layers_scores_are_those_of_the_frozen_model(folder, model):
    _, data, made = parts(folder, "model.loader={name: kpe, layers: 0}", model=model)
    batch = batch_of(data, *ROWS)
    plain = AutoModel.from_pretrained(folder / model, dtype=torch.float32).eval()
    states = plain(batch.input_ids, batch.attention_mask).last_hidden_state
    mask = batch.attention_mask[..., None].float()
    wanted = made.score((states * mask).sum(1) / mask.sum(1)).squeeze(-1)
    assert torch.equal(outputs(made, batch)[0], wanted)
    begun = "model.loader={name: kpe, layers: 2, width: 16, start: zero, residual: false}"
    _, _, begins = parts(folder, begun, model=model)
    begins.score.load_state_dict(made.score.state_dict())
    assert torch.equal(outputs(begins, batch)[0], wanted), "it begins as the frozen model"
    shaken(begins.adapters)
    assert not torch.allclose(outputs(begins, batch)[0], wanted, atol=1e-4)


@BOTH
def test_gradients_stand_where_learning_is_and_nowhere_else(folder, model):
    _, data, made = parts(folder, model=model)
    terms = data.goals.as_one(shaken(made), batch_of(data, *ROWS, (1, 2), (1, 0), (1, 3)), 4)
    assert min(terms.counts.tolist()) > 0
    terms.sums.sum().backward()
    for name, p in made.named_parameters():
        assert p.requires_grad != name.startswith("plm."), name
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name


def test_a_zero_start_can_leave_it(folder):
    _, data, made = parts(
        folder, "model.loader={name: kpe, width: 16, start: zero, residual: false}"
    )
    data.goals.as_one(made, batch_of(data, *ROWS), 4).sums.sum().backward()
    assert made.adapters[0].norm.weight.grad.any()


@BOTH
@pytest.mark.parametrize("overrides", [(), (STATES,)])
def test_ids_under_masks_change_nothing(folder, model, overrides):
    _, data, made = parts(folder, *overrides, model=model)
    batch = batch_of(data, *ROWS)
    before = outputs(shaken(made), batch)
    assert (batch.attention_mask == 0).any() and (batch.knowledge_mask == 0).any()
    batch.input_ids[batch.attention_mask == 0] = 65
    batch.knowledge[batch.knowledge_mask == 0] = 66
    for one, other in zip(before, outputs(made, batch), strict=True):
        assert torch.equal(one, other)


@BOTH
def test_an_example_is_the_same_beside_any_others(folder, model):
    _, data, made = parts(folder, model=model)
    shaken(made)
    together = data.goals.as_one(made, batch_of(data, *ROWS), 4)
    apart = [data.goals.as_one(made, batch_of(data, one), 4) for one in ROWS]
    sums = torch.stack([one.sums for one in apart]).sum(0)
    torch.testing.assert_close(together.sums, sums, rtol=4e-6, atol=0)
    assert together.counts.tolist() == torch.stack([one.counts for one in apart]).sum(0).tolist()
    assert batch_of(data, *ROWS).counts(4).tolist() == together.counts.tolist()


def test_the_order_of_candidates_does_not_matter(folder):
    _, data, made = parts(folder)
    shaken(made)
    batch = batch_of(data, *ROWS)
    order = torch.randperm(len(batch.example), generator=torch.Generator().manual_seed(0))
    before = data.goals.as_one(made, batch, 4)
    for name in ("input_ids", "attention_mask", "of", "example", "place"):
        getattr(batch, name)[:] = getattr(batch, name)[order]
    batch.seen[:] = order.argsort()[batch.seen]
    after = data.goals.as_one(made, batch, 4)
    torch.testing.assert_close(after.sums, before.sums, rtol=4e-6, atol=0)
    assert after.measures["accuracy"].equal(before.measures["accuracy"])


def test_every_option_may_read_its_own_knowledge(folder):
    _, data, made = parts(folder)
    batch = batch_of(data, (0, 0), (1, 1))
    c = int((batch.example == 0).sum())
    assert batch.of.tolist() == [0] * c + [1, 2, 3] and len(batch.knowledge) == 4
    before = outputs(shaken(made), batch)[0]
    batch.knowledge[2, 1] = 65
    changed = (outputs(made, batch)[0] - before).abs() > 1e-6
    assert changed.tolist() == [False] * (c + 1) + [True, False]


# --- closed forms


def test_losses_in_closed_form(folder):
    _, data, made = parts(folder)
    batch = batch_of(data, *ROWS)
    with torch.no_grad():
        made.score[2].weight.zero_()
        for p in (*made.relation.parameters(), *made.span[0].parameters()):
            p.zero_()
    terms = data.goals.as_one(made, batch, 4)
    options = [int((batch.example == b).sum()) for b in range(5)]
    tasks = ["a", "b", "a", "b", "a"]
    wanted = [
        sum(math.log(c) for c, t in zip(options, tasks, strict=True) if t == task) for task in "ab"
    ]
    spans, relations = terms.counts[2:].tolist()
    wanted += [spans * math.log(259), relations * math.log(2)]
    assert terms.sums.tolist() == pytest.approx(wanted, rel=1e-6)
    assert data.examples[0].relations == ["has", "is a"]


def test_masks_cover_the_tail_or_a_share(folder):
    _, data, _ = parts(folder)
    rows = [(1, n) for n in range(9)]
    seen = set()
    for step in range(4):
        made = data.examples[0].collate(
            pieces(data, *rows, key=f"0/train/{step}"), packed=False, most=1, tokens=512
        )
        entity = set(made.spans[:, 0].tolist())
        for b in range(9):
            mine = made.at[:, 0] == b
            n = int(made.knowledge_mask[made.of[made.seen[b]]].sum())
            assert int(mine.sum()) == (4 if b in entity else max(1, round(0.15 * n)))
            if b in entity:
                at = made.at[mine][:, 1]
                assert (made.knowledge[made.of[made.seen[b]]][at] == 257).all()
                assert toys.tokenizer().decode(made.labels[mine].tolist()).startswith("h")
        seen.add(tuple(made.seen.tolist()))
    assert len(seen) == 4, "each step draws anew"


def test_one_adapter_or_one_for_each_layer(folder):
    _, _, shared = parts(folder)
    _, _, apart = parts(folder, "model.loader={name: kpe, layers: 2, width: 16, share: false}")
    assert len(shared.adapters) == 1 and len(apart.adapters) == 2
    _, data, made = parts(folder, "model.loader={name: kpe, width: 16, attend: false, gate: false}")
    assert {n.split(".")[1] for n, _ in made.adapters[0].named_parameters(prefix="x")} == {
        "down", "up", "norm",
    }  # fmt: skip
    batch = batch_of(data, *ROWS)
    before = outputs(shaken(made), batch)[0]
    batch.knowledge[:] = 65
    assert torch.equal(outputs(made, batch)[0], before), "without attention no knowledge is read"


# --- exactness in the trainer


def gradients(folder: str, *overrides: str) -> dict[int, dict[str, Any]]:
    """On each rank: what an optimizer is handed for the first batch, and the tasks' Gramian."""
    found = {}
    for zero in STAGES:
        config = config_of(Path(folder), *overrides, zero=zero)
        data = build.encode(config, say=lambda text: None)
        torch.manual_seed(1)
        model = shaken(plugins.loader(config)(config, data.tokenizer, data.examples, empty=False))

        def make(module: nn.Module) -> Expose:
            return Expose([p for p in module.parameters() if p.requires_grad])

        trained = engine.Engine(model, config, make)
        run = build.build(config, data, engine=trained, say=lambda text: None)
        batch = fetch(lambda run=run: run.batches.batch(0), 4)
        streams = run.batches.by_stream(0)
        tasks = [[micro for s in run.book.reads(k) for micro in streams[s]] for k in range(4)]
        learned = [p for p in trained.module.parameters() if p.requires_grad]
        trained.train()
        mine = gram.gradients(trained, run.objective, tasks, learned)
        report = train_step(trained, run.objective, batch, np.array(WEIGHTS), 0.0, run.names)
        state = {n: t.numpy() for n, t in trained.state_dict(trainable_only=True).items()}
        found[zero] = {
            "losses": report.losses, "state": state, "gram": gram.products(mine, mine)
        }  # fmt: skip
        run.batches.close()
    return found


def reference(folder: Path, *overrides: str) -> dict[str, Any]:
    """The same in plain autograd: one example at a time, each loss by its formula."""
    config, data, model = parts(folder, *overrides)
    shaken(model)
    sums, counts = [torch.zeros(()) for _ in range(4)], [0] * 4
    mix = build.mix_for(config, data.tasks)
    for s, n in zip(*(each.tolist() for each in mix.batch(0)), strict=True):
        batch = data.examples[0].collate(
            pieces(data, (s, n), key=f"{config.train.seed}/train/0"),
            packed=False,
            most=1,
            tokens=512,
        )
        scores, words, cosines = outputs(model, batch)
        each = [(s, -F.log_softmax(scores, 0)[int(batch.answer)])]
        each += [(2, -F.log_softmax(words[i], 0)[y]) for i, y in enumerate(batch.labels)]
        for i, y in enumerate(batch.relation):
            each.append((3, -F.log_softmax(cosines[i] / 0.1, 0)[y]))
        for task, loss in each:
            sums[task], counts[task] = sums[task] + loss, counts[task] + 1
    losses = [one / count for one, count in zip(sums, counts, strict=True)]
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    apart = [
        torch.autograd.grad(one, list(learned.values()), retain_graph=True, allow_unused=True)
        for one in losses
    ]
    rows = [
        [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(one, learned.values(), strict=True)
        ]
        for one in apart
    ]
    flat = torch.stack([torch.cat([g.reshape(-1) for g in one]) for one in rows]).double()
    whole = [
        sum(w * g for w, g in zip(WEIGHTS, each, strict=True)) for each in zip(*rows, strict=True)
    ]
    return {
        "losses": [float(one.detach()) for one in losses],
        "state": {n: g.numpy() for n, g in zip(learned, whole, strict=True)},
        "gram": (flat @ flat.T).numpy(),
    }


@pytest.fixture(scope="module", params=["embeddings", "states"])
def compared(request, folder) -> tuple[dict[str, Any], list[dict[int, Any]]]:
    overrides = (STATES,) if request.param == "states" else ()
    return reference(folder, *overrides), run_distributed(gradients, 2, str(folder), *overrides)


@pytest.mark.parametrize("zero", STAGES)
def test_the_update_is_that_of_plain_autograd(compared, zero):
    wanted, ranks = compared
    found = ranks[0][zero]
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=2e-6)
    assert set(found["state"]) == set(wanted["state"])
    top = max(np.abs(g).max() for g in wanted["state"].values())
    for name, gradient in wanted["state"].items():
        np.testing.assert_allclose(found["state"][name], gradient, atol=2e-6 * top, err_msg=name)
    scale = np.abs(wanted["gram"]).max()
    for rank in ranks:
        np.testing.assert_allclose(rank[zero]["gram"], wanted["gram"], atol=1e-5 * scale)


@pytest.fixture(scope="module")
def ended(folder) -> Path:
    config_of(folder, balancer="{name: CoBa, window: 3, warmup: 1}")
    runs.train(folder / "x0.yaml", f"output={folder}/whole", world=2).well()
    return folder


def test_resume_within_an_epoch_draws_the_same(ended):
    whole, half = ended / "whole", ended / "half"
    shutil.copytree(whole, half)
    kept = half / "checkpoints"
    shutil.rmtree(kept / "step-00000006")
    (kept / "latest").write_text("step-00000003")
    shutil.rmtree(half / "model")
    runs.train(ended / "x0.yaml", f"output={half}", world=2, resume=True).well()
    assert runs.untimed(half) == runs.untimed(whole)
    assert (
        load_file(half / "model/knowledge.safetensors").keys()
        == load_file(whole / "model/knowledge.safetensors").keys()
    )


def test_checkpoints_hold_what_learns_and_the_export_scores_the_same(ended):
    run = ended / "whole"
    names = set(load_file(run / "model/knowledge.safetensors"))
    assert names and not any(name.startswith(("plm.", "vocabulary.weight")) for name in names)
    shard = next((run / "checkpoints/step-00000006/engine").glob("*model_states.pt"))
    held = torch.load(shard, weights_only=False)["module"]
    assert set(held) == names
    lines = [line for line in runs.metrics(run) if "eval/accuracy" in line]
    best = max(lines, key=lambda line: line["eval/accuracy"])
    note = json.loads((run / "model/loader.json").read_text())
    assert note["class"] == "mtl.recipes.kpe.model:Knowledgeable" and note["loader"] == "kpe"
    model = mtl.load(run / "model")
    assert 'mtl.load(".")' in (run / "model/README.md").read_text()
    _, data, _ = parts(ended)
    for number, task in enumerate("ab"):
        split = data.tasks[number].validation
        rows = [
            [Piece(number, split.columns(n), f"0/validation/{number}/{n}")]
            for n in range(len(split))
        ]
        made = data.examples[0].collate(rows, packed=False, most=1, tokens=512)
        with torch.no_grad():
            terms = data.goals.as_one(model, made, 4)
        loss = float(terms.sums[number] / terms.counts[number])
        assert loss == pytest.approx(best[f"eval/{task}/loss"], rel=1e-5)
        right, every = terms.measures["accuracy"][number].tolist()
        assert right / every == pytest.approx(best[f"eval/{task}/accuracy"])
    again = config_of(ended, f"model.name={run}/model")
    loaded = plugins.loader(again)(again, data.tokenizer, data.examples, empty=False)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    wide = config_of(
        ended, f"model.name={run}/model", "model.loader={name: kpe, width: 32, heads: 2}"
    )
    with pytest.raises(ConfigError, match="found width: 32, wanted 16, as .* was trained"):
        plugins.loader(wide)(wide, data.tokenizer, data.examples, empty=True)


# --- what is wrong is reported


def good() -> dict[str, Any]:
    return row(np.random.default_rng(3))


@pytest.mark.parametrize(
    "change, reason, text",
    [
        ({"options": None}, "no options", "options: found None, wanted a list of two texts or more"),
        ({"options": ["x"]}, "no options", "wanted a list of two texts or more"),
        ({"answer": 9}, "answer out of range", r"answer: found 9, wanted a number, 0 to \d"),
        ({"answer": True}, "answer out of range", "answer: found True"),
        ({"knowledge": []}, "no knowledge", "wanted a list of one or more"),
        ({"knowledge": [{"text": "a b", "head": "c", "tail": "b", "relation": "is"}]},
         "span not in text", "knowledge.0.head: found 'c', which is not in 'a b'"),
        ({"knowledge": [{"text": "ab b", "head": "b", "tail": "a", "relation": "is"}]},
         "span not in text", "knowledge.0.tail: found 'a', which is not in 'ab b'"),
        ({"knowledge": [{"text": "a a", "head": "a", "tail": "a"}]}, "bad value", "wanted head, tail and relation"),
        ({"knowledge": [{"text": "a", "option": 0}]}, "no knowledge", "found no item for option 1"),
        ({"knowledge": [{"text": "a", "option": 0}, {"text": "b"}]}, "bad value", "with and without option"),
        ({"knowledge": [{"text": "a", "option": 7}]}, "bad value", "knowledge.0.option: found 7"),
        ({"question": None}, "missing key", "wanted question"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used(change, reason, text):
    with pytest.raises(RowProblem, match=text) as caught:
        choices({**good(), **change})
    assert caught.value.reason == reason


def test_special_text_in_knowledge_is_said_refused_or_plain(folder):
    def made(policy: str, said: dict[str, int]) -> Any:
        config = config_of(folder, f"batch.special_text={policy}")
        (examples,) = build.encode(config, say=lambda text: None).examples
        return examples.encode(example, said.__setitem__)

    example, said = choices({**good(), "knowledge": [{"text": "a<|end|>"}]}), {}
    ids = toys.tokenizer()("a<|end|>")["input_ids"]
    assert made("keep", said).columns["known"].tolist() == ids
    assert said == {
        "rows with the text of <|end|> in them, which becomes that token (batch.special_text)": 1
    }
    with pytest.raises(RowProblem, match="found the text of"):
        made("refuse", {})
    ids, said = toys.tokenizer()("a<|end|>", split_special_tokens=True)["input_ids"], {}
    assert made("plain", said).columns["known"].tolist() == ids and said == {}


def test_a_repeated_word_has_two_places():
    (item,) = choices({**good(), "knowledge": [
        {"text": "A cat, a Cat!", "head": "cat", "tail": "cat", "relation": "is"}]}).items  # fmt: skip
    assert (item.head, item.tail) == ((2, 5), (9, 12))


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["model.activation_checkpointing=true"], "model.activation_checkpointing: found true, wanted false"),
        (["model.lora={r: 4}"], "model.lora: found a value, wanted null with model.loader: kpe"),
        (["model.loader.layers=4"], "which has 3 blocks, wanted 4 at least"),
        (["model.loader.start=somewhere"], "wanted zero, embeddings or states"),
        (["model.loader.width=15"], "model.loader.width: found 15, wanted a multiple of heads, 2"),
        (["model.loader.dropout=1.0"], "wanted 0 to 1, less than 1"),
    ],
)  # fmt: skip
def test_what_the_loader_refuses(folder, overrides, wanted):
    with pytest.raises((ConfigError, ModelError), match=re.escape(wanted)):
        parts(folder, *overrides)


def test_what_the_objective_refuses(folder):
    with pytest.raises(ConfigError, match="KPE refuses it: tau: found 0.0, wanted more than 0"):
        config_of(folder, "objective={name: kpe, tau: 0.0}")
    with pytest.raises(ConfigError, match="Did you mean span"):
        config_of(folder, "tasks.span.loss=spam")
    lines = [json.dumps({**good(), "knowledge": [{"text": "a b c"}]})] * 4
    (folder / "bare.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="tasks.relation: found no item with a relation in the"):
        parts(folder, *(f"tasks.b.{key}={folder}/bare.jsonl" for key in ("train", "validation")))


def test_an_encoder_with_a_decoder_is_refused(folder):
    from transformers import T5Config, T5Model

    sizes = {
        "vocab_size": 259,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    toys.save(T5Model(T5Config(**sizes)), folder / "t5")
    with pytest.raises(ModelError, match="an encoder with a decoder, wanted one of them alone"):
        parts(folder, "model.loader.layers=1", model="t5")


def test_the_check_shows_rows_and_memory(folder):
    config, data, _ = parts(folder)
    made = plugins.loader(config)(config, data.tokenizer, data.examples, empty=True)
    assert all(p.is_meta for p in made.parameters())
    shown = data.examples[0].show(data.tasks[1].train.columns(0), color=False)
    assert shown.count("\n  knows") == 6 and shown.count("* ") == 1 and "[" in shown
