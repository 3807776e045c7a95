"""What is offloaded changes where state lies, not what is computed."""

import tempfile
from pathlib import Path

import peft
import pytest
import torch
import toys
from distributed import run_distributed

from mtl.config import parse
from mtl.distributed import comm, engine
from mtl.losses import head
from mtl.train.optimizer import optimizer

# precision, ZeRO stage, LoRA, what is offloaded, whether it is also resumed. In bf16 not stage 1, where gradients that are
# offloaded are rounded once more: after the ranks' mean, as at stages 2 and 3.
CPU = [
    ("fp32", 1, False, "{optimizer: cpu}", False),
    ("fp32", 2, False, "{optimizer: cpu}", True),
    ("fp32", 3, False, "{parameters: cpu}", False),
    ("fp32", 3, False, "{optimizer: cpu, parameters: cpu}", True),
    ("bf16", 2, False, "{optimizer: cpu}", False),
    ("bf16", 3, True, "{optimizer: cpu, parameters: cpu}", True),
]
NVME = [
    ("fp32", 3, False, "{optimizer: nvme, nvme_path: DISK}", False),
    ("bf16", 3, False, "{optimizer: nvme, parameters: nvme, nvme_path: DISK}", False),
    ("bf16", 3, False, "{optimizer: cpu, parameters: nvme, nvme_path: DISK}", True),
    ("fp32", 3, True, "{optimizer: nvme, parameters: cpu, nvme_path: DISK}", False),
]


def build(precision: str, stage: int, lora: bool, offload: str) -> engine.Engine:
    config = parse(f"""
model: {{name: x, precision: {precision}}}
tasks: {{a: {{train: a, validation: a, format: text}}}}
train: {{steps: 5}}
optimizer: {{lr: 1.0e-3, weight_decay: 0.1}}
output: x
engine: {{zero: {stage}, offload: {offload}, deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}}}
""")
    made = toys.tiny_llama().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if lora:
        torch.manual_seed(0)
        made = peft.get_peft_model(
            made, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear")
        )
    head.install(made)
    return engine.Engine(made, config, optimizer(config))


def train(trained: engine.Engine, steps: range) -> dict[str, torch.Tensor]:
    """Two micro-batches a step; the trained parameters after them."""
    for step in steps:
        for micro in range(2):
            ids = torch.randint(
                0, 259, (6, 12), generator=torch.Generator().manual_seed(10 * step + micro)
            )
            mine = ids.chunk(trained.world)[comm.rank()]
            trained.train()
            trained.backward(trained.forward(input_ids=mine, labels=mine).loss, last=micro == 1)
        trained.step(0.001)
    return trained.state_dict(trainable_only=True)


def work(cases: list[tuple], folder: str) -> list[dict[str, float]]:
    """Per case the largest difference to the run without offloading, as it ended and as it was resumed from a checkpoint in
    the middle; and how far that run went."""
    plain, found = {}, []
    for n, (precision, stage, lora, offload, resumed) in enumerate(cases):
        kind = precision, stage, lora
        if kind not in plain:
            stayed = build(*kind, "{}")
            plain[kind] = stayed.state_dict(trainable_only=True), train(stayed, range(3))
        begin, expected = plain[kind]
        saved = Path(folder) / str(n) / "engine"
        moved = build(*kind, offload.replace("DISK", f"{folder}/disk"))
        train(moved, range(2))
        moved.save(saved)
        found.append(
            {
                "ended": distance(expected, train(moved, range(2, 3))),
                "moved": distance(expected, begin),
            }
        )
        if resumed:
            again = build(*kind, offload.replace("DISK", f"{folder}/another"))
            again.load(saved)
            found[-1]["resumed"] = distance(expected, train(again, range(2, 3)))
        elif "optimizer: nvme" in offload:
            for load in (
                lambda one, at: one.load(at),
                lambda one, at: one.reshard(at, Path(folder) / "scratch", 1),
            ):
                with pytest.raises(ValueError, match="cannot be resumed"):
                    load(moved, saved)
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(
        (float((one[name].float() - other[name].float()).abs().max()) for name in one), default=0.0
    )


def check(cases: list[tuple]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_distributed(work, 2, cases, folder)[0]
    for case, differ in zip(cases, found, strict=True):
        limit = 1e-6 if case[0] == "fp32" else 0.0  # the norm that clips is summed in another order
        assert differ.pop("moved") > 1e-3
        assert differ.keys() == ({"ended", "resumed"} if case[-1] else {"ended"})
        assert max(differ.values()) <= limit, (case, differ)


def test_on_the_cpu():
    check(CPU)


@pytest.mark.slow  # it compiles DeepSpeed's async_io op once: minutes
def test_on_nvme():
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        pytest.skip("DeepSpeed's async_io op needs libaio: apt-get install libaio-dev")
    check(NVME)
