"""Losses of any kind: three of one row, two objectives in a run, a classifier, rows that draw."""

import json
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
from huggingface_hub import ModelCard
from test_equivalence import exposed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

import mtl
from mtl import build, plugins
from mtl.compare import evaluation
from mtl.config import ConfigError
from mtl.data.examples import Piece
from mtl.distributed import comm
from mtl.losses.classification import macro_f1
from mtl.output.export import ExportError, export
from mtl.train import gram
from mtl.train.optimizer import parameter_groups
from mtl.train.step import fetch, train_step

STAGES = (0, 2, 3)
WEIGHTS = [0.4, 0.1, 0.2, 0.3]
THREE = """\
model: {{name: {folder}/model, precision: fp32}}
objective: three:Three
tasks:
  a: {{train: {folder}/a.jsonl, validation: {folder}/a.jsonl, format: text}}
  b: {{train: {folder}/b.jsonl, validation: {folder}/b.jsonl, format: text}}
  first: {{of: [a, b], loss: first}}
  drawn: {{of: [b], loss: drawn}}
batch: {{examples: 6, tokens: 64, max_length: 32}}
mix: {{shares: equal}}
train: {{steps: 8}}
optimizer: {{lr: 1.0e-2, clip: null}}
balancer: {balancer}
evaluate: {{every: 4, probe: {{every: 2, groups: 2}}}}
checkpoint: {{every: 3, keep: 9}}
engine: {{zero: {zero}, deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}}}
output: {folder}/run
cache: {folder}/cache
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("streams")
    toys.save(toys.tiny_llama(), root / "model")
    draw = np.random.default_rng(0)
    for name, rows in (("a", 12), ("b", 9)):
        texts = ["".join(draw.choice(list("abcdef"), draw.integers(4, 20))) for _ in range(rows)]
        toys.write_rows(root / f"{name}.jsonl", [{"text": text} for text in texts])
        labels = ["yes" if "a" in text else "no" for text in texts]
        labels[:2] = ["yes", "no"]
        pairs = zip(texts, labels, strict=True)
        rows = [{"text": text, "label": label} for text, label in pairs]
        toys.write_rows(root / f"{name}.labels.jsonl", rows)
    return root


def yaml_of(folder: Path, text: str = THREE, zero: int = 2, balancer: str = "Equal") -> Path:
    path = folder / f"x{comm.rank()}.yaml"  # a rank each: none reads what another writes
    path.write_text(text.format(folder=folder, zero=zero, balancer=balancer))
    return path


TWO = (
    THREE.replace("objective: three:Three\n", "")
    .replace("format: text}}\n  first", "format: text, objective: three:Three}}\n  first")
    .replace("of: [a, b], loss: first", "of: [b], loss: first")
)


def config_of(path: Path, *overrides: str) -> Any:
    return plugins.read(str(path), overrides, ["three", "outside"])


# --- on every rank


def gradients(folder: str, text: str) -> dict[int, dict[str, np.ndarray]]:
    """Of the first two global batches at each stage: the gradients that an optimizer is handed."""
    found = {}
    for zero in STAGES:
        config = config_of(yaml_of(Path(folder), text, zero))
        data = build.encode(config, ["three"], say=lambda text: None)
        run = exposed(config, data, ["three"])
        batch = fetch(lambda run=run: run.batches.batch(0), len(run.names))
        before = [len(run.batches.batch(0)), sum(micro.is_dummy for micro in batch.micros)]
        grams = {}
        if zero in (0, 3):
            parameters = list(run.engine.module.parameters())
            streams = run.batches.by_stream(0)
            tasks = [
                [micro for s in run.book.reads(k) for micro in streams[s]]
                for k in range(len(run.names))
            ]
            run.engine.train()
            mine = gram.gradients(run.engine, run.objective, tasks, parameters)
            grams = {"gram": gram.products(mine, mine)}
        report = train_step(run.engine, run.objective, batch, np.array(WEIGHTS), 0.0, run.names)
        state = {n: t.numpy() for n, t in run.engine.state_dict().items()}
        found[zero] = {"losses": report.losses, "state": state, "before": before, **grams}
        run.batches.close()
    return found


def reference(folder: Path, text: str) -> dict[str, Any]:
    """The same on one process in plain torch: each task's loss over all rows, and its gradient."""
    config = config_of(yaml_of(folder, text))
    data = build.encode(config, ["three"], say=lambda text: None)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    run_mix = build.mix_for(config, data.tasks)
    stream, row = run_mix.batch(0)
    k = len(config.tasks)
    sums, counts = [torch.zeros(()) for _ in range(k)], [0] * k
    names, streams = list(config.tasks), list(config.streams)

    def add(task: str, loss: torch.Tensor, count: int) -> None:
        i = names.index(task)
        sums[i], counts[i] = sums[i] + loss, counts[i] + count

    for s, n in zip(stream.tolist(), row.tolist(), strict=True):
        columns, name = data.tasks[s].train.columns(n), streams[s]
        ids = torch.from_numpy(columns["ids"].astype(np.int64))
        losses = F.cross_entropy(
            model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"
        )
        if "target" in columns:
            add(
                name,
                losses[torch.from_numpy(columns["target"][1:] > 0)].sum(),
                int(columns["target"].sum()),
            )
            continue
        add(name, losses.sum(), len(losses))
        if name in config.tasks["first"].of:
            add("first", losses[0], 1)
        if name in config.tasks["drawn"].of:
            drawn = Piece(s, columns, f"{config.train.seed}/train/0/{s}/{n}").rng
            add("drawn", losses[int(drawn.integers(len(ids) - 1))], 1)
    each = [total / count for total, count in zip(sums, counts, strict=True)]
    parameters = dict(model.named_parameters())
    apart = [
        torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True)
        for one in each
    ]
    flat = [
        torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.reshape(-1)
                for g, p in zip(one, parameters.values(), strict=True)
            ]
        )
        for one in apart
    ]
    whole = torch.autograd.grad(
        sum(w * one for w, one in zip(WEIGHTS, each, strict=True)), list(parameters.values())
    )
    rows = torch.stack(flat).double()
    return {
        "losses": [float(one.detach()) for one in each],
        "state": {n: g.numpy() for n, g in zip(parameters, whole, strict=True)},
        "gram": (rows @ rows.T).numpy(),
    }


@pytest.fixture(scope="module", params=["three losses of a row", "two objectives"])
def compared(request, folder) -> tuple[dict[str, Any], list[dict[int, Any]]]:
    text = {"three losses of a row": THREE, "two objectives": TWO}[request.param]
    return reference(folder, text), run_distributed(gradients, 2, str(folder), text)


@pytest.mark.parametrize("zero", STAGES)
def test_the_update_is_that_of_plain_autograd(compared, zero):
    wanted, ranks = compared
    np.testing.assert_allclose(ranks[0][zero]["losses"], wanted["losses"], rtol=2e-6)
    for name, gradient in wanted["state"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            ranks[0][zero]["state"][name], gradient, atol=2e-6 * scale + 1e-9
        )


@pytest.mark.parametrize("zero", (0, 3))
def test_the_gramian_of_shared_rows_is_that_of_separate_backwards(compared, zero):
    wanted, ranks = compared
    scale = np.abs(wanted["gram"]).max()
    for rank in ranks:
        np.testing.assert_allclose(rank[zero]["gram"], wanted["gram"], atol=1e-5 * scale)


def test_resume_is_exact_with_rows_that_draw(folder):
    yaml = yaml_of(folder, balancer="{name: CoBa, window: 3, warmup: 1}")
    whole, parts = folder / "whole", folder / "parts"
    runs.train(yaml, f"output={whole}").well()
    runs.train(yaml, f"output={parts}", world=1).well()
    last = "step-00000006"
    kept = parts / "checkpoints"
    for path in kept.glob("step-*"):
        if path.name > last:
            shutil.rmtree(path)
    (kept / "latest").write_text(last)
    runs.train(yaml, f"output={parts}", resume=True).well()
    assert runs.untimed(whole) == runs.untimed(parts)
    drawn = [line["train/drawn/loss"] for line in runs.metrics(whole) if "train/drawn/loss" in line]
    assert len(set(drawn)) == len(drawn) > 3
    two = folder / "two"
    runs.train(yaml, f"output={two}", "balancer=Equal", world=2).well()
    one = folder / "one"
    runs.train(yaml, f"output={one}", "balancer=Equal").well()
    for mine, other in zip(runs.metrics(one), runs.metrics(two), strict=True):
        for tag in ("train/drawn/tokens", "train/a/tokens", "train/first/tokens"):
            assert mine.get(tag) == other.get(tag)
        if "train/drawn/loss" in mine:
            assert mine["train/drawn/loss"] == pytest.approx(other["train/drawn/loss"], rel=1e-3)


# --- classification

LABELS = """\
model: {{name: {folder}/bert, loader: sequence_classification, precision: fp32}}
objective: classification
tasks:
  a: {{train: {folder}/a.labels.jsonl, validation: {folder}/a.labels.jsonl, format: labeled}}
  b:
    train: {folder}/b.labels.jsonl
    validation: {folder}/b.labels.jsonl
    format: {{name: labeled, labels: ["yes", "no", maybe]}}
batch: {{examples: 6, tokens: 128, max_length: 32}}
mix: {{shares: equal}}
train: {{steps: 6}}
optimizer: {{lr: 1.0e-3, scale: {{classifier: 3.0}}}}
balancer: {balancer}
evaluate: {{every: 2, best: accuracy, probe: {{every: 2, groups: 2}}}}
engine: {{zero: {zero}}}
output: {folder}/labels
cache: {folder}/cache
"""


@pytest.fixture(scope="module")
def bert(folder) -> Path:
    toys.save(toys.tiny_bert(BertForSequenceClassification), folder / "bert")
    return folder


def test_classification_is_transformers_own_loss(bert):
    config = config_of(yaml_of(bert, LABELS))
    data = build.encode(config, say=lambda text: None)
    assert data.examples[0].labels == {"a": ["no", "yes"], "b": ["yes", "no", "maybe"]}
    model = plugins.loader(config)(config, data.tokenizer, data.examples, empty=False).eval()
    assert model.config.num_labels == 5 and model.config.id2label[4] == "b: maybe"
    stream, row = np.array([0, 0, 1, 0]), np.array([0, 1, 0, 3])
    layout = build.layouts_for(config, data.tasks, data.examples, data.goals.of, 1, 0, False, 128)
    splits = [task.train for task in data.tasks]
    ((_, micro, most),) = layout.deal(splits, stream, row)
    batch = layout.each[0].collate(micro, most, splits, stream, row)
    terms = data.goals.as_one(model, batch, 2)
    only = (batch.task == 0).nonzero().flatten()
    first = AutoModelForSequenceClassification.from_pretrained(bert / "bert", num_labels=2)
    first.eval().load_state_dict(model.state_dict() | {
        "classifier.weight": model.classifier.weight[:2], "classifier.bias": model.classifier.bias[:2]
    })  # fmt: skip
    theirs = first(
        input_ids=batch.input_ids[only], attention_mask=batch.attention_mask[only],
        labels=batch.label[only],
    )  # fmt: skip
    assert float(terms.sums[0].detach()) / 3 == pytest.approx(float(theirs.loss.detach()), rel=1e-6)
    assert terms.counts.tolist() == batch.counts(2).tolist() == [3, 1]
    right = int((theirs.logits.argmax(-1) == batch.label[only]).sum())
    assert terms.measures["accuracy"][0].tolist() == [right, 3]


def test_macro_f1_by_hand():
    # Two labels: 3 of 4 and 1 of 2 right; F1 = 6 / (6 + 1 + 1) and 2 / (2 + 1 + 1).
    assert macro_f1(np.array([3, 1, 1, 1, 1, 1.0])) == pytest.approx((6 / 8 + 2 / 4) / 2, abs=1e-15)
    assert macro_f1(np.array([3, 0, 1, 0, 1, 0.0])) == pytest.approx(6 / 8, abs=1e-15)
    assert np.isnan(macro_f1(np.zeros(6)))


def test_a_classifier_trains_and_its_export_is_transformers_own(bert):
    yaml = yaml_of(bert, LABELS, balancer="{name: CoBa, window: 2, warmup: 1}")
    runs.train(yaml, world=2).well()
    passes = [line for line in runs.metrics(bert / "labels") if "eval/accuracy" in line]
    values = [line["eval/accuracy"] for line in passes]
    mean = (passes[0]["eval/a/accuracy"] + passes[0]["eval/b/accuracy"]) / 2
    assert values[0] == pytest.approx(mean) and "eval/a/macro_f1" in passes[0]
    best = int(np.argmax(values))
    state = json.loads(next((bert / "labels/checkpoints").glob("step-*/state.json")).read_text())
    assert state["run"]["best"]["value"] == pytest.approx(values[best])
    made = mtl.load(bert / "labels/model")
    assert type(made) is BertForSequenceClassification and made.config.id2label[0] == "a: no"
    card = ModelCard((bert / "labels/model/README.md").read_text())
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert "nats per example" in card.text

    # launch/evaluate.py has what the run itself measured of that model, in table and JSON.
    config = config_of(yaml)
    data, names = evaluation.rows(config, "validation"), list(config.tasks)
    found = {"best": evaluation.evaluator(config, data)(bert / "labels/model")}
    record = json.loads(evaluation.record(found, names, data, "validation"))
    assert record["unit"] == "nats per example"
    measures = record["models"]["best"]["measures"]
    for name in ("a/accuracy", "b/accuracy", "accuracy", "b/macro_f1", "macro_f1"):
        assert measures[name] == pytest.approx(passes[best][f"eval/{name}"]), name
    losses, of_losses, accuracy, of_accuracy, *_ = evaluation.table(found, names, data)
    assert losses == ["nats per example", "a", "b", "macro", "token"]
    assert accuracy == ["accuracy", "a", "b", "mean", ""]
    assert of_accuracy[1:4] == [
        f"{measures[k]:.4f}" for k in ("a/accuracy", "b/accuracy", "accuracy")
    ]
    assert of_losses[1] == f"{passes[best]['eval/a/loss']:.4f}"


def test_an_adapter_of_a_classifier_opens_with_its_labels(bert):
    yaml = yaml_of(bert, LABELS.replace("fp32}}", "fp32, lora: {{target_modules: [query]}}}}", 1))
    settings = ["train.steps=1", "evaluate.every=1", f"output={bert}/adapter", "optimizer.scale={}"]
    runs.train(yaml, *settings).well()
    made = mtl.load(bert / "adapter/model")
    assert made.config.num_labels == 5 and made.config.id2label[4] == "b: maybe"
    checkpoint = next((bert / "adapter/checkpoints").glob("step-*"))

    # Added up, measured and merged it is the model whose losses the run logged.
    export(checkpoint, bert / "merged", merge=True)
    logged = [line for line in runs.metrics(bert / "adapter") if "eval/a/loss" in line][-1]
    config = config_of(yaml)
    data, names = evaluation.rows(config, "validation"), list(config.tasks)
    evaluate = evaluation.evaluator(config, data)
    for folder in (checkpoint / "model", bert / "merged"):
        found = evaluate(folder)
        losses = [found.summary(names)[name] for name in names]
        assert losses == pytest.approx([logged[f"eval/{n}/loss"] for n in names], rel=1e-5)
    settings = json.loads((bert / "adapter/model/adapter_config.json").read_text())
    (bert / "other.json").write_text(json.dumps({**settings, "task_type": "TOKEN_CLS"}))
    shutil.copy(bert / "other.json", checkpoint / "model" / "adapter_config.json")
    with pytest.raises(ExportError, match="found an adapter of type TOKEN_CLS"):
        export(checkpoint, bert / "no", merge=True)


@pytest.mark.parametrize(
    "text, overrides, wanted",
    [
        (TWO.replace("three:Three", "classification"), ["balancer=Tokens"], "found Tokens, where tasks count examples and target tokens"),
        (TWO.replace("three:Three", "classification"), ["evaluate.best=token"], "found token, where tasks count examples and target tokens"),
        (THREE, ["tasks.first.of=[a, drawn]"], "tasks.first.of.1: found 'drawn', wanted tasks with rows: a or b"),
        (THREE, ["tasks.first.loss=frist"], "tasks.first.loss: found 'frist', wanted next, first or drawn. Did you mean first?"),
        (THREE, ["tasks.drawn.loss=first"], "found the loss first of b, which is the task first, wanted another loss"),
        (THREE, ["tasks.first.train=x"], "tasks.first.train: found"),
        (THREE, ["tasks.a.format=null"], "tasks.a.format: found nothing"),
        (THREE, ["evaluate.best=acuracy"], "evaluate.best: found 'acuracy'"),
        (LABELS, ["evaluate.best=acuracy"], "Did you mean accuracy?"),
        (THREE, ["optimizer.scale={'(': 2.0}"], "wanted a regular expression"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, text, overrides, wanted):
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        config_of(yaml_of(folder, text), *overrides)


def test_a_classifier_holds_out_a_part_and_looks_for_special_tokens(folder, bert):
    lines = [f'{{"text": "row {i}", "label": {i % 2}, "id": {i}}}' for i in range(40)]
    special = toys.tokenizer().eos_token
    (folder / "held.jsonl").write_text("\n".join([*lines, f'{{"text": "z{special}", "label": 1}}']))
    changes = [f"tasks.a.train={folder}/held.jsonl", "tasks.a.validation=25%"]
    said: list[str] = []
    a, b = build.encode(config_of(yaml_of(bert, LABELS), *changes), say=said.append).tasks
    assert f"{len(a.train)} examples" in a.train.problems()[0]
    rows = [bytes(split.ids(i)) for split in (a.train, a.validation) for i in range(len(split))]
    assert len(rows) == len({*rows}) == 41 and 4 <= len(a.validation) <= 18
    notes = [split.report.notes for split in (a.train, a.validation)]
    token = (
        f"rows with the text of {special} in them, which becomes that token (batch.special_text)"
    )
    assert sum(one.get(token, 0) for one in notes) == 1
    assert sum(one.get("rows with the key id, which nothing reads", 0) for one in notes) == 40
    # The other task validates on its training rows.
    n = len(b.train)
    assert b.shared == n and list(b.reports())[1][2][-1].startswith(f"{n} of {n} rows are among")
    refused = config_of(yaml_of(bert, LABELS), *changes, "batch.special_text=refuse")
    a, _ = build.encode(refused, say=said.append).tasks
    assert len(a.train) + len(a.validation) == 40
    plain = config_of(yaml_of(bert, LABELS), *changes, "batch.special_text=plain")
    a, _ = build.encode(plain, say=said.append).tasks
    rows = [split.ids(i).tolist() for split in (a.train, a.validation) for i in range(len(split))]
    assert toys.tokenizer()(f"z{special}", split_special_tokens=True)["input_ids"] in rows
    assert not any(token in one.report.notes for one in (a.train, a.validation))


def test_packing_is_refused_where_the_objective_cannot(folder):
    config = config_of(yaml_of(folder), "batch.packing=true")
    with pytest.raises(ConfigError, match="batch.packing: found true, with an objective"):
        build.encode(config, ["three"], say=lambda text: None)


def test_an_objective_that_counts_otherwise_names_both_numbers(folder):
    ended = runs.train(
        yaml_of(folder), "objective={name: 'three:Three', lies: 3}", f"output={folder}/lie"
    )
    assert ended.codes == [1]
    assert re.search(r"a: the objective counted (\d+), its batches announced (\d+)", ended.err)


def test_a_classifier_is_no_causal_language_model(bert):
    path = yaml_of(bert)
    config = config_of(path, f"model.name={bert}/bert")
    with pytest.raises(ValueError, match="found BertForSequenceClassification, a classifier"):
        plugins.loader(config)(config, toys.tokenizer(), [], empty=True)


def test_learning_rates_are_scaled_by_name():
    module = torch.nn.ModuleDict(
        {"body": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)}
    )
    groups = parameter_groups(module, 0.1, {"classifier": 3.0})
    assert [(g["weight_decay"], g["scale"], len(g["params"])) for g in groups] == [
        (0.1, 1.0, 1), (0.1, 3.0, 1), (0.0, 1.0, 1), (0.0, 3.0, 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="found 'clasifier', which matches no trainable parameter"):
        parameter_groups(module, 0.0, {"clasifier": 3.0})
