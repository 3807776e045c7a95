"""The mix-in in Hugging Face's Trainer and TRL's SFTTrainer: their own loss where weights make it that, and what they
refuse.
"""

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
import toys
from distributed import run_distributed

from balancers import CoBa, Equal, GradNorm, Static, Tokens
from mtl import comm

NAMES = ["code", "math", "law"]


def rows(n: int, seed: int, task: str | None = None) -> list[dict[str, Any]]:
    """Of unequal length and number of targets; tasks in turn."""
    rng, made = np.random.default_rng(seed), []
    for i in range(n):
        ids = rng.integers(0, 250, int(rng.integers(4, 20))).tolist()
        labels = [token if rng.random() < 0.5 else -100 for token in ids]
        made.append({"input_ids": ids, "labels": [*labels[:-1], ids[-1]], "task": task or NAMES[i % 3]})
    return made


def pad(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*each, *[fill] * (width - len(each))] for each in values])

    ids = [row["input_ids"] for row in batch]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in batch], -100),
        "attention_mask": padded([[1] * len(each) for each in ids], 0),
    }


VALID = {name: rows(5, 7 + k, name) for k, name in enumerate(NAMES)}


def arguments(folder: str, kind: Any, **changes: Any) -> Any:
    # 8 rows a step, however many processes: 4 micro-batches of 2, dealt over them.
    given = {
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // comm.world(),
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
    }
    return kind(**(given | changes))


def outcome(trainer: Any) -> dict[str, Any]:
    return {
        "parameters": {n: p.detach().numpy().copy() for n, p in trainer.model.named_parameters()},
        "log": trainer.state.log_history,
        "weights": trainer.balance.weights.copy() if hasattr(trainer, "balance") else None,
    }


def huggingface() -> dict[str, Any]:
    """Runs of the Trainer on this process group."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from mtl.integrations.trainer import Balanced

    class BalancedTrainer(Balanced, Trainer):
        pass

    def train(
        folder: str, resume: bool = False, kind: Any = BalancedTrainer, changes: dict | None = None, **more: Any
    ) -> dict:
        trainer = kind(
            toys.tiny_llama(),
            arguments(folder, TrainingArguments, **(changes or {})),
            data_collator=pad,
            train_dataset=Dataset.from_list(rows(40, 0)),
            **more,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return outcome(trainer)

    with tempfile.TemporaryDirectory() as folder:
        found = {
            "own": train(folder, kind=Trainer),
            "tokens": train(folder, balancer=Tokens(), tasks=NAMES),
            "static": train(folder, balancer=Static([0.8, 0.15, 0.05]), tasks=NAMES),
            "static, not averaged": train(
                folder,
                balancer=Static([0.8, 0.15, 0.05]),
                tasks=NAMES,
                changes={"average_tokens_across_devices": False},
            ),
        }
        coba = {"tasks": NAMES, "eval_dataset": VALID, "probe_groups": 2}

        def balancer() -> CoBa:
            return CoBa(window=3, warmup=1)

        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        shared = [folder]
        if comm.active():
            torch.distributed.broadcast_object_list(shared)
        at_once, broken = f"{shared[0]}/at once", f"{shared[0]}/broken"
        found["at once"] = train(at_once, changes=saving, balancer=balancer(), **coba)
        train(broken, changes=saving | {"max_steps": 3}, balancer=balancer(), **coba)
        found["resumed"] = train(broken, resume=True, changes=saving, balancer=balancer(), **coba)
        comm.barrier()
        if comm.world() == 1:
            found["refused"] = refusals(train, folder)
        comm.barrier()
    return found


def refusals(train: Any, folder: str) -> dict[str, str]:
    cases = {
        "gradients": {"balancer": GradNorm(), "tasks": NAMES},
        "validation": {"balancer": CoBa(window=3, warmup=1), "tasks": NAMES},
        "column": {"balancer": Equal(), "tasks": NAMES, "task_column": "kind"},
        "name": {"balancer": Equal(), "tasks": ["code", "math", "lore"]},
        "smoothing": {"balancer": Equal(), "tasks": NAMES, "changes": {"label_smoothing_factor": 0.1}},
    }
    found = {}
    for name, case in cases.items():
        try:
            train(folder, **case)
        except ValueError as error:
            found[name] = str(error)
    return found


def sft() -> dict[str, Any]:
    """Runs of TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from mtl.integrations.trainer import Balanced

    class BalancedSFT(Balanced, SFTTrainer):
        pass

    texts = [{"prompt": f"{i} +", "completion": f" {'x' * (i % 5 + 1)}", "task": NAMES[i % 3]} for i in range(24)]
    valid = {name: Dataset.from_list([row for row in texts if row["task"] == name]) for name in NAMES}

    def make(kind: Any, folder: str, changes: dict | None = None, **more: Any) -> Any:
        args = arguments(folder, SFTConfig, max_length=64, bf16=False, **(changes or {}))  # TRL would autocast
        return kind(
            toys.tiny_llama(), args, train_dataset=Dataset.from_list(texts), processing_class=toys.tokenizer(), **more
        )

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trainer in {
            "own": make(SFTTrainer, folder),
            "tokens": make(BalancedSFT, folder, balancer=Tokens(), tasks=NAMES),
            "coba": make(
                BalancedSFT, folder, balancer=CoBa(window=3, warmup=1), tasks=NAMES, eval_dataset=valid, probe_groups=2
            ),
        }.items():
            trainer.train()
            found[name] = outcome(trainer)
        for what in ("packing", "padding_free"):
            try:
                make(BalancedSFT, folder, {what: True}, balancer=Tokens(), tasks=NAMES)
            except ValueError as error:
                found[what] = str(error)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_distributed(huggingface, 1)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_distributed(huggingface, 2)


def assert_close(found: dict[str, Any], wanted: dict[str, Any], atol: float = 2e-7) -> None:
    for name, array in wanted["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], array, rtol=0, atol=atol, err_msg=name)


def losses(run: dict[str, Any], tag: str = "loss") -> list[float]:
    return [line[tag] for line in run["log"] if tag in line]


def test_tokens_is_the_trainers_own_loss(alone):
    assert_close(alone["tokens"], alone["own"])
    np.testing.assert_allclose(
        losses(alone["tokens"]), losses(alone["own"]), atol=2e-4
    )  # the Trainer rounds what it logs
    first = toys.tiny_llama().get_output_embeddings().weight.detach().numpy()
    assert np.abs(alone["own"]["parameters"]["lm_head.weight"] - first).max() > 1e-3, "it has moved"


def test_two_processes_make_the_same_update(alone, two):
    for rank in two:
        for name in ("own", "tokens", "static"):
            assert_close(rank[name], alone[name], 1e-6)
        assert_close(rank["static, not averaged"], alone["static"], 1e-6)


def test_weights_act(alone):
    name = "lm_head.weight"
    difference = alone["static"]["parameters"][name] - alone["tokens"]["parameters"][name]
    assert np.abs(difference).max() > 1e-3
    assert losses(alone["static"], "code/weight") == [0.8] * 3 and len(losses(alone["static"], "law/loss")) == 3


@pytest.mark.parametrize("world", (1, 2))
def test_resumed_it_goes_on_bit_for_bit(world, alone, two):
    for run in [alone] if world == 1 else two:
        for name, array in run["at once"]["parameters"].items():
            np.testing.assert_array_equal(run["resumed"]["parameters"][name], array, err_msg=name)
        np.testing.assert_array_equal(run["resumed"]["weights"], run["at once"]["weights"])
        assert len(set(run["at once"]["weights"])) == 3, "CoBa is past its warm-up"


def test_the_probe_is_the_same_on_two_processes(alone, two):
    np.testing.assert_allclose(two[0]["at once"]["weights"], alone["at once"]["weights"], rtol=1e-4)


def test_what_is_refused(alone):
    found = alone["refused"]
    assert "reads Signal.TRAIN_LOSS|GRAM, wanted token counts" in found["gradients"]
    assert "eval_dataset must map each of ['code', 'math', 'law'] to its rows" in found["validation"]
    assert "no column 'kind': add it to every training row" in found["column"]
    assert "column 'task': found 'law', wanted one of ['code', 'math', 'lore']" in found["name"]
    assert "label smoothing, wanted neither" in found["smoothing"]


def test_trl():
    (found,) = run_distributed(sft, 1)
    assert_close(found["tokens"], found["own"], 1e-6)
    assert len(set(found["coba"]["weights"])) == 3
    for what in ("packing", "padding_free"):
        assert f"found {what}=True, which mixes rows of different tasks in one and forgets their tasks" in found[what]
