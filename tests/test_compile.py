"""`model.compile`: the same losses and parameters as without, by code that torch compiled, once for all lengths."""

import functools

import numpy as np
import pytest
import torch
import toys
from distributed import run_distributed

from mtl.config import Config, ConfigError, parse
from mtl.data.collate import MicroBatch, collate
from mtl.distributed import engine
from mtl.losses.causal_lm import causal_lm
from mtl.models import accelerate
from mtl.models import load as models
from mtl.models.errors import ModelError
from mtl.train.optimizer import optimizer
from mtl.train.step import fetch, train_step

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS = 4
COMPILE = torch.nn.Module.compile
CASES = {
    "packed, recomputed": (
        True,
        ["model.activation_checkpointing=true", "model.lora={r: 4}"],
        5e-6,
    ),
    "in full": (True, [], 5e-6),
    "padded, LoRA, ZeRO 1": (False, ["model.lora={r: 4}", "engine.zero=1"], 5e-6),
    "LoRA, bf16": (True, ["model.lora={r: 4}", "model.precision=bf16"], 5e-3),
    "autocast, ZeRO 0": (True, ["model.precision=bf16_autocast", "engine.zero=0"], 5e-3),
}


def config_for(folder: str, *overrides: str) -> Config:
    return parse(
        f"model: {{name: {folder}, precision: fp32}}\ntasks: {{a: {{train: a, validation: a, format: text}}}}\n"
        "train: {steps: 1}\noptimizer: {name: sgd, lr: 0.1}\nengine: {zero: 2}\noutput: x",
        overrides=overrides,
    )


def micro_batches(rng: np.random.Generator, packed: bool) -> list[MicroBatch]:
    """One of 2 to 4 rows of random lengths, and the row without a target that a rank gets when it has none left."""

    def example() -> tuple[np.ndarray, np.ndarray, int]:
        n = int(rng.integers(4, 40))
        return rng.integers(0, 257, n).astype(np.int32), np.arange(n) >= 2, 0

    rows = [[example() for _ in range(2 if packed else 1)] for _ in range(int(rng.integers(2, 5)))]
    return [collate(rows, 257, packed), collate([], 257, packed)]


def train(folder: str, packed: bool, backend: str, *overrides: str) -> dict:
    torch.nn.Module.compile = functools.partialmethod(COMPILE, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = config_for(folder, *overrides)
    trained = engine.Engine(models.load(config, toys.tokenizer()), config, optimizer(config))
    rng, losses, graphs = np.random.default_rng(0), [], []
    for _ in range(STEPS):
        micros = micro_batches(rng, packed)
        losses.append(
            train_step(
                trained, causal_lm, fetch(lambda m=micros: m, 1), np.ones(1), 0.1, ["a"]
            ).losses[0]
        )
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    state = {
        name: tensor.float().numpy()
        for name, tensor in trained.state_dict(trainable_only=True).items()
    }
    compiled = sum(torch._dynamo.utils.counters["inductor"].values())
    return {"losses": losses, "graphs": graphs, "state": state, "compiled": compiled}


def both(folder: str, packed: bool, backend: str, *overrides: str) -> tuple[dict, dict]:
    return train(folder, packed, backend, *overrides), train(
        folder, packed, backend, "model.compile=true", *overrides
    )


def assert_alike(eager: dict, compiled: dict, tolerance: float) -> None:
    assert eager["graphs"] == [0] * STEPS and compiled["graphs"][0] > 0, "compiled code ran"
    assert compiled["graphs"][1] == compiled["graphs"][-1] <= 4, "once for all lengths"
    assert np.ptp(eager["losses"]) > 1e-3, "the batches differ"
    np.testing.assert_allclose(compiled["losses"], eager["losses"], rtol=tolerance)
    assert compiled["state"].keys() == eager["state"].keys(), (
        "names are those of the model that is not compiled"
    )
    for name, value in eager["state"].items():
        np.testing.assert_allclose(
            compiled["state"][name], value, rtol=0, atol=tolerance, err_msg=name
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return toys.save(toys.tiny_llama(), tmp_path_factory.mktemp("compile"))


def test_traced_it_is_the_same(folder):
    """All but the last stage, which is a minute of a C++ compiler's time: the graphs are run operation by operation."""
    packed, overrides, tolerance = CASES["packed, recomputed"]
    ((eager, compiled),) = run_distributed(both, 1, folder, packed, "aot_eager", *overrides)
    assert_alike(eager, compiled, tolerance)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_compiled_it_is_the_same(folder, case):
    packed, overrides, tolerance = CASES[case]
    for eager, compiled in run_distributed(both, 2, folder, packed, "inductor", *overrides):
        assert compiled["compiled"] > 0 and eager["compiled"] == 0, "by inductor"
        assert_alike(eager, compiled, tolerance)


def test_what_cannot_be_compiled(folder, monkeypatch):
    with pytest.raises(
        ConfigError, match="model.compile: found true, wanted false at engine.zero 3"
    ):
        config_for("x", "model.compile=true", "engine.zero=3")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ModelError,
        match=r"model.compile: found true, wanted a C\+\+ compiler.* Install g\+\+, name one in CXX",
    ):
        models.load(config_for(folder, "model.compile=true"), toys.tokenizer())
    monkeypatch.setattr(accelerate, "blocks", lambda module: ("", ()))
    monkeypatch.setenv("CXX", "python")  # any program: it is not started
    with pytest.raises(
        ModelError, match="a model with a list of blocks; LlamaForCausalLM has none"
    ):
        models.load(config_for(folder, "model.compile=true"), toys.tokenizer())
