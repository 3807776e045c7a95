"""Adapters and where a run starts from: nothing of a tied table, a trained adapter or a checkpoint is lost without a word."""

import json
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import peft
import pytest
import runs
import torch
import toys
from distributed import run_distributed
from near import near
from test_models import more_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtl import build, plugins
from mtl.distributed import masters
from mtl.merging import merge
from mtl.merging.average import average
from mtl.models import accelerate, adapters
from mtl.models.errors import ModelError
from mtl.output.export import export

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SHORT = ["train.steps=4", "evaluate.every=100", "balancer=Equal", "schedule.name=constant"]
LORA = "model.lora={r: 4, alpha: 8}"


def tied(folder: Path) -> Path:
    """The toy run with a tied model and three tokens more than it has."""
    yaml = more_tokens(folder)
    toys.tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "model")
    return yaml


def newest(output: Path) -> Path:
    return output / "checkpoints" / (output / "checkpoints" / "latest").read_text()


def losses(output: Path) -> list[float]:
    return [line["train/loss"] for line in runs.metrics(output) if "train/loss" in line]


def prose_loss(model: torch.nn.Module, folder: Path) -> float:
    """nats per target token of the validation texts, as `eval/prose/loss`."""
    tokenizer, total, count = AutoTokenizer.from_pretrained(folder / "model"), 0.0, 0
    for line in (folder / "prose.validation.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


# Tied tables


@pytest.mark.parametrize("named", [[], ["embed_tokens"], ["lm_head"]])
def test_new_tokens_of_a_tied_model_need_embedding_and_head(tmp_path, named):
    yaml = tied(tmp_path)
    ended = runs.train(yaml, *SHORT, f"model.lora={{r: 2, modules_to_save: {json.dumps(named)}}}")
    assert ended.codes == [1]
    wanted = "wanted embed_tokens and lm_head in it, tied or not"
    assert f"model.lora.modules_to_save: found {named}, {wanted}" in ended.err


@pytest.mark.parametrize("zero, world", [(2, 1), (3, 2)])
def test_adapter_merged_model_and_log_of_a_tied_model_agree(tmp_path, zero, world):
    yaml = tied(tmp_path)
    both = "model.lora={r: 2, modules_to_save: [embed_tokens, lm_head]}"
    settings = ["train.steps=150", "evaluate.every=150", "optimizer.lr=0.02", f"engine.zero={zero}"]
    runs.train(yaml, both, "balancer=Equal", *settings, world=world).well()
    checkpoint = newest(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(
        export(checkpoint, tmp_path / "merged", merge=True)
    )
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "adapter"))
    logged = runs.metrics(tmp_path / "run")[-1]["eval/prose/loss"]
    assert prose_loss(merged, tmp_path) == pytest.approx(logged, rel=1e-5)
    assert prose_loss(apart, tmp_path) == pytest.approx(logged, rel=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(settings["modules_to_save"]) == ["embed_tokens", "lm_head"]
    tokenizer = toys.tokenizer()
    ids = tokenizer("abc =", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    answer = tokenizer(" abc", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    with torch.no_grad():
        ends = merged(torch.cat([ids, answer], 1)).logits[0, -1].log_softmax(-1)
    assert ends[tokenizer.eos_token_id] > -2.5, "the end of an answer is learned"


def test_half_of_a_tied_table_is_refused(tmp_path):
    yaml = runs.write(tmp_path)
    toys.tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    ended = runs.train(yaml, *SHORT, "model.lora={modules_to_save: [embed_tokens]}")
    assert ended.codes == [1]
    assert "wanted both or none of embed_tokens and lm_head. This model ties them" in ended.err
    ended = runs.train(yaml, *SHORT, "model.lora={target_modules: [q_proj, lm_head]}")
    assert ended.codes == [1]
    assert "model.lora.target_modules.1: found 'lm_head', wanted another module." in ended.err


# Names that match nothing


def test_each_name_that_matches_nothing_is_said(tmp_path):
    yaml = runs.write(tmp_path)
    names = "model.lora={target_modules: [q_proj, vproj], modules_to_save: [lm_haed, head]}"
    ended = runs.train(yaml, *SHORT, names)
    assert ended.codes == [1]
    for text in (
        "model.lora.target_modules.1: found 'vproj', wanted the name of a module, or its end; ",
        "Did you mean v_proj?",
        "model.lora.modules_to_save.0: found 'lm_haed'",
        "model.lora.modules_to_save.1: found 'head'",  # PEFT takes any ending
    ):
        assert text in ended.err, ended.err
    assert ended.err.count("Did you mean lm_head?") == 2


# Adapters to start from


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A LoRA run of 4 steps on the toy model; the folder of its YAML."""
    yaml = runs.write(tmp_path_factory.mktemp("first"))
    runs.train(yaml, *SHORT, LORA, "optimizer.lr=0.01").well()
    return yaml.parent


def started(output: Path) -> float:
    return next(line["eval/macro"] for line in runs.metrics(output) if "eval/macro" in line)


def ended_at(output: Path) -> float:
    return [line["eval/macro"] for line in runs.metrics(output) if "eval/macro" in line][-1]


@pytest.mark.parametrize("zero, world", [(0, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize(
    "how",
    [
        ["model.name={}/run/model"],
        ["model.name={}/run/model", LORA],
        ["model.adapter={}/run/model"],
        ["model.adapter={}/run/model", LORA],
        ["train.from={}/run/checkpoints/step-00000004"],
    ],
    ids=["name", "name, lora", "adapter", "adapter, lora", "from"],
)
def test_training_goes_on_in_an_adapter(first, tmp_path, how, zero, world):
    if zero != 2 and "adapter" not in how[0]:
        pytest.skip("the same code")
    how = [one.format(first) if "lora" not in one else one for one in how]
    settings = [*how, f"engine.zero={zero}", f"output={tmp_path}/run"]
    runs.train(first / "x.yaml", *SHORT, *settings, world=world).well()
    assert started(tmp_path / "run") == pytest.approx(ended_at(first / "run"), rel=1e-6)
    assert ended_at(tmp_path / "run") < started(tmp_path / "run")
    out = tmp_path / "run" / "model"
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == f"{first}/model" and found["r"] == 4
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert prose_loss(apart, first) == pytest.approx(
        runs.metrics(tmp_path / "run")[-1]["eval/prose/loss"], rel=1e-5
    )


def test_an_adapter_that_is_merged_first(first, tmp_path):
    merge = f"model.adapter={{path: {first}/run/model, merge: true}}"
    runs.train(first / "x.yaml", *SHORT, merge, f"output={tmp_path}/run").well()
    assert started(tmp_path / "run") == pytest.approx(ended_at(first / "run"), rel=1e-6)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before = toys.tiny_llama().state_dict()
    assert all(not torch.equal(t, before[n]) for n, t in whole.state_dict().items()), "all trained"
    assert prose_loss(whole, first) == pytest.approx(
        runs.metrics(tmp_path / "run")[-1]["eval/prose/loss"], rel=1e-5
    )


@pytest.mark.parametrize("how", ["model.name={}/run/model", "train.from={}/run/model"])
def test_a_runs_own_adapters_are_merged_into_their_base(first, tmp_path, how):
    """The base is the adapters', not the adapter from which the run started."""
    settings = [how.format(first), "checkpoint.bests=each", "evaluate.every=2"]
    runs.train(first / "x.yaml", *SHORT, *settings, f"output={tmp_path}/run").well()
    base, models = merge.found(None, [], tmp_path / "run", None)
    assert base == f"{first}/model" and len(models) == 3
    report = merge.merge(base, models, partial(average), tmp_path / "out")
    assert report.base == f"{first}/model"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    alone = [peft.AutoPeftModelForCausalLM.from_pretrained(one) for one in models]
    alone = [one.merge_and_unload().state_dict() for one in alone]
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(one[name].double() for one in alone) / len(alone)
    near(found[name], mean.float(), units=8)
    assert not torch.equal(found[name], toys.tiny_llama().state_dict()[name])


def test_an_adapter_with_new_tokens_goes_on(tmp_path):
    yaml = tied(tmp_path)
    both = "model.lora={r: 2, modules_to_save: [embed_tokens, lm_head]}"
    runs.train(yaml, *SHORT, both, "optimizer.lr=0.01").well()
    for zero, world in ((2, 1), (3, 2)):
        again = [f"engine.zero={zero}", f"output={tmp_path}/again-{zero}"]
        runs.train(yaml, *SHORT, f"model.name={tmp_path}/run/model", *again, world=world).well()
        found = started(tmp_path / f"again-{zero}")
        assert found == pytest.approx(ended_at(tmp_path / "run"), rel=1e-6)
    merge = f"model.adapter={{path: {tmp_path}/run/model, merge: true}}"
    runs.train(yaml, *SHORT, merge, f"output={tmp_path}/merged").well()
    assert started(tmp_path / "merged") == pytest.approx(ended_at(tmp_path / "run"), rel=1e-6)


def test_an_adapter_that_does_not_fit_is_refused(first, tmp_path):
    for settings, text in (
        (["model.lora={r: 8, alpha: 8}"], "model.lora.r: found 8, wanted 4, as in the adapter"),
        (["model.lora={r: 4}"], "model.lora.alpha: found 32.0, wanted 8.0, as in the adapter"),
        (
            ["model.lora={r: 4, alpha: 8, target_modules: [q_proj]}"],
            "wanted an adapter of this model with these settings",
        ),
        ([f"train.from={first}/run/model"], "Both say which weights to start from"),
        ([f"model.name={first}/run/model"], "wanted the base model"),
    ):
        ended = runs.train(
            first / "x.yaml", *SHORT, f"model.adapter={first}/run/model", *settings,
            f"output={tmp_path}/run",
        )  # fmt: skip
        assert ended.codes == [1] and text in ended.err, ended.err
    with_scales = shutil.copytree(first / "run" / "model", tmp_path / "scales")
    settings = json.loads((with_scales / "adapter_config.json").read_text())
    settings["alpha_pattern"] = {"q_proj": 64}
    (with_scales / "adapter_config.json").write_text(json.dumps(settings))
    scales = [f"model.adapter={with_scales}", "model.lora={r: 4, alpha: 8}"]
    config = plugins.read(str(first / "x.yaml"), scales)
    with pytest.raises(ModelError, match="beside an adapter with alpha_pattern, wanted null. Leave"):
        adapters.add(toys.tiny_llama(), config)
    toys.tiny_llama(hidden_size=32).save_pretrained(tmp_path / "other")
    either = f"model.adapter={{path: {first}/run/model, other_base: true}}"
    other = [either, f"output={tmp_path}/run"]
    toys.tokenizer().save_pretrained(tmp_path / "other")
    ended = runs.train(first / "x.yaml", *SHORT, *other, f"model.name={tmp_path}/other")
    assert ended.codes == [1] and "wanted an adapter of this model" in ended.err, ended.err
    ended = runs.train(first / "x.yaml", *SHORT, f"model.adapter={tmp_path}/x", other[1])
    assert "model.adapter.path: found" in ended.err and "Traceback" not in ended.err, ended.err


@pytest.mark.parametrize("merge", ["false", "true"])
def test_an_adapter_of_another_base_whose_shapes_fit_is_refused_unless_asked(
    first, tmp_path, merge
):
    toys.save(toys.tiny_llama(seed=1), tmp_path / "other")
    settings = [f"model.name={tmp_path}/other", f"output={tmp_path}/run"]
    given = f"path: {first}/run/model, merge: {merge}"
    ended = runs.train(first / "x.yaml", *SHORT, *settings, f"model.adapter={{{given}}}")
    assert ended.codes == [1] and f"found an adapter of '{first}/model', wanted one" in ended.err
    ended = runs.train(
        first / "x.yaml", *SHORT, *settings, f"model.adapter={{{given}, other_base: true}}"
    )
    ended.well()


# Weights of a checkpoint


@pytest.mark.parametrize("which", ["checkpoints/step-00000004", "model"])
def test_a_new_run_starts_from_the_weights_of_a_whole_model(tmp_path, which):
    yaml = runs.write(tmp_path)
    runs.train(yaml, *SHORT).well()
    start, output = f"train.from={tmp_path}/run/{which}", f"output={tmp_path}/next"
    runs.train(yaml, *SHORT, start, LORA, output).well()
    assert started(tmp_path / "next") == pytest.approx(ended_at(tmp_path / "run"), rel=1e-6)
    assert len(losses(tmp_path / "next")) == 4, "at step 0"
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "next" / "model")
    assert prose_loss(apart, tmp_path) == pytest.approx(
        runs.metrics(tmp_path / "next")[-1]["eval/prose/loss"], rel=1e-5
    )
    ended = runs.train(yaml, *SHORT, f"train.from={tmp_path}", f"output={tmp_path}/none")
    assert ended.codes == [1]
    assert "wanted a checkpoint of a run, an exported model or an adapter" in ended.err


def lower_bits(yaml: str) -> dict[str, dict[str, torch.Tensor]]:
    """By how a run starts, its fp32 weights as integers."""
    found = {}
    for name, *settings in (
        ("bf16", "model.precision=bf16"),
        ("again", "model.precision=bf16"),
        ("other seed", "model.precision=bf16", "train.seed=7"),
        ("fp32", "model.precision=fp32"),
    ):
        config = plugins.read(yaml, settings, runs.ALLOWED)
        data = build.encode(config, runs.ALLOWED, say=lambda text: None)
        started = build.start_engine(config, data, say=lambda text: None)
        whole = masters.whole(started, masters.local(started))
        found[name] = {key: value.view(torch.int32) for key, value in whole.items()}
    return found


def test_a_run_in_bf16_starts_with_lower_bits_of_its_seed(tmp_path):
    yaml = runs.write(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    (found,) = run_distributed(lower_bits, 1, str(yaml))
    for key, value in model.named_parameters():
        mine = {name: bits[key] for name, bits in found.items()}
        assert torch.equal(mine["fp32"], value.detach().view(torch.int32)), "as they are"
        rounded = value.detach().bfloat16()
        assert torch.equal(mine["bf16"].view(torch.float32).bfloat16(), rounded)
        assert ((mine["bf16"] & 0xFFFF) != 0).float().mean() > 0.9, "between the grid's points"
        assert torch.equal(mine["again"], mine["bf16"])
        assert (mine["other seed"] != mine["bf16"]).float().mean() > 0.9


def said_at_the_start(yaml: str) -> dict[tuple[str, float], list[str]]:
    """What a run says where a product in bf16 takes so many times as long as in fp32."""
    found = {}
    for precision in ("fp32", "bf16", "bf16_autocast"):
        config = plugins.read(yaml, [f"model.precision={precision}"], runs.ALLOWED)
        data = build.encode(config, runs.ALLOWED, say=lambda text: None)
        for times in (0.4, 97.4):
            said = []
            with patch.object(accelerate, "bf16_over_fp32", lambda times=times: times):
                build.start_engine(config, data, say=said.append)
            found[precision, times] = [text for text in said if "slow" in text]
    return found


def test_bf16_on_a_cpu_that_has_no_instructions_for_it_is_remarked_on(tmp_path):
    (found,) = run_distributed(said_at_the_start, 1, str(runs.write(tmp_path)))
    text = (
        "model.precision: {} is slow on this CPU: a matrix product takes 97 times as long as in "
        "fp32. Set model.precision: fp32."
    )
    slow = {key: [text.format(key[0])] for key in found if key[0] != "fp32" and key[1] > 1}
    assert found == dict.fromkeys(found, []) | slow
    assert len(slow) == 2


def test_what_bf16_costs_is_measured(monkeypatch):
    clock = [0.0]

    class Matrix:
        def __init__(self, *_: int, dtype: torch.dtype):
            self.seconds, self.first = (6.0 if dtype == torch.bfloat16 else 1.5), 50.0

        def __matmul__(self, other: "Matrix") -> None:
            clock[0] += self.seconds + self.first
            self.first = 0.0

    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(accelerate.time, "perf_counter", lambda: clock[0])
    assert accelerate.bf16_over_fp32() == 4.0
