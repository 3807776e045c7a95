"""Preference losses: against TRL's, against plain torch at ZeRO 0 to 3, and in whole runs."""

import json
import os
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import toys
from distributed import run_distributed
from near import near
from test_equivalence import exposed

from mtl import build, plugins, process
from mtl.compare import evaluation
from mtl.config import ConfigError
from mtl.data.examples import Piece
from mtl.data.formats import Completion, RowProblem
from mtl.data.preference import preference
from mtl.distributed import comm
from mtl.generation.asking import stop_at
from mtl.losses.preference import PairExamples, Preference
from mtl.train.reference import fill
from mtl.train.step import fetch, train_step

STAGES = (0, 1, 2, 3)
TOKENS = {0: 96, 1: 160, 2: 96, 3: 400}  # each stage cuts a batch otherwise
WEIGHTS = [0.5, 0.2, 0.3]
YAML = """\
model: {{name: {folder}/model, precision: fp32}}
tasks:
  pairs:
    train: {folder}/pairs.jsonl
    validation: {folder}/pairs.jsonl
    format: preference
    objective: {{name: preference, loss: {loss}}}
  better: {{of: [pairs], loss: sft}}
  plain: {{train: {folder}/plain.jsonl, validation: {folder}/plain.jsonl, format: text}}
batch: {{examples: 7, tokens: 96, max_length: 40}}
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
    root = tmp_path_factory.mktemp("preferences")
    # A random model hardly prefers anything; a scaled head makes losses that differ.
    for name, seed in (("model", 0), ("other", 1)):
        model = toys.tiny_llama(seed)
        model.lm_head.weight.data *= 20
        toys.save(model, root / name)
    draw = np.random.default_rng(0)

    def word() -> str:
        return "".join(draw.choice(list("abcdef"), draw.integers(2, 14)))

    pairs = [
        {"prompt": f"{word()} =", "chosen": f" a{word()}", "rejected": f" b{word()}"}
        for _ in range(11)
    ]
    plain = [{"text": word()} for _ in range(9)]
    for name, rows in (("pairs", pairs), ("plain", plain)):
        toys.write_rows(root / f"{name}.jsonl", rows)
    return root


def yaml_of(folder: Path, zero: int = 2, loss: str = "sigmoid", balancer: str = "Equal") -> Path:
    path = folder / f"x{comm.rank()}.yaml"  # a rank each: none reads what another writes
    path.write_text(YAML.format(folder=folder, zero=zero, balancer=balancer, loss=loss))
    return path


def config_of(folder: Path, *overrides: str, **settings: Any) -> Any:
    return plugins.read(str(yaml_of(folder, **settings)), overrides)


def silent(text: str) -> None:
    pass


def load(folder: Path, name: str) -> torch.nn.Module:
    """A model as our loader gives it: its forward takes targets."""
    config = config_of(folder, f"model.name={folder}/{name}")
    return plugins.loader(config)(config, toys.tokenizer(), [], empty=False).eval()


def scores_of(model: Any, columns: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """Log-probabilities of the targets of both sides, in plain torch: two (n,)."""
    found = []
    for side in ("chosen", "rejected"):
        ids = torch.from_numpy(columns[side].astype(np.int64))
        each = F.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), -1)
        logp = each.gather(1, ids[1:, None])[:, 0]
        found.append(logp[torch.from_numpy(columns[f"{side}_target"][1:] > 0)])
    return found


# --- one batch against TRL

SETTINGS = {
    "sigmoid": {"beta": 0.3},
    "sigmoid_norm": {"beta": 0.5},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.4},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "apo_zero": {"beta": 0.3},
    "sft": {"beta": 0.3},  # ours is a loss of its own, beside whichever
}


def ours_of(loss: str) -> Preference:
    settings = SETTINGS[loss]
    if loss == "sft":
        return Preference(**settings)
    if loss == "sigmoid_norm":
        return Preference("sigmoid", length_normalized=True, **settings)
    return Preference(loss, **settings)


def of_trl(folder: str) -> dict[str, Any]:
    """TRL's loss, gradient and metrics of all pairs at once, for each of its losses."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    root = Path(folder)
    model, other = (
        AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
        for name in ("model", "other")
    )
    data = build.encode(config_of(root), say=silent)
    split, rows = data.tasks[0].train, []
    for i in range(len(split)):
        columns = split.columns(i)
        start = int(columns["chosen_target"].argmax())
        rows.append(
            {
                "prompt_ids": columns["chosen"][:start].tolist(),
                "chosen_ids": columns["chosen"][start:].tolist(),
                "rejected_ids": columns["rejected"][start:].tolist(),
            }
        )
    lines = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    settings = DPOConfig(root / "trl", use_cpu=True, bf16=False, report_to=[], seed=0)
    trainer = DPOTrainer(
        model, other, args=settings, train_dataset=Dataset.from_list(lines),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
    )  # fmt: skip
    batch, found = trainer.data_collator(rows), {}
    for loss, keywords in SETTINGS.items():
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
        trainer.beta = keywords["beta"]
        trainer.label_smoothing = keywords.get("label_smoothing", 0.0)
        trainer._metrics["eval"].clear()
        model.eval().zero_grad()
        value = trainer._compute_loss(model, batch, False)
        value.backward()
        gradient = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        metrics = {name: each[0] for name, each in trainer._metrics["eval"].items()}
        found[loss] = {"loss": float(value), "gradient": gradient, "metrics": metrics}
    return found


@pytest.fixture(scope="module")
def trl(folder) -> dict[str, Any]:
    return run_distributed(of_trl, 1, str(folder))[0]


def batch_of(folder: Path, packed: bool = False) -> tuple[Any, Any]:
    """All pairs in one batch, the other model's log-probabilities beside them; the data."""
    config = config_of(folder, "batch.tokens=2048")
    data = build.encode(config, say=silent)
    split = data.tasks[0].train
    layouts = build.layouts_for(
        config, data.tasks, data.examples, data.goals.of, 1, 0, packed, 2048
    )
    other = load(folder, "other")
    bare = SimpleNamespace(
        eval=other.eval, evaluate=other, device=torch.device("cpu"), forward=other,
        module=other,
    )  # fmt: skip
    goals = data.goals
    fill(bare, goals.each, goals.specs, data.tasks, layouts, {"packed": packed}, silent)
    row, splits = np.arange(len(split)), [task.train for task in data.tasks]
    ((micro, most),) = layouts.each[0].deal(splits, np.zeros(len(split), int), row)
    return layouts.each[0].collate(micro, most, splits, np.zeros(len(split), int), row), data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", SETTINGS)
def test_loss_gradient_and_measures_are_trls(folder, trl, loss, packed):
    batch, _ = batch_of(folder, packed)
    model, wanted = load(folder, "model"), trl[loss]
    assert len(batch.input_ids) < 11 if packed else len(batch.input_ids) == 22
    terms = ours_of(loss)(model, batch, 3)
    assert terms.counts.tolist() == batch.counts(3).tolist()
    value = (terms.sums / terms.counts)[int(loss == "sft")]
    assert float(value.detach()) == pytest.approx(wanted["loss"], rel=1e-5)
    value.backward()
    for name, parameter in model.named_parameters():
        gradient = wanted["gradient"][name]
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(parameter.grad.numpy(), gradient, atol=1e-5 * scale + 1e-9)
    metrics = wanted["metrics"]
    measures = {name: each[0] for name, each in terms.measures.items()}
    means = {name: float(total / n) for name, (total, n) in measures.items()}
    if loss not in ("ipo", "sigmoid_norm", "sft"):  # ours are of the scores that the loss compares
        assert means["reward_margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-4)
        assert means["chosen_reward"] == pytest.approx(metrics["rewards/chosen"], rel=1e-4)
        assert means["rejected_reward"] == pytest.approx(metrics["rewards/rejected"], rel=1e-4)
        assert means["reward_accuracy"] == pytest.approx(metrics["rewards/accuracies"], rel=1e-6)
        assert 0 < means["reward_accuracy"] < 1


@pytest.mark.parametrize("loss", [*SETTINGS, "orpo", "simpo"])
def test_two_pairs_in_a_packed_row_are_as_four_padded_rows(folder, loss):
    """Four sequences, none of which sees another."""
    objective = ours_of(loss) if loss in SETTINGS else Preference(loss)
    data, found = build.encode(config_of(folder), say=silent), {}
    pieces = [Piece(0, data.tasks[0].train.columns(i)) for i in range(2)]
    for packed in (False, True):
        rows = [pieces] if packed else [[piece] for piece in pieces]
        batch = data.examples[0].collate(rows, packed=packed, most=2, tokens=200)
        starts = (batch.position_ids == 0).sum() if packed else len(batch.input_ids)
        assert len(batch.input_ids) == (1 if packed else 4) and starts >= 4
        known = torch.tensor([[-9.0, -9.5], [-8.0, -7.0]])
        model = load(folder, "model")
        terms = objective(model, replace(batch, reference=known), 3)
        terms.sums.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[packed] = terms, gradients
    (apart, wanted), (together, gradients) = found[False], found[True]
    assert together.counts.tolist() == apart.counts.tolist() and together.counts[0] == 2
    near(together.sums.detach(), apart.sums.detach(), units=32)
    for name, gradient in gradients.items():
        scale = float(wanted[name].abs().max())
        np.testing.assert_allclose(gradient, wanted[name], atol=1e-5 * scale + 1e-9)


def test_losses_without_a_reference_are_trls(folder, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    draw = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 9, generator=draw) * 3 - 0.01
    sides = [side.clone().requires_grad_() for side in (chosen, rejected)]
    mine = [side.clone().requires_grad_() for side in (chosen, rejected)]
    here = SimpleNamespace(device="cpu")
    cpo = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.8,
        label_smoothing=0.1,
        loss_type="simpo",
        accelerator=here,
    )
    wanted = CPOTrainer.cpo_loss(cpo, *sides)[0].mean()
    found = Preference("simpo", beta=2.0, gamma=0.8, label_smoothing=0.1).of(*mine).mean()
    _same(found, wanted, mine, sides)
    orpo = SimpleNamespace(beta=0.25, accelerator=here)
    sides = [side.clone().requires_grad_() for side in (chosen, rejected)]
    mine = [side.clone().requires_grad_() for side in (chosen, rejected)]
    # TRL takes the token loss over the prompt too; the paper (eq. 6) over the answer.
    wanted = (-sides[0] - ORPOTrainer.odds_ratio_loss(orpo, *sides)[0]).mean()
    _same(Preference("orpo", beta=0.25).of(*mine).mean(), wanted, mine, sides)
    assert torch.isfinite(Preference("orpo").of(torch.zeros(1), chosen[:1])).all()


def _same(found: Any, wanted: Any, mine: list, theirs: list) -> None:
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    found.backward()
    wanted.backward()
    for one, other in zip(mine, theirs, strict=True):
        near(one.grad, other.grad, units=16)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_take_means_over_tokens(folder, loss):
    batch, data = batch_of(folder)
    model = load(folder, "model")
    split, objective = data.tasks[0].train, Preference(loss)
    unknown = replace(batch, reference=torch.zeros_like(batch.reference))
    terms = objective(model, unknown, 3)
    pairs = [scores_of(model, split.columns(i)) for i in range(len(split))]
    means = [torch.stack([side.mean() for side in pair]) for pair in pairs]
    wanted = objective.of(*torch.stack(means).unbind(1)).sum()
    assert float(terms.sums[0].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    sft = -sum(chosen.sum() for chosen, _ in pairs)
    assert float(terms.sums[1].detach()) == pytest.approx(float(sft.detach()), rel=1e-5)
    assert int(terms.counts[1]) == sum(len(chosen) for chosen, _ in pairs)


def test_a_pair_must_fit(folder):
    with pytest.raises(
        ConfigError, match="batch.max_length: found 50, wanted half of batch.tokens"
    ):
        examples(folder, "batch.max_length=50")
    wanted = "evaluate.tokens: found 42, wanted at least 78: a pair has two sides"
    with pytest.raises(ConfigError, match=wanted):
        examples(folder, "evaluate.tokens=42")
    examples(folder, "evaluate.tokens=78")


def test_conservative_dpo_by_hand():
    chosen, rejected = torch.tensor([0.5]), torch.tensor([-1.5])
    found = Preference("sigmoid", beta=0.5, label_smoothing=0.1).of(chosen, rejected)
    wanted = 0.9 * np.log1p(np.exp(-1.0)) + 0.1 * np.log1p(np.exp(1.0))
    assert float(found) == pytest.approx(wanted, rel=1e-6)


# --- the update, on every rank


def gradients(folder: str) -> dict[int, dict[str, Any]]:
    """Of a mixed global batch at each stage: what an optimizer is handed, and the reference."""
    found = {}
    for zero in STAGES:
        # A cache of its own, so that each stage asks the starting model itself.
        own = f"cache={folder}/cache-{zero}", f"batch.tokens={TOKENS[zero]}"
        config = config_of(Path(folder), *own, zero=zero)
        data = build.encode(config, say=silent)
        run = exposed(config, data)
        split = data.tasks[0].train
        kept = np.stack([split.columns(i)["reference"] for i in range(len(split))])
        # A policy that has left the reference: else every pair's score is 0.
        split.attach("reference", kept + np.array([[0.7, -0.4]], np.float32))
        batch = fetch(lambda run=run: run.batches.batch(0), len(run.names))
        report = train_step(run.engine, run.objective, batch, np.array(WEIGHTS), 0.0, run.names)
        state = {n: t.numpy() for n, t in run.engine.state_dict().items()}
        dummies = sum(micro.is_dummy for micro in batch.micros)
        found[zero] = {
            "losses": report.losses, "state": state, "reference": kept, "dummies": dummies
        }  # fmt: skip
        run.batches.close()
    return found


@pytest.fixture(scope="module")
def compared(folder) -> tuple[dict[str, Any], list[dict[int, Any]]]:
    config = config_of(folder)
    data = build.encode(config, say=silent)
    model = load(folder, "model")
    objective = Preference("sigmoid")
    stream, row = build.mix_for(config, data.tasks).batch(0)
    sums, counts = [torch.zeros(()) for _ in range(3)], [0] * 3
    for s, n in zip(stream.tolist(), row.tolist(), strict=True):
        columns = data.tasks[s].train.columns(n)
        if s == 0:
            chosen, rejected = scores_of(model, columns)
            moved = (
                chosen.sum() - chosen.sum().detach() - 0.7,
                rejected.sum() - rejected.sum().detach() + 0.4,
            )
            for i, (loss, count) in enumerate(
                [(objective.of(*moved), 1), (-chosen.sum(), len(chosen))]
            ):
                sums[i], counts[i] = sums[i] + loss, counts[i] + count
        else:
            ids = torch.from_numpy(columns["ids"].astype(np.int64))
            each = F.cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"
            )
            target = torch.from_numpy(columns["target"][1:] > 0)
            sums[2], counts[2] = sums[2] + each[target].sum(), counts[2] + int(target.sum())
    losses = [total / count for total, count in zip(sums, counts, strict=True)]
    sum(w * one for w, one in zip(WEIGHTS, losses, strict=True)).backward()
    split = data.tasks[0].train
    with torch.no_grad():
        known = [[float(x.sum()) for x in scores_of(model, split.columns(i))] for i in range(11)]
    wanted = {
        "losses": [float(one.detach()) for one in losses],
        "state": {n: p.grad.numpy() for n, p in model.named_parameters()},
        "reference": np.array(known),
    }
    return wanted, run_distributed(gradients, 2, str(folder))


@pytest.mark.parametrize("zero", STAGES)
def test_the_update_is_that_of_plain_autograd(compared, zero):
    wanted, ranks = compared
    for rank in ranks:
        np.testing.assert_allclose(rank[zero]["reference"], wanted["reference"], rtol=1e-5)
        np.testing.assert_allclose(rank[zero]["losses"], wanted["losses"], rtol=1e-5)
    for name, gradient in wanted["state"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            ranks[0][zero]["state"][name], gradient, atol=1e-5 * scale + 1e-9
        )


# --- the reference on disk


def started(folder: str, *overrides: str, zero: int = 2) -> dict[str, Any]:
    """What a start says of the reference, and the column itself."""
    said: list[str] = []
    path, code = yaml_of(Path(folder), zero=zero), {"allow_code": ["test_preference"]}
    config = plugins.read(str(path), overrides, **code)
    data = build.encode(config, say=silent, **code)
    run = build.build(config, data, packed=False, say=said.append, **code)
    split = data.tasks[0].train
    found = {
        "asked": [line for line in said if "starting model" in line or "damaged" in line],
        "weights": run.checkpoints.identity["starting model (content)"],
        "column": np.stack([split.columns(i)["reference"] for i in range(len(split))]),
    }
    run.batches.close()
    return found


def starts(folder: str) -> list[dict[str, Any]]:
    """One start after another, on one cache."""
    mine = f"cache={folder}/cache-of-starts"
    first = started(folder, mine, zero=0)
    copied = [started(folder, mine, f"model.name={folder}/copy", zero=zero) for zero in (2, 3)]
    other = started(folder, mine, f"model.name={folder}/other")
    if comm.rank() == 0:
        for path in (Path(folder) / "cache-of-starts").glob("*/reference-*.npy"):
            path.write_bytes(path.read_bytes()[:-4])
    comm.barrier()
    return [first, *copied, other, started(folder, mine)]


def test_the_reference_is_read_from_disk_by_model_content_at_every_stage(folder):
    shutil.copytree(folder / "model", folder / "copy", dirs_exist_ok=True)
    asks = ["pairs (train): the starting model reads 11 rows"]  # validation has the same rows
    ranks = run_distributed(starts, 2, str(folder))
    for first, at_2, at_3, other, damaged in ranks:
        assert first["asked"] == other["asked"] == asks
        for again in (at_2, at_3):  # another folder, another stage: the same weights
            assert again["asked"] == [] and again["weights"] == first["weights"]
            np.testing.assert_array_equal(again["column"], first["column"])
        assert other["weights"] != first["weights"]
        assert np.abs(other["column"] - first["column"]).max() > 0.01
        assert damaged["asked"][-1:] == asks
        np.testing.assert_allclose(damaged["column"], first["column"], rtol=1e-5)
    assert "is damaged" in ranks[0][4]["asked"][0]


class Scaled(Preference):
    """An objective whose reference reads a keyword."""

    def __init__(self, times: float = 1.0, beta: float = 0.1):
        super().__init__(beta=beta)
        self.times = times

    def reference(self, forward, batch):
        return self.times * super().reference(forward, batch)


def keyed(folder: str) -> list[dict[str, Any]]:
    """Starts of objectives with other keywords, on one cache."""
    mine = f"cache={folder}/cache-of-keywords"
    scaled = [
        started(folder, mine, f"tasks.pairs.objective={{name: test_preference:Scaled, times: {x}}}")
        for x in (1, 2)
    ]
    usual = [started(folder, mine, f"tasks.pairs.objective.beta={x}") for x in (0.1, 0.2)]
    return [*scaled, *usual]


def test_a_reference_that_can_read_keywords_is_kept_for_these_keywords(folder):
    """The losses of this repository read none: runs with another `beta` share what is kept."""
    (rank,) = run_distributed(keyed, 1, str(folder))
    once, twice, first, second = rank
    np.testing.assert_allclose(twice["column"], 2 * once["column"], rtol=1e-6)
    assert once["asked"] == twice["asked"] == first["asked"] and second["asked"] == []
    np.testing.assert_array_equal(second["column"], first["column"])


def stopped(folder: str) -> dict[str, Any]:
    """A start of which rank 1 is asked to stop while the starting model reads, and the next."""
    mine, asked = f"cache={folder}/cache-of-stops", process.stop_asked
    process.stop_asked = lambda: comm.rank() == 1
    with pytest.raises(process.Preempted, match="asked to stop while the starting model read rows"):
        started(folder, mine)
    process.stop_asked = asked
    return started(folder, mine)


def test_a_signal_ends_all_ranks_while_the_starting_model_reads(folder):
    for rank in run_distributed(stopped, 2, str(folder)):
        assert rank["asked"] == ["pairs (train): the starting model reads 11 rows"]


def adapted(folder: str) -> dict[int, dict[str, Any]]:
    """With new adapters, at each stage: the reference, and the adapters' gradients of a batch."""
    found = {}
    for zero in STAGES:
        own = f"cache={folder}/cache-lora-{zero}", "model.lora.r=4"
        config = config_of(Path(folder), *own, zero=zero)
        data = build.encode(config, say=silent)
        run = exposed(config, data)
        split = data.tasks[0].train
        column = np.stack([split.columns(i)["reference"] for i in range(len(split))])
        batch = fetch(lambda run=run: run.batches.batch(0), len(run.names))
        report = train_step(run.engine, run.objective, batch, np.array(WEIGHTS), 0.0, run.names)
        found[zero] = {"reference": column, "losses": report.losses}
        run.batches.close()
    return found


def test_the_reference_of_new_adapters_is_a_plain_copy_of_the_model(folder):
    """No adapter is turned off, as none changes anything yet."""
    plain = load(folder, "model")
    split = build.encode(config_of(folder), say=silent).tasks[0].train
    with torch.no_grad():
        sides = [scores_of(plain, split.columns(i)) for i in range(len(split))]
    wanted = np.array([[float(side.sum()) for side in pair] for pair in sides])
    for rank in run_distributed(adapted, 2, str(folder)):
        for zero in STAGES:
            np.testing.assert_allclose(rank[zero]["reference"], wanted, rtol=1e-6)
            assert rank[zero]["losses"][0] == pytest.approx(np.log(2), rel=1e-5)


# --- whole runs


def test_resume_is_exact_and_measures_are_logged(folder):
    yaml = yaml_of(folder, balancer="{name: CoBa, window: 3, warmup: 1}")
    whole, parts = folder / "whole", folder / "parts"
    best = "evaluate.best=pairs/reward_accuracy", "optimizer.lr=1e-3"
    runs.train(yaml, f"output={whole}", *best, world=2).well()
    shutil.copytree(whole, parts)
    last, kept = "step-00000006", parts / "checkpoints"
    for path in kept.glob("step-*"):
        if path.name > last:
            shutil.rmtree(path)
    (kept / "latest").write_text(last)
    shutil.rmtree(parts / "model", ignore_errors=True)
    runs.train(yaml, f"output={parts}", *best, world=2, resume=True).well()
    assert runs.untimed(whole) == runs.untimed(parts)
    lines = runs.metrics(whole)
    first = next(line for line in lines if "eval/pairs/reward_accuracy" in line)
    # At step 0 the model is its own reference: the loss is log 2, no reward differs from 0.
    assert first["eval/pairs/loss"] == pytest.approx(np.log(2), rel=2e-5)
    assert first["eval/pairs/reward_margin"] == pytest.approx(0.0, abs=1e-5)
    final = [line for line in lines if "eval/pairs/reward_accuracy" in line][-1]
    assert "eval/better/reward_accuracy" not in final and "eval/better/loss" in final
    # The same of a model folder by itself: its loss is against the starting model too.
    config = plugins.read(str(yaml), [f"cache={folder}/fresh"])
    evaluate = evaluation.evaluator(config, evaluation.rows(config, "validation"))
    found = evaluate(whole / "checkpoints" / "step-00000008" / "model")
    assert found.losses[0] == pytest.approx(final["eval/pairs/loss"], rel=1e-4)
    accuracy = found.measured(["pairs", "better", "plain"], Preference.measures)
    assert accuracy["pairs/reward_accuracy"] == final["eval/pairs/reward_accuracy"]
    newest = sorted((whole / "checkpoints").glob("step-*/state.json"))[-1]
    state = json.loads(newest.read_text())
    passes = [line["eval/pairs/reward_accuracy"] for line in lines if "eval/pairs/loss" in line]
    assert state["run"]["best"]["value"] == pytest.approx(max(passes))


def test_a_run_without_a_reference_asks_for_none(folder):
    ended = runs.train(
        yaml_of(folder, loss="simpo"), f"output={folder}/simpo", "train.steps=2"
    ).well()
    assert "the starting model reads" not in ended.err


def test_a_run_of_pairs_alone_learns_to_prefer(folder):
    yaml = yaml_of(folder)
    lines = yaml.read_text().splitlines()
    alone = [line for line in lines if not line.startswith(("  better", "  plain"))]
    yaml.write_text("\n".join(alone))
    own = f"output={folder}/dpo", f"cache={folder}/alone"
    ended = runs.train(yaml, *own, "optimizer.lr=1e-4").well()
    assert "pairs (train): the starting model reads 11 rows" in ended.err
    final = [line for line in runs.metrics(folder / "dpo") if "eval/pairs/loss" in line][-1]
    assert final["eval/pairs/reward_accuracy"] == 1.0 and final["eval/pairs/loss"] < 0.3
    assert final["eval/pairs/chosen_reward"] > 0 > final["eval/pairs/rejected_reward"]


# --- rows

USER, OTHER = {"role": "user", "content": "u"}, {"role": "user", "content": "v"}
SYSTEM = {"role": "system", "content": "s"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "u", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "u", "chosen": [USER, GOOD], "rejected": [USER, {**BAD, "name": None}]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_every_form_of_a_chat_is_the_same_pair(row):
    found = preference(row)
    assert found.chosen.messages == [USER, GOOD] and found.rejected.messages == [USER, BAD]
    assert found.shared == 1


def test_texts_are_put_together():
    found = preference({"q": "u", "chosen": "good", "rejected": "bad"}, prompt="q")
    assert (found.chosen, found.rejected) == (Completion("u", "good"), Completion("u", "bad"))


def test_texts_part_where_both_go_on_with_a_word_of_their_own():
    start = "\n\nHuman: say it\n\nAssistant:"
    found = preference({"chosen": f"{start} I would", "rejected": f"{start} I wonder"})
    assert found.chosen == Completion(f"{start} I", " would")
    assert found.rejected == Completion(f"{start} I", " wonder")
    found = preference({"chosen": f"{start}  yes", "rejected": f"{start}  yesterday"})
    assert found.rejected == Completion(start, "  yesterday")
    found = preference({"chosen": f"{start} a b", "rejected": f"{start} a"})
    assert found.chosen == Completion(start, " a b")


def test_a_chat_has_tools_system_roles_and_weights_as_in_messages():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    answered = [{"role": "tool", "content": "1"}]
    sides = {
        "chosen": [{"role": "human", "content": "u"}, {**GOOD, "weight": 0}, OTHER, GOOD],
        "rejected": [{"role": "human", "content": "u"}, GOOD, OTHER, {**call, "train": False}],
    }
    sides["rejected"] += [*answered, BAD]
    row = {**sides, "tools": [tool], "system": "s"}
    found = preference(row, roles={"human": "user"}, may_drop=["reasoning"])
    assert found.chosen.messages == [SYSTEM, USER, GOOD, OTHER, GOOD] and found.shared == 4
    assert found.rejected.messages[4:] == [call, *answered, BAD]
    # The call is context; what the first answer weighs does not matter: it is the prompt's.
    assert found.chosen.context == {2} and found.rejected.context == {4}
    assert found.chosen.tools == found.rejected.tools == [tool]
    assert found.chosen.may_drop == found.rejected.may_drop == ("reasoning",)


REFUSED = [
    ({"prompt": "u", "chosen": "a", "rejected": "a"}, "equal sides", "wanted two answers"),
    ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "differing prompts", "after 0 turns"),
    ({"chosen": [USER, GOOD, OTHER], "rejected": [USER, GOOD]}, "differing prompts", "after 2 turns that both have, chosen goes on with user"),
    ({"prompt": "w", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "differing prompts", "another one"),
    ({"prompt": [OTHER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "differing prompts", "another one"),
    ({"chosen": "a", "rejected": "b"}, "differing prompts", "conversations that begin alike"),
    ({"chosen": "ab c", "rejected": "abc"}, "differing prompts", "conversations that begin alike"),
    ({"chosen": "a", "rejected": [USER, BAD]}, "missing key", "wanted prompt"),
    ({"prompt": [USER], "chosen": [{**GOOD, "weight": 0}], "rejected": [GOOD]}, "no target", "context"),
    ({"chosen": [USER, {**GOOD, "weight": 1}], "rejected": [USER, GOOD]}, "equal sides", "alike"),
    ({"system": "s", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "bad value", "wanted one of them"),
    ({"prompt": "u", "chosen": "a"}, "missing key", "wanted rejected"),
    ({"prompt": "u", "chosen": 3, "rejected": "b"}, "bad value", "chosen: found 3"),
    ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]}, "missing key", "wanted content"),
]  # fmt: skip


@pytest.mark.parametrize("row, reason, text", REFUSED)
def test_what_is_no_pair_is_refused(row, reason, text):
    with pytest.raises(RowProblem, match=re.escape(text)) as problem:
        preference(row)
    assert problem.value.reason == reason


CUT = {"prompt": "u", "chosen": "a" * 40 + "b", "rejected": "a" * 41}


@pytest.mark.parametrize(
    "row, reason, text",
    [
        *REFUSED,
        (CUT, "equal sides", "found both sides alike in 40 tokens"),
        ({"prompt": "u", "chosen": "a", "rejected": ""}, "no target", "rejected: the completion is empty"),
        ({"prompt": "u<|end|>", "chosen": "a", "rejected": "b"}, "special token", "chosen: found the text of <|end|>"),
    ],
)  # fmt: skip
def test_a_refused_pair_is_reported_with_file_and_line(folder, tmp_path, row, reason, text):
    good, path = {"prompt": "u", "chosen": "a", "rejected": "b"}, tmp_path / "pairs.jsonl"
    toys.write_rows(path, [good, row, {**good, "chosen": "c"}])
    truncated = "batch.too_long=truncate", "batch.special_text=refuse"
    own = f"tasks.pairs.train={path}", f"cache={tmp_path}/cache"
    split = build.encode(config_of(folder, *own, *truncated), say=silent).tasks[0].train
    assert len(split) == 2 and split.where(1) == f"{path}:3"
    whole, count, line = split.problems()
    assert whole.startswith("2 of 3 rows kept: ") and whole.endswith(" tokens, 2 pairs")
    assert count == f"1 row dropped: {reason}"
    assert line.startswith(f"  {path}:2: ") and text in line


def examples(folder: Path, *overrides: str) -> PairExamples:
    data = build.encode(config_of(folder, *overrides), say=silent)
    return data.examples[0]


def test_only_the_last_answer_is_a_target(folder):
    one = examples(folder, "batch.max_length=400", "batch.tokens=800")
    turns = [USER, GOOD, OTHER]
    row = one.encode(preference({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}))
    assert one.show(row.columns, False).count("[[") == 2
    assert row.counts == (1, len("good") + 1)  # bytes, and the end of the turn
    assert "[[good<|end|>]]" in one.show(row.columns, False)
    more = [{**GOOD, "weight": 0}, OTHER, BAD]
    both = {"chosen": more, "rejected": [GOOD, OTHER, GOOD]}
    row = one.encode(preference({"prompt": turns, **both}))
    assert row.counts == (1, len("bad") + 1)  # of two answers the weighted one
    assert int(row.columns["rejected_target"].sum()) == 2 * (len("good") + 1)
    plain = one.encode(preference({"prompt": "u ", "chosen": "good", "rejected": "bad"}))
    assert one.show(plain.columns, False) == (
        "chosen: u [[good<|end|>]]\nrejected: u [[bad<|end|>]]"
    )


def test_special_text_is_said_once_or_refused(folder):
    said: list[tuple[str, int]] = []
    pair = preference({"prompt": "u<|end|>", "chosen": "good", "rejected": "bad"})
    examples(folder).encode(pair, lambda text, times: said.append((text, times)))
    assert said == [
        ("rows with the text of <|end|> in them, which becomes that token (batch.special_text)", 1)
    ]
    with pytest.raises(RowProblem, match=r"chosen: found the text of <\|end\|>"):
        examples(folder, "batch.special_text=refuse").encode(pair)
    row = examples(folder, "batch.special_text=plain").encode(pair)
    plain = examples(folder).tokenizer("u<|end|>", split_special_tokens=True)["input_ids"]
    assert row.columns["chosen"][: len(plain)].tolist() == plain


def test_a_model_stops_where_chosen_answers_end(folder, tmp_path):
    """The template has no end token: `<|unused|>` begins the user's turns and ends ours."""
    talk = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    toys.write_rows(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "u"}], **talk}])
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ '<|unused|>' if m.role == 'user' else '<|start|>' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    rows = [f"tasks.pairs.{side}={tmp_path}/p.jsonl" for side in ("train", "validation")]
    config = config_of(folder, f"model.chat_template={tmp_path}/t.jinja", *rows)
    model = toys.tiny_llama()
    stops = build.stops(build.encode(config, say=silent))
    unused, end = map(toys.tokenizer().convert_tokens_to_ids, (toys.UNUSED, toys.END))
    assert stops == {unused, end} and stop_at(model, stops) == {unused}
    assert model.generation_config.eos_token_id == sorted((unused, end))


def test_sides_that_a_cut_makes_equal_are_refused(folder):
    one = examples(folder, "batch.max_length=12", "batch.too_long=truncate")
    pair = preference({"prompt": "u", "chosen": "aaaaaaaaaaaaaaa", "rejected": "aaaaaaaaaaaab"})
    with pytest.raises(RowProblem, match="found both sides alike in 12 tokens"):
        one.encode(pair)
    with pytest.raises(RowProblem, match="rejected: the completion is empty"):
        one.encode(preference({"prompt": "u", "chosen": "a", "rejected": ""}))


@pytest.mark.parametrize(
    "keywords, wanted",
    [
        ("loss: dpo", "loss: found 'dpo', wanted sigmoid, ipo, hinge, robust, apo_zero, orpo or simpo"),
        ("loss: sigmiod", "Did you mean sigmoid?"),
        ("beta: 0.0", "beta: found 0.0, wanted more than 0"),
        ("loss: hinge, label_smoothing: 0.1", "label_smoothing: found 0.1, wanted 0 (loss: hinge)"),
        ("loss: robust, label_smoothing: 0.5", "label_smoothing: found 0.5, wanted 0 to 0.5, less than 0.5"),
        ("gamma: 0.5", "gamma: found 0.5, wanted none: only simpo has it, not sigmoid"),
    ],
)  # fmt: skip
def test_keywords_that_do_not_fit_are_refused_with_their_line(folder, keywords, wanted):
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        config_of(folder, f"tasks.pairs.objective={{name: preference, {keywords}}}")


def test_the_examples_pairs_are_right_against_another(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": text} for i, text in enumerate("aab")]
    made = runpy.run_path(str(runs.ROOT / "examples" / "preferences.py"))["pairs"](rows)
    assert [row["rejected"] for row in made] == ["b", "b", "a"]
    assert [preference(row).chosen for row in made] == [Completion(*row.values()) for row in rows]
