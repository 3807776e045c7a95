"""`launch/check.py`: what it foretells is what the run's own parts do, and its exit code says whether a run could start."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import toys

from mtl import build, process
from mtl.check import dryrun, memory
from mtl.config import load
from mtl.data.batches import Layout, TrainBatches
from mtl.data.encoded import Encoded
from mtl.data.marks import marked
from mtl.data.plan import layouts_for, mix_for
from mtl.models import load as models
from mtl.output import manifest
from mtl.output.checkpoint import RUN

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROGRAM = runs.ROOT / "launch" / "check.py"


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("check"))


@pytest.fixture
def check(yaml, monkeypatch, capsys):
    """Run the program in this process: its exit code, what it printed and its messages."""
    main = runpy.run_path(str(PROGRAM), run_name="check")["main"]

    def call(*arguments: str, config: Path = yaml) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check.py", "--config", str(config), *arguments])
        code = process.exit_code(main)
        return code, *capsys.readouterr()

    return call


def parts(yaml: Path, *overrides: str):
    config = load(yaml, overrides)
    data = build.encode(config, say=lambda text: None)
    return config, data.tokenizer, data


def test_it_prints_everything_and_leaves_nothing_behind(check, yaml):
    code, out, _ = check("--world", "2")
    assert code == 0, out
    for line in (
        "    warmup: 0",  # a default of the schedule's
        "copy (train): 24 of 24 rows kept:",
        "12 steps of 6 examples on 2 processes: 72 draws of 44 rows",
        "packing is auto",
        "copy   33.3%    24             2.00            12.0               1.00",
        "LlamaForCausalLM, fp32, ZeRO 2, 2 processes",
        "nothing stands in the way of a run",
    ):
        assert line in out, line
    assert out.count("[[") == 1 + 2 + 1 + out.count("in [[ ]]"), (
        "copy has one run of targets, chat two, prose one"
    )
    assert not (yaml.parent / "run").exists()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_batches_are_cut_as_the_run_cuts_them(yaml, packing, world):
    config, _, data = parts(yaml, f"batch.packing={str(packing).lower()}", "batch.examples=9")
    tasks = data.tasks
    mix, steps = mix_for(config, tasks), 7
    (found,) = (
        dryrun.batch_sizes(tasks, mix, one, steps)
        for one in dryrun.layouts(config, data, world, 128).values()
    )
    micros = []  # [rank][step] -> micro-batches, as the run makes them
    for rank in range(world):
        cut = layouts_for(config, tasks, data.examples, data.goals.of, world, rank, packing, 128)
        batches = TrainBatches(tasks, mix, cut)
        micros.append([batches.batch(step) for step in range(steps)])
        batches.close()
    for rank in micros:
        assert [len(step) for step in rank] == found.micros.tolist()
    sizes = [[m.input_ids.numel() for rank in micros for m in rank[step]] for step in range(steps)]
    np.testing.assert_array_equal(found.positions, [sum(step) for step in sizes])
    assert found.largest == max(max(step) for step in sizes)
    assert found.targets == max(len(m.labels) for rank in micros for step in rank for m in step)


def test_an_example_is_shown_with_its_targets_marked():
    tokenizer = toys.tokenizer()
    text = tokenizer("ab é cd", add_special_tokens=False)["input_ids"]
    target = np.zeros(len(text), dtype=bool)
    target[3:6] = True  # 'é' is two tokens of one character, and a space
    split = Encoded.of([(text, target)])
    assert marked(tokenizer, split.ids(0), split.target(0), color=False) == "ab [[é ]]cd"
    assert marked(tokenizer, split.ids(0), split.target(0), color=True) == "ab \033[32mé \033[0mcd"


def test_a_long_example_is_shown_around_its_first_target():
    tokenizer = toys.tokenizer()
    ids = tokenizer("x" * 1000 + "y" * 1000, add_special_tokens=False)["input_ids"]
    split = Encoded.of([(ids, np.arange(2000) >= 1000)])
    shown = marked(tokenizer, split.ids(0), split.target(0), color=False)
    assert (
        shown == "(800 tokens before) " + "x" * 200 + "[[" + "y" * 200 + "]] (and 800 more tokens)"
    )


def estimate(yaml: Path, world: int, *overrides: str) -> tuple[dict[str, memory.Part], int, int]:
    config, tokenizer, _ = parts(yaml, *overrides)
    skeleton = models.skeleton(config, tokenizer)
    sizes = [(p.numel(), p.requires_grad) for p in skeleton.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    found = memory.estimate(config, config.engine.zero, skeleton, world, positions=100, targets=40)
    return {part.name: part for part in found}, total, trained


FULL = ["engine.deepspeed={}"]
LORA = ["model.lora={r: 2}", *FULL]


# Bytes a parameter of one of 4 ranks: weights, gradients, optimizer.
@pytest.mark.parametrize(
    "settings, weights, gradients, optimizer",
    [
        (["model.precision=fp32", "engine.zero=0"], 4, 4, 8),
        (["model.precision=fp32", "engine.zero=1"], 4, 4, 12 / 4),
        (["model.precision=fp32", "engine.zero=2"], 4, 4 / 4, 12 / 4),
        (["model.precision=fp32", "engine.zero=3"], 4 / 4, 4 / 4, 12 / 4),
        (["model.precision=bf16", "engine.zero=2"], 2, 4 / 4, 12 / 4),
        (["model.precision=bf16", "engine.zero=3"], 2 / 4, 4 / 4, 12 / 4),
        (["model.precision=fp32", "engine.zero=0", "optimizer.name=sgd"], 4, 4, 0),
        (
            [
                "model.precision=fp32",
                "engine.zero=2",
                "optimizer.name=sgd",
                "optimizer.momentum=0.9",
            ],
            4,
            4 / 4,
            8 / 4,
        ),
    ],
)
@pytest.mark.parametrize("adapters", [FULL, LORA])
def test_memory_of_parameters_by_stage(yaml, settings, weights, gradients, optimizer, adapters):
    found, total, trained = estimate(yaml, 4, *settings, *adapters)
    assert (trained == total) == (adapters is FULL) and trained
    assert found["weights"].bytes == weights * total
    assert found["gradients"].bytes == gradients * trained
    assert found["optimizer"].bytes == pytest.approx(optimizer * trained)
    assert not any(found[name].rough for name in ("weights", "gradients", "optimizer"))
    assert found["logits"].rough and found["logits"].bytes == 40 * 259 * (
        10 if "bf16" in settings[0] else 12
    )


def test_offloaded_memory_is_elsewhere(yaml):
    found, *_ = estimate(
        yaml, 2, *FULL, "engine.zero=3", "engine.offload={optimizer: cpu, parameters: cpu}"
    )
    assert {found[name].where for name in ("optimizer", "weights", "gradients", "transfers")} == {
        "cpu"
    }
    assert any(line.startswith("total, cpu") for line in memory.table(list(found.values())))


@pytest.mark.parametrize(
    "settings", [[], ["model.lora={r: 2}"], ["model.precision=bf16", "model.lora={r: 2}"]]
)
def test_the_skeleton_is_the_model_without_weights(yaml, settings):
    config, tokenizer, _ = parts(yaml, *settings)
    skeleton, loaded = models.skeleton(config, tokenizer), models.load(config, tokenizer)
    assert all(p.is_meta for p in skeleton.parameters())

    def described(module: torch.nn.Module) -> dict:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()}

    assert described(skeleton) == described(loaded)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["tasks.copy.train=nowhere.jsonl"], "tasks.copy.train: "),
        (["model.nmae=x"], "Did you mean name?"),
        (
            ["model.attention=nonsense"],
            "model.attention: found nonsense, wanted one that this model",
        ),
        (["engine.deepspeed.gradient_clipping=3.0"], "optimizer.clip"),
        (["model.lora.target_modules=[nowhere]"], "model.lora"),
    ],
)
def test_what_would_end_a_run_ends_the_check(check, overrides, text):
    code, out, err = check(*(part for one in overrides for part in ("--set", one)))
    assert code == 1 and "nothing stands in the way" not in out
    assert text in err and "Traceback" not in err, err


def test_a_kernel_that_is_not_installed_here_is_a_remark(check):
    """A laptop checks what a cluster will run: everything is printed, memory too."""
    code, out, err = check("--set", "model.attention=flash_attention_2")
    assert code == 0, err
    assert "remark: --set model.attention=flash_attention_2: model.attention: found flash" in out
    assert "LlamaForCausalLM, fp32, ZeRO 2" in out and "nothing stands in the way" in out


def test_a_folder_that_holds_a_run_is_found(check, tmp_path):
    manifest.mark(tmp_path, RUN)
    (tmp_path / "metrics.jsonl").write_text("")
    code, _, err = check("--set", f"output={tmp_path}")
    assert code == 1 and "already holds a run" in err
    assert check("--set", f"output={tmp_path}", "--resume")[0] == 0


@pytest.mark.parametrize("where", ["/proc/x", "/proc/x/y", "file", "file/x"])
def test_a_place_where_no_folder_can_be_made_is_found(check, tmp_path, where):
    (tmp_path / "file").touch()
    output = tmp_path / where  # of an absolute path that path alone is left
    code, out, err = check("--set", f"output={output}")
    assert code == 1 and "nothing stands in the way" not in out
    assert f"error: output: found {output}, where nothing can be written (" in err
    assert check("--set", f"output={tmp_path}/new/x")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_prepare_fills_the_cache_only(check, tmp_path):
    code, out, err = check("--prepare", "--set", f"cache={tmp_path}/cache")
    assert (
        code == 0
        and out.rstrip().endswith(f"encoded in {tmp_path}/cache")
        and "Memory" not in out
        and "defaults" not in out
    )
    assert err.count("encoding ") == 6
    code, _, err = check("--set", f"cache={tmp_path}/cache")
    assert code == 0 and "encoding" not in err


def test_warm_ups_as_long_as_the_run_are_said(check):
    """With epochs the length is known once rows are read."""

    def told(*overrides: str) -> tuple[int, str, str]:
        return check(*(part for one in overrides for part in ("--set", one)))

    inner = "balancer={name: Scheduled, balancer: {name: CoBa, warmup: 90}}"
    code, out, err = told("train={epochs: 0.5}", inner)
    assert code == 0, err
    assert "remark: CoBa gives equal weights for 90 steps (balancer.warmup), and the run" in out
    assert "it never acts" not in told("train.steps=91", "balancer={name: CoBa, warmup: 90}")[1]
    code, _, err = told("train={epochs: 0.5}", "schedule.warmup=500", "balancer=Equal")
    assert code == 1 and "schedule.warmup: found 500, wanted at most the run's steps" in err


def test_more_processes_than_examples_is_said(check):
    assert "warning: 2 of 8 processes get no example of a batch" in check("--world", "8")[1]


def test_layouts_follow_the_setting(yaml):
    config, _, data = parts(yaml, "batch.packing=false")
    found = dryrun.layouts(config, data, 2, 128)
    assert (
        list(found) == ["padded"]
        and isinstance(found["padded"].each[0], Layout)
        and found["padded"].each[0].row_length is None
    )
