"""The configurations that ship: they are read, DeepSpeed's follows from them for any number of processes, and on toy data with a toy
model `launch/check.py` finds nothing in the way."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import runs
import toys
from transformers import Qwen2Config

from mtl import process
from mtl.check import memory
from mtl.config import load
from mtl.distributed.ds_config import ds_config, zero_stage
from mtl.models import load as models

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FOLDER = runs.ROOT / "configs"
# By file: processes, GiB of each one's GPU, and the model's sizes as its config.json on the hub has them.
SEVEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
THIRTY_TWO = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
WRITTEN_FOR = {
    "1-gpu-lora.yaml": (1, 24, SEVEN, 7.62e9),
    "8-gpus.yaml": (8, 80, SEVEN, 7.62e9),
    "multi-node.yaml": (16, 80, THIRTY_TWO, 32.76e9),
}


def without_extras(path: Path) -> list[str]:
    """Overrides for what a machine that runs the tests may lack. An attention kernel may be lacking:
    the check goes on."""
    quantizes = load(path).model.quantize and find_spec("bitsandbytes") is None
    return ["model.quantize=null"] * bool(quantizes)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_it_is_read_and_deepspeed_follows_for_any_number_of_processes(path):
    config = load(path)
    for world in (1, 8, 16):
        settings = ds_config(config, world, "cpu")
        assert settings["train_batch_size"] == world
        assert settings["zero_optimization"]["stage"] == zero_stage(config)
        for key, value in config.engine.deepspeed.get("zero_optimization", {}).items():
            assert settings["zero_optimization"][key] == value
    wide = [
        f"{path.name}:{n}"
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 144
    ]
    assert not wide


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_it_fits_the_gpus_it_is_written_for(name, tmp_path):
    """By the estimate that `launch/check.py` prints, from the hub model's sizes, where half of all positions are targets."""
    world, memory_of_gpu, sizes, parameters = WRITTEN_FOR[name]
    Qwen2Config(vocab_size=152064, tie_word_embeddings=False, **sizes).save_pretrained(tmp_path)
    here = ["model.attention=sdpa", *without_extras(FOLDER / name)]
    config = load(FOLDER / name, [f"model.name={tmp_path}", *here])
    skeleton = models.skeleton(config, toys.tokenizer())
    frozen = sum(p.numel() for n, p in skeleton.named_parameters() if "lora_" not in n)
    assert frozen == pytest.approx(parameters, rel=1e-3), "it is the model it says"
    tokens = config.batch.tokens
    parts = memory.estimate(config, zero_stage(config), skeleton, world, tokens, tokens // 2)
    if config.model.quantize or not config.model.lora:
        assert (
            sum(part.bytes for part in parts if part.where == "device") / 2**30
            < 0.8 * memory_of_gpu
        )


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_nothing_stands_in_the_way_of_it(name, tmp_path, monkeypatch, capsys):
    toys.save(toys.tiny_llama(), tmp_path / "model")
    made = {
        task["format"]: task
        for task in toys.write_tasks(tmp_path, train=64, validation=32).values()
    }
    config = load(FOLDER / name)
    overrides = [
        f"model.name={tmp_path}/model",
        f"output={tmp_path}/run",
        f"cache={tmp_path}/cache",
        "schedule.warmup=0",  # epochs of so few rows are a few steps
        *without_extras(FOLDER / name),
    ]
    for task, settings in config.tasks.items():
        rows = made[settings.format.name]
        overrides += [
            f"tasks.{task}.train={rows['train']}",
            f"tasks.{task}.validation={rows['validation']}",
        ]
    world = WRITTEN_FOR[name][0]
    sets = [part for override in overrides for part in ("--set", override)]
    monkeypatch.setattr(
        sys, "argv", ["check.py", "--config", str(FOLDER / name), "--world", str(world), *sets]
    )
    code = process.exit_code(
        runpy.run_path(str(runs.ROOT / "launch" / "check.py"), run_name="check")["main"]
    )
    out, err = capsys.readouterr()
    assert code == 0 and "nothing stands in the way of a run" in out, out + err
    assert f"ZeRO {config.engine.zero}, {world} process" in out
    lacks = config.model.attention == "flash_attention_2" and not find_spec("flash_attn")
    assert ("model.attention: found flash_attention_2, wanted a kernel" in out) == lacks
