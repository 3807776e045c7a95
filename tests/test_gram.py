"""The Gramian is that of one plain process, at every ZeRO stage, and leaves the update as it was."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import torch
import toys
from distributed import run_distributed
from test_equivalence import (
    BF16,
    LORA,
    NAMES,
    PAD,
    STAGES,
    adapted,
    configuration,
    load,
    parameters,
    run_jobs,
    start,
)

from balancers import Signal
from mtl.config import ConfigError
from mtl.data.batches import Layout, TrainBatches, ValidationGroups
from mtl.data.encoded import Encoded, TaskData
from mtl.data.mix import Mix
from mtl.distributed import comm
from mtl.losses.causal_lm import causal_lm
from mtl.train import gram
from mtl.train.step import fetch, train_step

# Examples of each task. In a batch of 7 the rare one is absent from the first batch and there in a later one.
SIZES, EXAMPLES, GROUPS = (30, 20, 2), 7, 2
WEIGHTS = np.array([0.7, 0.1, 0.2])


def examples(task: int, n: int, seed: int) -> list[reference.Example]:
    rng = np.random.default_rng((seed, task))
    made = []
    for _ in range(n):
        length = int(rng.integers(3, 30))
        target = rng.random(length) < 0.5
        target[0], target[-1] = False, True
        made.append((rng.integers(0, 258, length).astype(np.int32), target, task))
    return made


ROWS = {
    "train": [examples(k, n, 0) for k, n in enumerate(SIZES)],
    "validation": [examples(k, 5 - k, 1) for k in range(3)],
}
TASKS = [
    TaskData(
        name,
        *(Encoded.of([row[:2] for row in ROWS[split][k]]) for split in ("train", "validation")),
    )
    for k, name in enumerate(NAMES)
]
MIX = Mix(NAMES, SIZES, SIZES, EXAMPLES, 0)


def layout(packed: bool) -> Layout:
    return Layout(comm.world(), comm.rank(), 40, PAD, packed, 40 if packed else None)


def batch(step: int) -> list[reference.Example]:
    return [ROWS["train"][k][n] for k, n in zip(*MIX.batch(step), strict=True)]


def group(number: int) -> list[reference.Example]:
    cut = ValidationGroups(TASKS, GROUPS, 0, layout(False))
    return [ROWS["validation"][k][n] for k, rows in enumerate(cut.rows(number)) for n in rows]


# --- on every rank


def measure(
    folder: str,
    params: tuple[str, ...] = ("all", "last_layer"),
    packed: bool = False,
    **overrides: object,
) -> dict[str, Any]:
    """Gramians before each of two updates; the parameters after them, and those of the same updates without
    Gramians.
    """
    batches, cut = (
        TrainBatches(TASKS, MIX, layout(packed)),
        ValidationGroups(TASKS, GROUPS, 0, layout(packed)),
    )
    found: dict[str, Any] = {"gram": {}, "valid_gram": {}, "names": {}}
    for key in ("with", "without"):
        trained = start(folder, **overrides)
        found["at first"] = parameters(trained)
        for step in range(2):
            trained.train()
            for which in params if key == "with" else ():
                chosen = gram.select(trained.module, which)
                ours = gram.gradients(
                    trained, causal_lm, batches.by_stream(step), list(chosen.values())
                )
                theirs = gram.gradients(
                    trained, causal_lm, cut.by_stream(step % GROUPS), list(chosen.values())
                )
                if step == 0:
                    found["names"][which] = list(chosen)
                    found["gram"][which], found["valid_gram"][which] = (
                        gram.products(ours, ours),
                        gram.products(theirs, ours),
                    )
            fetched = fetch(lambda s=step: batches.batch(s), len(NAMES))
            train_step(trained, causal_lm, fetched, WEIGHTS, 0.1, NAMES)
        found[key], found["local"] = (
            parameters(trained),
            [p.numel() for p in trained.module.parameters()],
        )
    batches.close()
    return found


CHECKPOINTING = {"model__activation_checkpointing": "true"}
JOBS: dict[str, dict[str, Any]] = {f"llama zero {z}": {"engine__zero": z} for z in STAGES} | {
    "tied zero 1": {"engine__zero": 1, "family": "gpt2", "packed": True},
    "tied checkpointing zero 3": {
        "engine__zero": 3,
        "family": "gpt2",
        "packed": True,
        **CHECKPOINTING,
    },
    "checkpointing adamw zero 2": {
        "engine__zero": 2,
        "optimizer__name": "adamw",
        "optimizer__clip": 0.5,
        **CHECKPOINTING,
    },
    "lora zero 2": {"engine__zero": 2, "params": ("all", "adapter", r"layers\.0\."), **LORA},
    "lora checkpointing zero 3": {"engine__zero": 3, **LORA, **CHECKPOINTING},
    "bf16 zero 2": {"engine__zero": 2, **BF16},
    "autocast zero 3": {"engine__zero": 3, "model__precision": "bf16_autocast"},
}


def run(folders: dict[str, str]) -> dict[str, Any]:
    return run_jobs(folders, {name: (measure, arguments) for name, arguments in JOBS.items()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    makers = {"llama": toys.tiny_llama, "gpt2": toys.tiny_gpt2}
    return {name: toys.save(make(), root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def results(folders) -> dict[str, list[dict[str, Any]]]:
    ranks = run_distributed(run, 2, folders)
    return {name: [rank[name] for rank in ranks] for name in JOBS}


# --- one plain process


def gradients(
    model: torch.nn.Module, rows: list[reference.Example], names: list[str]
) -> np.ndarray:
    """(K, N) float64, zeros where a task is absent."""
    chosen = [dict(model.named_parameters())[name] for name in names]
    found = []
    for loss in reference.task_losses(model, rows, len(NAMES))[0]:
        parts = [torch.zeros_like(p) for p in chosen]
        if loss is not None:
            parts = torch.autograd.grad(loss, chosen, retain_graph=True)
        found.append(torch.cat([p.double().ravel() for p in parts]).numpy())
    return np.array(found)


@pytest.fixture(scope="module")
def wanted(folders, results):
    @cache
    def gramians(name: str, which: str) -> tuple[np.ndarray, np.ndarray]:
        found, folder = results[name][0], folders[JOBS[name].get("family", "llama")]
        model = adapted(folder, found["at first"]) if "lora" in name else load(folder)
        ours, theirs = (
            gradients(model, rows, found["names"][which]) for rows in (batch(0), group(0))
        )
        return ours @ ours.T, theirs @ ours.T

    return gramians


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


PRECISE = [name for name in JOBS if "bf16" not in name and "autocast" not in name]


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks transformers
@pytest.mark.parametrize("name", JOBS)
def test_gramian_of_one_plain_process(name, results, wanted):
    tolerance = 1e-6 if name in PRECISE else 0.03
    for found in results[name]:
        for which in found["names"]:
            assert apart(found["gram"][which], wanted(name, which)[0]) < tolerance
            assert apart(found["valid_gram"][which], wanted(name, which)[1]) < tolerance


def test_an_absent_tasks_row_is_zero(results):
    assert {task for _, _, task in batch(0)} == {0, 1} and any(
        task == 2 for t in range(4) for _, _, task in batch(t)
    )
    grams, valid_grams = (
        results["llama zero 3"][0][name]["all"] for name in ("gram", "valid_gram")
    )
    assert not grams[2].any() and not grams[:, 2].any() and np.diag(grams)[:2].min() > 0
    assert valid_grams[2, 0] != 0 and not valid_grams[:, 2].any()


@pytest.mark.parametrize("name", JOBS)
def test_the_update_does_not_notice(name, results):
    found = results[name][0]  # rank 0 has the whole parameters
    assert found["without"].keys() == found["at first"].keys() and found["without"]
    for parameter, array in found["without"].items():
        np.testing.assert_array_equal(found["with"][parameter], array, err_msg=parameter)
    assert any(
        (found["with"][parameter] != array).any() for parameter, array in found["at first"].items()
    )


@pytest.mark.parametrize(
    "name", [name for name in JOBS if name.endswith("zero 3") and "lora" not in name]
)
def test_partitioned_for_real(name, results):
    assert not any(results[name][0]["local"])


def test_parameters_chosen():
    names = list(gram.select(toys.tiny_llama(), "last_layer"))
    assert len(names) == 9 and all(name.startswith("model.layers.1.") for name in names)
    assert list(gram.select(toys.tiny_gpt2(), r"wpe|ln_f\.bias")) == [
        "transformer.wpe.weight",
        "transformer.ln_f.bias",
    ]
    assert len(gram.select(toys.tiny_gpt2(), "all")) == len(list(toys.tiny_gpt2().parameters()))


@pytest.mark.parametrize("which", ["adapter", "lm_haed"])
def test_parameters_that_do_not_exist(which):
    with pytest.raises(
        ValueError, match=rf"found '{which}', which no trainable parameter matches.*lm_head\.weight"
    ):
        gram.select(toys.tiny_llama(), which)


def test_products_are_summed_in_double_precision(monkeypatch):
    monkeypatch.setattr(gram, "CHUNK", 7)
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = gram.products(rows * 1e-20, rows * 1e-20)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, (rows.double() @ rows.double().T).numpy() * 1e-40, rtol=1e-6)


def test_a_signal_that_is_not_measured_is_refused(monkeypatch):
    monkeypatch.setattr(gram, "MEASURED", Signal.TOKENS)
    wanted = "balancer: found CoBa, which needs Signal.VALID_LOSS, wanted one that needs nothing but Signal.TOKENS"
    with pytest.raises(ConfigError, match=wanted):
        gram.supply(Signal.VALID_LOSS, toys.tiny_llama(), configuration("m"))
