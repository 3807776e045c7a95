"""The recipe ZeroAE: texts without labels, a classifier and a generator that feed each other."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import toys
import yaml
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoTokenizer, BertForSequenceClassification

import mtl
from mtl import build, plugins
from mtl.config import ConfigError
from mtl.data.examples import Piece
from mtl.data.formats import Labeled, RowProblem
from mtl.models.errors import ModelError
from mtl.recipes.zeroae import baselines, measures, rounds
from mtl.recipes.zeroae.model import Reverse

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["alpha", "beta", "gamma"]
YAML = """\
model: {{name: {folder}/{decoder}, loader: {{name: zeroae, size: 8, latent: 4, dropout: 0.0}}, precision: fp32}}
objective: {{name: zeroae_classify, encoder: {folder}/bert, labels: {folder}/labels.json, prompt: "{{label}}"}}
tasks:
  pseudo: {{train: {folder}/rows.jsonl, validation: {folder}/rows.jsonl, format: labeled}}
  generated: {{train: {folder}/rows.jsonl, validation: {folder}/rows.jsonl, format: labeled}}
  recon:
    train: {folder}/rows.jsonl
    validation: {folder}/rows.jsonl
    format: labeled
    objective:
      {{name: zeroae_generate, encoder: {folder}/bert, labels: {folder}/labels.json, prompt: "{{label}}", codes: 5}}
batch: {{examples: 12, tokens: 1024, max_length: 64}}
mix: {{shares: equal}}
train: {{steps: 4}}
optimizer: {{lr: 1.0e-3}}
balancer: {{name: Apart, parts: {{c: [pseudo, generated], g: [recon]}}, balancer: {{name: CoBa, window: 3, warmup: 1}}}}
evaluate: {{every: 4, probe: {{every: 2, groups: 2}}}}
checkpoint: {{best: false}}
export: {{which: last}}
engine: {{zero: 2}}
output: {folder}/run
cache: {folder}/cache
"""
DECODERS = pytest.mark.parametrize("decoder", ["llama", "gpt2"])


def texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of three classes whose words begin with the class's own letter."""
    draw, found = np.random.default_rng(seed), []
    for i in range(n):
        name = NAMES[i % 3]
        words = [name[0] * 2 + "".join(draw.choice(list("xyz"), 3)) for _ in range(3)]
        found.append((" ".join(words), name))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zeroae")
    toys.save(toys.tiny_bert(), root / "bert")
    toys.save(toys.tiny_llama(), root / "llama")
    toys.save(toys.tiny_gpt2(), root / "gpt2")
    (root / "labels.json").write_text(json.dumps(NAMES))
    toys.write_rows(root / "rows.jsonl", [{"text": t, "label": n} for t, n in texts(24)])
    toys.write_rows(root / "pool.jsonl", [{"text": t} for t, _ in texts(30, 1)])
    toys.write_rows(root / "valid.jsonl", [{"text": t} for t, _ in texts(12, 2)])
    return root


def config_of(folder: Path, *overrides: str, decoder: str = "llama") -> Any:
    path = folder / f"{decoder}.yaml"
    path.write_text(YAML.format(folder=folder, decoder=decoder))
    return plugins.read(str(path), overrides)


def parts(folder: Path, *overrides: str, decoder: str = "llama") -> tuple[Any, Any, Any]:
    """Config, data and model; the map from codes to keys and values away from 0."""
    config = config_of(folder, *overrides, decoder=decoder)
    data = build.encode(config, say=lambda text: None)
    torch.manual_seed(1)
    model = plugins.loader(config)(config, data.tokenizer, data.examples, empty=False).eval()
    with torch.no_grad():
        model.inject[1].weight += torch.randn_like(model.inject[1].weight)
    return config, data, model


def batch_of(data: Any, stream: int, numbers: list[int]) -> Any:
    rows = [
        [Piece(stream, data.tasks[stream].train.columns(n), f"0/train/0/{stream}/{n}")]
        for n in numbers
    ]
    examples = data.examples[data.goals.of[stream]]
    return examples.collate(rows, packed=False, most=1, tokens=4096)


# --- the model


@DECODERS
def test_the_model_begins_as_the_bare_language_model(folder, decoder):
    _, data, model = parts(folder, decoder=decoder)
    with torch.no_grad():
        model.inject[1].weight.zero_()
    batch = batch_of(data, 2, [0, 4])
    found = data.goals.each[1](model, batch, 3)
    begin = torch.full((2, 1), model.options.begin)
    bare = toys_model(folder, decoder)
    logits = bare(
        input_ids=torch.cat([begin, batch.decoder_ids], 1),
        attention_mask=torch.cat([torch.ones_like(begin), batch.decoder_mask], 1),
    ).logits
    at = logits[batch.at[:, 0], batch.at[:, 1] + 1]
    wanted = F.cross_entropy(at, batch.labels, reduction="sum")
    assert found.sums[2].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.counts.tolist() == [0, 0, len(batch.labels)] == batch.counts(3).tolist()


def toys_model(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name).eval()


@DECODERS
def test_sampling_is_teacher_forcing_and_follows_the_code(folder, decoder):
    _, data, model = parts(folder, decoder=decoder)
    with torch.no_grad():
        for p in model.decoder.parameters():  # else one token is the likeliest everywhere
            p += 0.2 * torch.randn_like(p)
    prompt, codes = data.examples[1].prompt(0), torch.tensor([0, 1, 2])
    draw = torch.Generator().manual_seed(0)
    rows = model.sample(prompt, codes, draw, end=-1, top_k=1, most=9)
    assert rows == [None] * 3  # no end: cut
    made = [model.sample(prompt, codes[i : i + 1], draw, end=end, top_k=1, most=9)
            for i in range(3) for end in range(259)]  # fmt: skip
    ended = [one[0] for one in made if one[0] is not None]
    longest = {i: max((o[0] for o in made[259 * i : 259 * i + 259] if o[0] is not None), key=len)
               for i in range(3)}  # fmt: skip
    assert ended and len({tuple(row) for row in longest.values()}) > 1
    for i, row in longest.items():
        ids = torch.tensor([[*prompt, *row]])
        states = model._decode(ids, torch.ones_like(ids), model.book[codes[i : i + 1]])
        guesses = model.decoder.get_output_embeddings()(states)[0].argmax(-1)
        assert guesses[len(prompt) - 1 : -1].tolist() == row


def test_a_loss_does_not_depend_on_padding(folder):
    _, data, model = parts(folder)
    goal = data.goals.each[1]
    with torch.no_grad():
        whole = goal(model, batch_of(data, 2, [0, 1, 2, 3]), 3).sums[2]
        alone = sum(goal(model, batch_of(data, 2, [n]), 3).sums[2] for n in range(4))
    assert float(whole) == pytest.approx(float(alone), rel=1e-5)


def test_the_divergence_has_its_closed_forms(folder):
    _, data, model = parts(folder)
    batch = batch_of(data, 2, [0, 1])
    with torch.no_grad():
        model.to_code.weight.zero_()
        model.to_code.bias.zero_()
        inputs = {n: getattr(batch, n) for n in data.goals.each[1].INPUTS}
        assert model.recover(**inputs)[1].tolist() == pytest.approx([0, 0], abs=1e-6)
        model.to_code.bias[3] = 1000.0
        assert model.recover(**inputs)[1].tolist() == pytest.approx([math.log(5)] * 2, rel=1e-6)


def test_each_part_has_its_own_parameters(folder):
    _, data, model = parts(folder)
    model.train()
    for goal, stream, mine in (
        (0, 0, ("encoder.", "scale")),
        (1, 2, ("codes.", "to_code.", "book", "inject.", "judge.", "decoder.")),
    ):
        model.zero_grad()
        terms = data.goals.each[goal](model, batch_of(data, stream, list(range(9))), 3)
        (terms.sums.sum() + sum(terms.penalties.values())).backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched and all(name.startswith(mine) for name in touched)
        if goal:  # straight through: the code's logits learn
            assert {"to_code.weight", "book", "inject.0.weight", "judge.0.weight"} <= touched
            assert any(name.startswith("decoder.model.layers.1.") for name in touched)
            assert not any(name.startswith("decoder.model.layers.0.") for name in touched)


def test_the_reversed_gradient_is_minus_the_adversarys():
    z = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    (z @ weight).sum().backward()
    plain = z.grad.clone(), weight.grad.clone()
    z.grad = weight.grad = None
    (Reverse.apply(z) @ weight).sum().backward()
    assert torch.equal(z.grad, -plain[0]) and torch.equal(weight.grad, plain[1])


def test_pairs_are_a_right_and_a_wrong_prompt(folder):
    config, data, model = parts(folder)
    batch = batch_of(data, 0, list(range(12)))
    scores = model.pairs(
        batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.text, batch.prompt
    )
    reader = rounds.Reader(config)
    every = reader.scores(model, [t for t, _ in texts(24)[:12]])
    classes = batch.prompt - 12
    np.testing.assert_allclose(scores.detach(), every[batch.text, classes], rtol=1e-4, atol=1e-4)
    right = torch.tensor([NAMES.index(n) for _, n in texts(24)[:12]])
    assert torch.equal(classes[::2], right) and (classes[1::2] != right).all()
    terms = data.goals.each[0](model, batch, 3)
    wanted = F.binary_cross_entropy_with_logits(scores, batch.right, reduction="sum")
    assert terms.sums[0].item() == pytest.approx(wanted.item())
    assert terms.counts[0] == 24


def test_cross_scores_read_prompt_and_text_together(folder):
    cross = "objective.scorer=cross"
    config, data, model = parts(folder, cross)
    batch = batch_of(data, 0, [0, 1])
    reader = rounds.Reader(config)
    every = reader.scores(model, [t for t, _ in texts(24)[:2]])
    scores = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids, text=batch.text, prompt=batch.prompt,
    ).detach()  # fmt: skip
    assert scores[::2].tolist() == pytest.approx([every[0, 0], every[1, 1]], rel=1e-4)


def save_nli(folder: Path, labels: list[str], pair: str) -> list[str]:
    """A tiny NLI model whose tokenizer has special tokens; the overrides that take it."""
    config = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    model = toys.tiny_bert(BertForSequenceClassification, **config)
    with torch.no_grad():  # far enough from 0 for token types and order to count
        for p in model.parameters():
            p.mul_(8)
    model.save_pretrained(folder)
    tokenizer = toys.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|unused|>", pair=pair,
        special_tokens=[("<|start|>", 256), ("<|unused|>", 258)],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return [
        f"objective.encoder={folder}", "objective.scorer=cross",
        f"tasks.recon.objective.encoder={folder}",
    ]  # fmt: skip


BERT_PAIR = "<|start|> $A <|unused|> $B:1 <|unused|>:1"
ROBERTA_PAIR = "<|start|> $A <|unused|> <|unused|> $B <|unused|>"


@pytest.mark.parametrize("labels, pair, at", [
    (["entailment", "neutral", "contradiction"], BERT_PAIR, (0, 2)),
    (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ROBERTA_PAIR, (2, 0)),
    (["not_entailment", "entailment"], BERT_PAIR, (1, 0)),
])  # fmt: skip
def test_cross_begins_with_an_nli_models_own_head(folder, tmp_path, labels, pair, at):
    config, data, model = parts(folder, *save_nli(tmp_path, labels, pair))
    nli = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [t for t, _ in texts(24)[:3]]
    with torch.no_grad():
        logits = [[nli(**tokenizer(t, n, return_tensors="pt")).logits[0] for n in NAMES]
                  for t in rows]  # fmt: skip
    wanted = np.array([[float(one[at[0]] - one[at[1]]) for one in each] for each in logits])
    assert np.ptp(wanted) > 0.1
    found = rounds.Reader(config).scores(model, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    model.train()
    terms = data.goals.each[0](model, batch_of(data, 0, [0, 1]), 3)
    terms.sums.sum().backward()
    assert model.encoder.classifier.weight.grad.abs().sum() > 0


def test_an_nli_model_whose_labels_say_nothing_is_refused(folder, tmp_path):
    wanted = "found LABEL_0, LABEL_1, wanted entailment and contradiction"
    with pytest.raises(ModelError, match=wanted):
        parts(folder, *save_nli(tmp_path, ["LABEL_0", "LABEL_1"], BERT_PAIR))


def test_special_text_is_said_once_or_plain_to_both_models(folder):
    text, said = "aaxyz<|end|> b", {}
    for policy, options in (("keep", {}), ("plain", {"split_special_tokens": True})):
        _, data, _ = parts(folder, f"batch.special_text={policy}")
        ids = toys.tokenizer()(text, **options)["input_ids"]
        for examples in data.examples:
            said[policy] = []
            note = partial(lambda notes, *one: notes.append(one), said[policy])
            row = examples.encode(Labeled(text, NAMES[0]), note)
            assert row.columns["ids"].tolist() == ids
        assert row.columns["decoder"][-len(ids) - 1 : -1].tolist() == ids
    note = "rows with the text of <|end|> in them, which becomes that token (batch.special_text)"
    assert said == {"keep": [(note, 1)], "plain": []}


# --- choosing


def test_sure_texts_are_few_and_the_surest():
    scores = np.log(np.array([[0.95, 0.05], [0.6, 0.4], [0.97, 0.03], [0.1, 0.9], [0.45, 0.55]]))
    free = np.ones(5, bool)
    rows, classes = rounds.sure(scores, free, p=0.9, gap=2.0, most=1)
    assert rows.tolist() == [2] and classes.tolist() == [0]
    free[2] = False
    rows, classes = rounds.sure(scores, free, p=0.9, gap=2.0, most=5)
    assert rows.tolist() == [0] and classes.tolist() == [0]
    rows, _ = rounds.sure(scores, free, p=2.0, gap=0.0, most=5)
    assert sorted(rows.tolist()) == [0, 1, 3, 4]
    # Beside the others, the last two are rather of the second class.
    skewed = np.log(np.array([[0.999, 0.001], [0.95, 0.05], [0.99, 0.01]]))
    rows, classes = rounds.sure(skewed, np.ones(3, bool), p=0.9, gap=2.0, most=5)
    assert rows.tolist() == [0] and classes.tolist() == [0]


@pytest.mark.parametrize("least, rows, threshold", [
    (1, [0], 0.9), (2, [0, 1], 0.7), (3, [0, 1, 2], 0.6), (9, [0, 1, 2], 0.01),
])  # fmt: skip
def test_the_threshold_falls_until_enough_texts_are_there(least, rows, threshold):
    scores = np.log(np.array([[0.92, 0.08], [0.29, 0.71], [0.61, 0.39]]))
    found, at = rounds.select(scores, least)
    assert found.tolist() == rows and at == pytest.approx(threshold)


def test_written_texts_are_cleaned_and_told_of():
    made = ["new text here", "New  text here", "old one", None, "  ", "new text there"]
    kept, told = rounds.clean(made, ["Old one"])
    assert kept == ["New  text here", "new text there"]
    shares = {"lost": 2 / 6, "copied": 1 / 6, "doubled": 1 / 6, "distinct_2": 1.0}
    assert told == pytest.approx(shares)  # four word pairs, all different


def test_a_probe_finds_what_a_code_tells():
    classes = np.array([0, 0, 1, 1, 2, 2, 0, 0])
    assert measures.probe(classes + 3, classes) == (1.0, 0.5)
    assert measures.probe(np.zeros(8, int), classes) == (0.5, 0.5)
    # Code 2 stands in the first half alone: the most frequent class is named for it.
    assert measures.probe(np.array([2, 0, 0, 0]), np.ones(4, int)) == (1.0, 1.0)


# --- baselines


def test_baselines_find_classes_that_lie_apart():
    draw = np.random.default_rng(0)
    centres = baselines.unit(draw.normal(size=(3, 16)))
    labels = np.arange(90) % 3
    rows = baselines.unit(centres[labels] + 0.15 * draw.normal(size=(90, 16)))
    prompts = baselines.unit(centres + 0.25 * draw.normal(size=(3, 16)))
    for scores in (
        baselines.self_training(rows, prompts, share=0.1),
        baselines.prototypes(rows, prompts),
        baselines.supervised(rows, labels, 3),
    ):
        assert (scores.argmax(1) == labels).mean() > 0.95
    chance = baselines.supervised(rows, draw.permutation(labels), 3)
    assert (chance.argmax(1) == labels).mean() < 0.6
    assert np.allclose(baselines.without_prior(rows @ prompts.T).mean(0), 0)


def test_the_linear_head_ends_where_lbfgs_does():
    draw = np.random.default_rng(1)
    rows = baselines.unit(draw.normal(size=(60, 5)))
    labels = draw.integers(0, 3, 60)
    mine = baselines.softmax(baselines.linear(rows, labels, 3, 20000)(rows))
    x, y = torch.from_numpy(10 * rows), torch.from_numpy(labels)
    weight, bias = torch.zeros(3, 5, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
    each = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(each, max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + 0.5e-4 * (weight**2).sum()
        value.backward()
        return value

    solver.step(loss)
    theirs = (x @ weight.T + bias).softmax(1).detach().numpy()
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# --- rounds


PLAN = rounds.Plan(rounds=2, p=0.34, share=0.2, select=6, generate=4)


def go(folder: Path, out: Path, pool: Path, plan: rounds.Plan = PLAN, *sets: str) -> dict[str, str]:
    """The rounds, trained by forks of this process's own; the SHA-256 of all they wrote."""
    config_of(folder)
    train = [sys.executable, str(ROOT / "launch/train.py")]
    lines = list(rounds.classify(
        str(folder / "llama.yaml"), list(sets), pool, folder / "valid.jsonl", plan, out, train
    ))  # fmt: skip
    assert lines == [f"predictions: {out / 'predictions.jsonl'}"]
    found = {}
    for number in range(plan.rounds):
        note = json.loads((out / f"round-{number:02d}" / "round.json").read_text())
        found |= {f"{number}/{name}": digest for name, digest in note["sha256"].items()}
    return found


@pytest.fixture
def forked(monkeypatch):
    """Runs of `rounds` by forking, in a tenth of the time of a new process."""

    def run(command: list[str], check: bool) -> None:
        given = command[command.index("--config") + 1 :]
        sets = [given[i + 1] for i, one in enumerate(given) if one == "--set"]
        runs.train(Path(given[0]), *sets, resume=True).well()

    monkeypatch.setattr(rounds.subprocess, "run", run)


def test_no_label_of_a_text_is_read(folder, forked, tmp_path):
    first = go(folder, tmp_path / "a", folder / "pool.jsonl")
    assert len(first) == 6
    draw = np.random.default_rng(0)
    rows = [{"text": t, "label": str(draw.choice(NAMES))} for t, _ in texts(30, 1)]
    toys.write_rows(tmp_path / "pool.jsonl", rows)
    again = go(folder, tmp_path / "b", tmp_path / "pool.jsonl")
    assert first == again
    a, b = (load_file(tmp_path / n / "round-01/run/model/zeroae.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    one, two = ((tmp_path / n / "predictions.jsonl").read_bytes() for n in "ab")
    assert one == two and len(one.splitlines()) == 30


def test_a_killed_round_goes_on_where_it_was(folder, forked, tmp_path, monkeypatch):
    whole = go(folder, tmp_path / "a", folder / "pool.jsonl")
    # Killed while a round's files are written, and while its run trains.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/round-01/round.json").unlink()
    (tmp_path / "b/round-01/pseudo.jsonl").write_text("torn")
    shutil.rmtree(tmp_path / "b/round-01/run")
    for name in ("x.yaml", "validation.jsonl"):
        path = tmp_path / "b" / name
        path.write_text(path.read_text().replace(str(tmp_path / "a"), str(tmp_path / "b")))
    yaml = tmp_path / "b/round-00/x.yaml"
    yaml.write_text(yaml.read_text().replace(str(tmp_path / "a"), str(tmp_path / "b")))
    assert go(folder, tmp_path / "b", folder / "pool.jsonl") == whole
    a, b = (load_file(tmp_path / n / "round-01/run/model/zeroae.safetensors") for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rounds_of_another_call_are_not_gone_on_with(folder, forked, tmp_path):
    """Their model knows other texts."""
    plan, out = replace(PLAN, rounds=1), tmp_path / "a"
    go(folder, out, folder / "pool.jsonl", plan)
    go(folder, out, folder / "pool.jsonl", PLAN)  # a round more
    toys.write_rows(tmp_path / "pool.jsonl", [{"text": t} for t, _ in texts(30, 5)])
    for pool, other, sets in (
        (tmp_path / "pool.jsonl", PLAN, []),
        (folder / "pool.jsonl", replace(PLAN, p=0.4), []),
        (folder / "pool.jsonl", PLAN, ["train.steps=5"]),
    ):
        with pytest.raises(ValueError, match=r"round-00/round.json: found a round of other texts"):
            go(folder, out, pool, other, *sets)
    note = out / "round-00/round.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "key"}))
    with pytest.raises(ValueError, match="found a round of an earlier version"):
        go(folder, out, folder / "pool.jsonl", PLAN)


def test_a_round_without_a_sure_text_trains_on(folder, forked, tmp_path):
    plan = rounds.Plan(rounds=1, p=1.0, gap=1.0, select=6, generate=0)
    go(folder, tmp_path / "a", folder / "pool.jsonl", plan)
    note = json.loads((tmp_path / "a/round-00/round.json").read_text())
    assert note["rows"]["pseudo"] == 0 and note["rows"]["selected"] >= 6


def test_classes_of_words_of_their_own_are_told_apart(folder, forked, tmp_path):
    """The names' own letters give the start away; the rounds make it certain."""
    rows = [(" ".join([name] * 3), name) for name in NAMES for _ in range(2)]
    pool = tmp_path / "pool.jsonl"
    toys.write_rows(pool, [{"text": t + f" {i}"} for i, (t, _) in enumerate(rows)])
    gold = tmp_path / "gold.jsonl"
    toys.write_rows(gold, [{"text": t + f" {i}", "label": n} for i, (t, n) in enumerate(rows)])
    config_of(folder)
    plan = rounds.Plan(rounds=2, p=0.34, share=1.0, select=6, generate=2)
    sets = ["train.steps=30", "optimizer.lr=1e-3"]
    train = [sys.executable, str(ROOT / "launch/train.py")]
    _, score, *each = rounds.classify(
        str(folder / "llama.yaml"), sets, pool, folder / "valid.jsonl", plan, tmp_path / "o",
        train, [gold],
    )  # fmt: skip
    assert score == f"accuracy on {gold}: 1.0000 of 6 texts"
    told = json.loads((tmp_path / "o/gold.json").read_text())
    assert told["accuracy"] == {str(gold): 1.0} and len(told["rounds"]) == len(each) == 2
    truth = {row["text"]: row["label"] for row in rounds.read(gold)}
    for number, note in enumerate(told["rounds"]):
        part = tmp_path / f"o/round-{number:02d}"
        for name in "pseudo", "selected":
            rows = rounds.read(part / f"{name}.jsonl")
            right = [truth[row["text"]] == row["label"] for row in rows]
            assert note[name] == pytest.approx(np.mean(right))
        with np.load(part / "scores.npz") as kept:
            first = kept["scores"].argmax(1)
        right = [NAMES[c] == n for c, n in zip(first, truth.values(), strict=True)]
        assert note["accuracy"] == pytest.approx(np.mean(right))
        assert ("code_probe" in note) == (number > 0)
    counts = json.loads((tmp_path / "o/round-01/round.json").read_text())
    assert counts["code_chance"] <= 1 and "distinct_2" in counts


YIN = runpy.run_path(str(ROOT / "examples/yin.py"))


def test_yins_files_become_pool_and_labels(tmp_path):
    (tmp_path / "classes.txt").write_text("Arts & Music\nSports\n\n")
    (tmp_path / "test.txt").write_text("0\ta song\n1\ta goal\u2028scored\n1\ta race\n\n")
    (tmp_path / "dev.txt").write_text("0\ta tune\n")
    said = YIN["convert"](tmp_path, tmp_path / "o", {"Sports": "sport"})
    assert said == f"{tmp_path}/o: 3 texts of Arts & Music, sport; 0 of several labels left out"
    assert json.loads((tmp_path / "o/labels.json").read_text()) == ["Arts & Music", "sport"]
    assert rounds._texts(tmp_path / "o/valid.jsonl") == ["a tune"]
    gold = rounds.read(tmp_path / "o/pool.gold.jsonl")
    assert gold[1] == {"text": "a goal\u2028scored", "label": "sport"}
    assert rounds.read(tmp_path / "o/pool.jsonl") == [{"text": r["text"]} for r in gold]
    emotion, situation = tmp_path / "emotion.txt", tmp_path / "situation.txt"
    emotion.write_text("joy\ttweets\twhat a day\nnoemo\ttales\tonce\n")
    found = YIN["read"](emotion, {"noemo": "neutral"})
    assert found == ([("what a day", "joy"), ("once", "neutral")], 0)
    situation.write_text("water food\tall gone\nmed\tno doctor\n")
    assert YIN["read"](situation, {}) == ([("no doctor", "med")], 1)
    situation.write_text("med\tno doctor\nmed\n")
    with pytest.raises(ValueError, match="situation.txt:2: found 'med', wanted label, TAB, text"):
        YIN["read"](situation, {})


def test_the_gpu_configuration_runs_on_tiny_models(folder, forked, tmp_path):
    """Yin's files, GPT-2's form, an NLI model's head; the first round has no sure text."""
    for name, seed in ("test", 1), ("dev", 2):
        lines = (f"{NAMES.index(n)}\t{t}\n" for t, n in texts(18, seed))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    YIN["convert"](tmp_path, tmp_path, {})
    save_nli(tmp_path / "nli", ["entailment", "not_entailment"], BERT_PAIR)
    text = (ROOT / "configs/zeroae-gpu.yaml").read_text()
    for old, new in (
        ("openai-community/gpt2", folder / "gpt2"), ("data/topic", tmp_path),
        ("MoritzLaurer/deberta-v3-base-zeroshot-v2.0", tmp_path / "nli"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, str(new))
    (tmp_path / "gpu.yaml").write_text(text)
    sets = [
        "train.steps=4", "evaluate.every=4", "evaluate.probe.examples=4",
        "evaluate.probe.groups=2", "schedule.warmup=1",
        "balancer.balancer={name: CoBa, window: 3, warmup: 1}", "engine.zero=1",
        f"cache={tmp_path}/cache",
    ]  # fmt: skip
    plan = rounds.Plan(rounds=2, p=2.0, gap=2.0, select=6, generate=4)
    said = list(rounds.classify(
        str(tmp_path / "gpu.yaml"), sets, tmp_path / "pool.jsonl", tmp_path / "valid.jsonl", plan,
        tmp_path / "o", [sys.executable, "launch/train.py"], [tmp_path / "pool.gold.jsonl"],
    ))  # fmt: skip
    assert len(said) == 4 and said[1].endswith("of 18 texts")
    model = mtl.load(tmp_path / "o/round-01/run/model")
    assert model.options.scorer == "cross" and model.entails == (0, 1)
    first = json.loads((tmp_path / "o/round-00/round.json").read_text())
    assert first["rows"]["pseudo"] == 0


def test_two_processes_train_and_the_export_opens(folder, tmp_path):
    config_of(folder)
    runs.train(folder / "llama.yaml", f"output={tmp_path}/two", world=2).well()
    runs.train(folder / "llama.yaml", f"output={tmp_path}/one", world=1).well()
    for key in ("eval/recon/loss", "eval/pseudo/loss"):
        one, two = (runs.metrics(tmp_path / n) for n in ("one", "two"))
        ends = [[line[key] for line in lines if key in line][-1] for lines in (one, two)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    model = mtl.load(tmp_path / "two" / "model")
    state = load_file(tmp_path / "two/model/zeroae.safetensors")
    assert (
        torch.equal(model.book, state["book"]) and "decoder.model.embed_tokens.weight" not in state
    )


# --- the comparison


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/zeroae.py")))


def test_every_arm_is_a_configuration(arms, tmp_path):
    args = SimpleNamespace(data=tmp_path, steps=7, config=ROOT / "configs/zeroae.yaml")
    for arm in arms.ARMS:
        path = tmp_path / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(arms.config(arm, 3, args)))
        config = plugins.read(str(path), [])
        assert (config.train.steps, config.train.seed) == (7, 3)
        assert set(config.tasks) <= {"pseudo", "generated", "recon"}
    made = {arm: arms.config(arm, 0, args) for arm in arms.ARMS}
    assert list(made["pseudo"]["tasks"]) == ["pseudo"]
    assert made["equal"]["balancer"]["balancer"] == "Equal"
    assert made["no-adversary"]["tasks"]["recon"]["objective"]["gamma"] == 0


def test_the_table_compares_seed_by_seed(arms, tmp_path):
    base = {"cosine": {"pool": 0.6, "test": 0.5}}
    (tmp_path / "baselines.json").write_text(json.dumps(base))
    runs_of = {"coba": (0.7, 0.8), "pseudo": (None, 0.75), "equal": (0.66, 0.75)}
    each = [(arm, *one) for arm, found in runs_of.items() for one in enumerate(found) if one[1]]
    for arm, seed, pool in each:
        record = {
            "arm": arm, "seed": seed, "rounds": 2, "steps": 7,
            "accuracy": {"pool": pool, "test": 0.5},
            "each": [{"pseudo": 0.0}, {"pseudo": 0.9}],
        }  # fmt: skip
        (tmp_path / f"{arm}.{seed}.json").write_text(json.dumps(record))
    args = SimpleNamespace(output=tmp_path, rounds=2, steps=7)
    found = arms.table(args).splitlines()
    assert found[2].startswith("| cosine | | 0.600 | 0.500 | |")
    assert found[3].startswith("| coba | 2 | 0.750 | 0.500 |  | 0.900 |  |")
    # Student's: 12.706 deviations of the mean.
    assert found[4].startswith("| equal | 2 | 0.705 | 0.500 | -0.045 (-0.109 to +0.019) | 0.900 |")
    assert found[5].startswith("| pseudo | 1 | 0.750 | 0.500 | -0.050, one seed | 0.900 |")
    assert len({line.count("|") for line in found}) == 1


# --- what is wrong is reported


@pytest.mark.parametrize("names, text", [
    ([], "found the names \\[\\], wanted two or more"),
    (["a", "b", "a"], "found 'a' twice, wanted each name once"),
    ("a", "wanted a list of the classes' names"),
])  # fmt: skip
def test_names_that_cannot_be_used_are_refused(folder, tmp_path, names, text):
    (tmp_path / "labels.json").write_text(json.dumps(names))
    config = config_of(folder, f"objective.labels={tmp_path}/labels.json")
    with pytest.raises(ConfigError, match=text):
        build.encode(config, say=lambda text: None)


@pytest.mark.parametrize("override, text", [
    ("model.activation_checkpointing=true", "the code would be lost"),
    ("model.lora={r: 4}", "model.lora: found a value, wanted null"),
    ("model.loader.tau=0.0", "tau: found 0.0, wanted more than 0"),
    ("model.loader.size=0", "size: found 0, wanted a whole number"),
])  # fmt: skip
def test_settings_that_would_be_silently_wrong_are_refused(folder, override, text):
    config = config_of(folder, override)
    data = build.encode(config, say=lambda text: None)
    with pytest.raises(ConfigError, match=text):
        plugins.loader(config)(config, data.tokenizer, data.examples, empty=True)


@pytest.mark.parametrize("example, reason", [
    (Labeled(" ", "alpha"), "no target"),
    (Labeled("a", "delta"), "unknown class"),
    (Labeled("a", "alpha", "b"), "bad value"),
    (Labeled("a" * 99, "alpha"), "too long"),
])  # fmt: skip
def test_rows_that_cannot_be_used_are_refused(folder, example, reason):
    _, data, _ = parts(folder)
    for examples in data.examples:
        with pytest.raises(RowProblem) as caught:
            examples.encode(example)
        assert caught.value.reason == reason


@pytest.mark.parametrize("line", ["{", "", "[1]"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "pool.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"pool.jsonl:2: found .*, wanted a JSON object"):
        rounds._texts(tmp_path / "pool.jsonl")


def test_a_task_that_no_round_has_rows_for_is_refused(tmp_path):
    base = {"tasks": {"pseudo": {}, "gold": {}}}
    with pytest.raises(ValueError, match="tasks: found gold, wanted some of pseudo, generated"):
        rounds._yaml(tmp_path, base, tmp_path, dict.fromkeys(rounds.FILES, 1), None)


def test_labelled_files_are_looked_for_first_and_their_labels_last(folder, forked, tmp_path):
    plan, pool = replace(PLAN, rounds=1), folder / "pool.jsonl"
    config_of(folder)

    def done(gold: Path) -> list[str]:
        return list(rounds.classify(
            str(folder / "llama.yaml"), [], pool, folder / "valid.jsonl", plan, tmp_path / "a",
            [sys.executable, str(ROOT / "launch/train.py")], [gold],
        ))  # fmt: skip

    with pytest.raises(ValueError, match="gone.jsonl: found no such file"):
        done(tmp_path / "gone.jsonl")
    assert not (tmp_path / "a").exists()
    toys.write_rows(tmp_path / "odd.jsonl", [{"text": "a", "label": "delta"}])
    with pytest.raises(ValueError, match=r"odd.jsonl: found .*, wanted a text, and a label of alpha, beta"):
        done(tmp_path / "odd.jsonl")
    assert (tmp_path / "a/predictions.jsonl").is_file()


def test_a_pool_row_without_a_text_names_its_line(tmp_path):
    toys.write_rows(tmp_path / "pool.jsonl", [{"text": "a"}, {"title": "b"}])
    with pytest.raises(ValueError, match=r"pool.jsonl:2: found .*, wanted a row with a text"):
        rounds._texts(tmp_path / "pool.jsonl")
