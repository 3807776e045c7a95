"""The loop gives every balancer what it declares: each kind of signal at ZeRO 0-3, every balancer at ZeRO 2, two
processes.
"""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import runs
import test_gram
import toys
from distributed import run_distributed
from test_equivalence import NAMES, STAGES, configuration, parameters, start

from balancers import METHODS, Holder, Signal, Signals, make, torchjd
from mtl import build, plugins
from mtl.config import ConfigError
from mtl.data.batches import ValidationGroups
from mtl.data.encoded import TaskData
from mtl.distributed import comm
from mtl.losses.causal_lm import causal_lm
from mtl.output.state import RunState
from mtl.train import evaluate
from mtl.train.loop import train as run_loop

STEPS = 5
KINDS: dict[str, Any] = {  # one balancer for each kind of signal
    "none": "Equal",
    "tokens": "Tokens",
    "train": {"name": "DWA", "period": 1},
    "valid": {"name": "CoBa", "window": 3, "warmup": 1},
    "gram": {"name": "TorchJD", "method": "UPGrad"},
    "replay": "FAMO",
    "valid gram": "MetaWeighting",
}
GRAM_METHODS = ("AlignedMTL", "CAGrad", "IMTLG", "MGDA", "NashMTL", "PCGrad")  # and UPGrad, above
OTHERS: dict[str, Any] = {
    **{method: {"name": "TorchJD", "method": method} for method in GRAM_METHODS},
    "Apart": {
        "name": "Apart",
        "parts": {"fruit": NAMES[:2], "rest": NAMES[2:]},
        "balancer": "GradNorm",
    },
    "Bounded": {"name": "Bounded", "floor": 0.1, "balancer": "GradNorm"},
    "FAMOValid": "FAMOValid",
    "GLS": "GLS",
    "GradNorm": "GradNorm",
    "GradNormValid": "GradNormValid",
    "Grouped": {
        "name": "Grouped",
        "groups": {"fruit": NAMES[:2]},
        "balancer": {"name": "TorchJD", "method": "MGDA"},
    },
    "LBTW": "LBTW",
    "LBTWValid": "LBTWValid",
    "RLW": "RLW",
    "Scheduled": {"name": "Scheduled", "warmup": 2, "balancer": {"name": "LBTW"}},
    "Static": {"name": "Static", "weights": [3, 2, 1]},
    "Uncertainty": "Uncertainty",
}


class Memory:
    """Checkpoints that are not written, and a tracker that remembers."""

    def __init__(self, output: Path):
        self.output, self.lines, self.said = output, [], []

    def save(self, *_: Any, **__: Any) -> Path:
        return self.output

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def say(self, text: str) -> None:
        self.said.append(text)


class Recorder(Holder):
    """Remembers what the loop measured."""

    def update(self, signals: Signals) -> np.ndarray:
        self.seen = [*getattr(self, "seen", []), signals]
        return super().update(signals)


def training_losses(trained: Any) -> np.ndarray:
    """(K,) of every training row, nats per target token."""
    rows = [TaskData(each.name, each.train, each.train) for each in test_gram.TASKS]
    return evaluate.full_pass(
        trained, causal_lm, ValidationGroups(rows, 1, 0, test_gram.layout(packed=False)), 3
    ).losses


def train(trained: Any, config: Any, given: Any, seed: int = 0) -> dict[str, Any]:
    holder = Recorder(make(given), NAMES)
    data = build.in_memory(config, toys.tokenizer(), test_gram.TASKS)
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory(Path(folder))
        run = build.build(config, data, engine=trained, packed=False, holder=holder, say=memory.say)
        run.checkpoints, run.trackers = memory, [memory] if comm.rank() == 0 else []
        with patch.object(evaluate, "probe", wraps=evaluate.probe) as probe:
            run_loop(run, RunState())
    run.batches.close()
    after = training_losses(trained)
    weights = [
        [line[f"train/{name}/weight"] for name in NAMES]
        for _, line in memory.lines
        if "train/loss" in line
    ]
    return {
        "weights": np.array(weights),
        "seen": getattr(holder, "seen", []),
        "probes": probe.call_count,
        "after": after,
        "parameters": parameters(trained),
    }


def every_kind(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for zero in STAGES:
        settings = {
            "engine__zero": zero,
            "optimizer__lr": 0.05,
            "batch__examples": test_gram.EXAMPLES,
            "batch__tokens": 40,
            "batch__max_length": 40,
            "evaluate__every": 100,
            "evaluate__probe": f"{{every: 1, groups: {test_gram.GROUPS}, examples: all}}",
            "gram__every": 2,
            "schedule__name": "constant",
        }
        config = configuration(folder, **settings)
        for name, given in {**KINDS, **(OTHERS if zero == 2 else {})}.items():
            trained = start(folder, **settings)
            before = training_losses(trained)
            found[name, zero] = train(trained, config, given) | {"before": before}
    often = settings | {"evaluate__every": 3}
    return found | {
        ("full passes", zero): train(
            start(folder, **often), configuration(folder, **often), KINDS["valid"]
        )
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = toys.save(toys.tiny_llama(), tmp_path_factory.mktemp("model"))
    return run_distributed(every_kind, 2, folder)[0]


def test_every_method_is_here():
    named = {
        each if isinstance(each, str) else each["name"]
        for each in (*KINDS.values(), *OTHERS.values())
    }
    assert named == set(METHODS)
    assert {make(each).method for each in (KINDS["gram"], *map(OTHERS.get, GRAM_METHODS))} == set(
        torchjd.METHODS
    )


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_signal_at_every_stage(kind, zero, results):
    found, wanted = results[kind, zero], results[kind, 0]
    assert found["weights"].shape == (STEPS, 3)
    # Loose for CoBa's sake: a softmax of slopes through three probes enlarges the rounding of the losses.
    np.testing.assert_allclose(found["weights"], wanted["weights"], rtol=1e-3, atol=1e-4)
    for name, array in wanted["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], array, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_every_balancer_trains(name, results):
    """All tasks get better, under the weights that the method gives for what was measured."""
    found, holder = results[name, 2], Holder(make({**KINDS, **OTHERS}[name]), NAMES)
    assert [signals.step for signals in found["seen"]] == list(range(STEPS))
    np.testing.assert_array_equal(
        found["weights"], [holder.update(signals) for signals in found["seen"]]
    )
    assert (found["after"] < found["before"] - 0.03).all()
    if name != "none":
        assert np.abs(found["weights"] - 1 / 3).max() > 1e-6


def aligned(gram: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.T @ [0.5, 0.5]


def conflict_averse(gram: np.ndarray, c: float = 0.5) -> np.ndarray:
    part = np.linspace(0, 1, 100_001)
    simplex, mean = np.stack([part, 1 - part]), np.array([0.5, 0.5])
    length = c * np.sqrt(mean @ gram @ mean)
    norms = np.sqrt((simplex * (gram @ simplex)).sum(0))
    best = np.argmin(mean @ gram @ simplex + length * norms)
    return mean + length / norms[best] * simplex[:, best]


def nash(
    gram: np.ndarray,
) -> np.ndarray:  # w_i <g_i, sum_j w_j g_j> = 1/2 for both: the update's norm is 1
    norms = np.sqrt(np.diag(gram))
    return 1 / (norms * np.sqrt(2 * (1 + gram[0, 1] / norms.prod())))


BY_HAND = {  # the published rules, solved for two tasks
    "AlignedMTL": aligned,
    "CAGrad": conflict_averse,
    "IMTLG": lambda gram: np.sqrt(np.diag(gram))[::-1] / np.sqrt(np.diag(gram)).sum(),
    "MGDA": lambda gram: (np.diag(gram)[::-1] - gram[0, 1]) / (np.trace(gram) - 2 * gram[0, 1]),
    "NashMTL": nash,
    "PCGrad": lambda gram: 1 - np.minimum(gram[0, 1], 0) / np.diag(gram),
    "gram": lambda gram: 0.5 - 0.5 * np.minimum(gram[0, 1], 0) / np.diag(gram),  # UPGrad
}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_are_the_published_rules_of_the_recorded_gramian(name, results):
    found, measured = results[name, 2], 0
    for signals, weights in zip(found["seen"], found["weights"], strict=True):
        if signals.gram is not None:
            present = np.diag(signals.gram) > 0
            gram = signals.gram[np.ix_(present, present)] / np.diag(signals.gram)[present].mean()
            assert present.sum() == 2, "a task is absent from the batch"
            np.testing.assert_allclose(weights[present], BY_HAND[name](gram), rtol=2e-4)
            measured += 1
    assert measured == 3


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_only_what_is_declared_is_measured(name, results):
    needs = make({**KINDS, **OTHERS}[name]).needs
    for signals in results[name, 2]["seen"]:
        due = {
            Signal.TOKENS: True,
            Signal.TRAIN_LOSS: signals.step > 0,
            Signal.REPLAY_LOSS: signals.step > 0,
            Signal.VALID_LOSS: True,
            Signal.GRAM: signals.step % 2 == 0,
            Signal.VALID_GRAM: signals.step % 2 == 0,
        }
        for flag, is_due in due.items():
            assert (getattr(signals, flag.name.lower()) is not None) == (
                flag in needs and is_due
            ), (flag, signals.step)


def test_a_full_pass_spares_the_probe(results):
    """At steps 0 and 3, whose groups differ; the losses are the same to the last bit. Step 0 has a full pass in both runs."""
    probed, spared = results["valid", STAGES[-1]], results["full passes", STAGES[-1]]
    assert (probed["probes"], spared["probes"]) == (STEPS - 1, STEPS - 2)
    assert spared["seen"][3].valid_group != 0
    for one, other in zip(probed["seen"], spared["seen"], strict=True):
        assert one.valid_group == other.valid_group
        np.testing.assert_array_equal(one.valid_loss, other.valid_loss)


def test_the_replayed_batch_has_been_learned(results):
    """Its examples' losses after the update: near those before it, and on the whole lower."""
    for signals in results["replay", 2]["seen"][1:]:
        fall = (signals.train_loss - signals.replay_loss)[~np.isnan(signals.train_loss)]
        assert 0 < fall.sum() and np.abs(fall).max() < 1


def test_tasks_of_a_group_count_as_one(tmp_path):
    path, short = str(runs.write(tmp_path)), ["tasks.copy.group=short", "tasks.chat.group=short"]
    config = plugins.read(path, [*short, "balancer={name: Static, weights: {short: 3, prose: 1}}"])
    np.testing.assert_allclose(plugins.holder(config).update(Signals(0)), [0.375, 0.375, 0.25])
    with pytest.raises(
        ConfigError,
        match=r"x.yaml:\d+: balancer: Grouped groups: .*no group with the name of a task",
    ):
        plugins.read(path, ["tasks.copy.group=prose"])


def test_a_balancer_from_outside_within_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrapped.py").write_text(
        "from balancers import Static\nclass Mine(Static):\n    def __init__(self, code): super().__init__(code)\n"
    )
    path, inner = (
        str(runs.write(tmp_path)),
        "balancer.balancer={name: 'wrapped:Mine', code: [6, 3, 1]}",
    )
    settings = ["balancer={name: Bounded, floor: 0.2, balancer: CoBa}", inner]
    holder = plugins.holder(plugins.read(path, settings, ["wrapped"]), ["wrapped"])
    np.testing.assert_allclose(
        holder.update(Signals(0)), np.array([0.6, 0.3, 0.1]) * 4 / 7 + 1 / 7
    )  # the floor mixes in 3/7
    assert holder.state_dict()["meta"]["settings"]["balancer"]["method"] == "wrapped:Mine"
    with pytest.raises(
        ConfigError,
        match="balancer.balancer: found 'wrapped:Mine', code from outside.*--allow-code wrapped",
    ):
        plugins.read(path, settings)
    grouped = plugins.read(
        path,
        [
            *settings[:1],
            "tasks.copy.group=short",
            "tasks.chat.group=short",
            "balancer.balancer=Tokens",
        ],
    )
    assert plugins.holder(grouped).state_dict()["meta"]["tasks"] == ["copy", "chat", "prose"]
    with pytest.raises(
        ConfigError,
        match="--set balancer.balancer.window=0: balancer.balancer.window: CoBa window: found 0",
    ):
        plugins.read(
            path, [*settings[:1], "balancer.balancer={name: CoBa}", "balancer.balancer.window=0"]
        )


CASES = {
    "gradients, with dropout": [
        "balancer=GradNorm",
        "gram={params: adapter, every: 3}",
        "model.lora={r: 4, dropout: 0.3}",
    ],
    "validation gradients": ["balancer=MetaWeighting", "gram={params: last_layer, every: 2}"],
    "replay, patience": [
        "balancer=FAMO",
        "evaluate.patience={evaluations: 1, action: freeze, margin: 0.5}",
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(case, tmp_path):
    yaml = runs.write(tmp_path)
    settings = [
        "objective=outside:causal_lm",
        "engine.zero=1",
        "evaluate.every=4",
        "checkpoint.every=5",
        *CASES[case],
    ]
    at_once, killed = tmp_path / "at once", tmp_path / "killed"
    runs.train(yaml, *settings, f"output={at_once}").well()
    assert runs.train(yaml, *settings, f"output={killed}", MISFORTUNE="kill step 7 0").codes == [-9]
    runs.train(yaml, *settings, f"output={killed}", resume=True).well()
    assert runs.untimed(killed) == runs.untimed(at_once)
    weights = [
        [line[f"train/{task}/weight"] for task in ("copy", "chat", "prose")]
        for line in runs.metrics(at_once)
        if "train/loss" in line
    ]
    assert len({tuple(each) for each in weights}) > 3


def test_gradients_that_cannot_be_had(tmp_path):
    yaml = runs.write(tmp_path)
    ended = runs.train(
        yaml, "balancer=GradNorm", "gram.params=no_such_layer", f"output={tmp_path / 'run'}"
    )
    assert (
        ended.codes == [1]
        and "gram.params: found 'no_such_layer', which no trainable parameter matches" in ended.err
    )
    ended = runs.train(
        yaml, "balancer=GradNorm", "gram.params=adapter", f"output={tmp_path / 'run'}"
    )
    assert ended.codes == [1] and "Adapters need model.lora" in ended.err


def test_the_run_ends_when_all_tasks_are_done(tmp_path):
    yaml = runs.write(tmp_path)
    # Nothing counts as an improvement but the first loss, so all have stalled at the second pass.
    patience = "evaluate.patience={evaluations: 1, action: drop, margin: 100.0}"
    ended = runs.train(
        yaml, "evaluate.every=3", "balancer=Equal", patience, f"output={tmp_path / 'run'}"
    ).well()
    steps = [line["step"] for line in runs.metrics(tmp_path / "run") if "train/loss" in line]
    assert steps == [0, 1, 2]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000003"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    for task in ("copy", "chat", "prose"):
        assert f"{task} is done: its lowest loss is" in ended.err
    again = runs.train(
        yaml,
        "evaluate.every=3",
        "balancer=Equal",
        patience,
        f"output={tmp_path / 'run'}",
        resume=True,
    ).well()
    assert [
        line["step"] for line in runs.metrics(tmp_path / "run") if "train/loss" in line
    ] == steps, again.err
