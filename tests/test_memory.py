"""The estimate of memory against the bytes that an engine holds."""

import gc

import peft
import pytest
import torch
import toys
from distributed import run_distributed

from mtl.check import memory
from mtl.config import parse
from mtl.distributed import comm, engine
from mtl.train.optimizer import optimizer

COUNTED = ("weights", "gradients", "optimizer", "bf16 gradients", "buffer", "transfers")
# precision, ZeRO stage, LoRA, what is offloaded
CASES = [
    ("fp32", 0, False, "{}"),
    ("fp32", 1, False, "{}"),
    ("fp32", 2, False, "{}"),
    ("fp32", 3, False, "{}"),
    ("bf16", 1, False, "{}"),
    ("bf16", 2, False, "{}"),
    ("bf16", 3, False, "{}"),
    ("bf16", 1, True, "{}"),
    ("bf16", 3, True, "{}"),
    ("fp32", 1, False, "{optimizer: cpu}"),
    ("bf16", 2, False, "{optimizer: cpu}"),
    ("fp32", 3, False, "{optimizer: cpu}"),
    ("bf16", 3, True, "{optimizer: cpu, parameters: cpu}"),
]
LARGEST = 4 * 259 * 64  # bytes of the toy's embeddings in fp32, a sixth of its parameters


def measure(cases: list[tuple]) -> list[dict[str, float]]:
    found = []
    for precision, stage, lora, offload in cases:
        config = parse(f"""
model: {{name: x, precision: {precision}}}
tasks: {{a: {{train: a, validation: a, format: text}}}}
train: {{steps: 5}}
output: x
engine:
  zero: {stage}
  offload: {offload}
  deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0, reduce_bucket_size: 1000, allgather_bucket_size: 1000}}}}
""")
        gc.collect()
        gc.freeze()  # what there is by now is not found below
        made = toys.tiny_llama().to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if lora:
            lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
            made = peft.get_peft_model(made, lora, autocast_adapter_dtype=False)
        parts = {
            part.name: part.bytes
            for part in memory.estimate(config, stage, made, 2, positions=1, targets=1)
        }
        held = engine.Engine(made, config, optimizer(config))
        for last in (
            False,
            True,
            None,
        ):  # at the end in the middle of the second step, where gradients are held
            ids = torch.randint(
                0, 259, (2, 4), generator=torch.Generator().manual_seed(comm.rank())
            )
            held.train()
            held.backward(held.forward(input_ids=ids, labels=ids).loss, last=bool(last))
            if last:
                held.step(1e-3)
        comm.barrier()  # gloo's thread may still hold the last collective's buffer
        gc.collect()
        grads = [
            p.grad for p in held.module.parameters() if p.grad is not None
        ]  # Python may not know of them
        sizes = storages() | {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in grads
        }
        local = [getattr(p, "ds_tensor", p) for p in held.module.parameters()]
        zero = held._engine.optimizer
        state = getattr(zero, "optimizer", zero).state.values()
        flat = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        )
        master = next((getattr(zero, name) for name in flat if hasattr(zero, name)), [])
        assert not {t.data_ptr() for t in master} & {t.data_ptr() for t in local}, (
            "the master weights are the weights"
        )
        found.append({
            "estimate": sum(parts.get(name, 0) for name in COUNTED),
            "total": sum(sizes.values()),
            "weights": (parts["weights"], sum(t.numel() * t.element_size() for t in local)),
            "optimizer": (parts["optimizer"], 4 * sum(t.numel() for s in state for t in [*s.values()] if t.numel() > 1)
                          + 4 * sum(t.numel() for t in master)),
        })  # fmt: skip
    return found


def storages() -> dict[int, int]:
    """Bytes by address of all that tensors hold which were made since gc.freeze."""
    tensors = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"
    ]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.fixture(scope="module")
def measured() -> dict[tuple, dict]:
    return dict(zip(CASES, run_distributed(measure, 2, CASES)[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_estimate_is_what_an_engine_holds(measured, case):
    found = measured[case]
    for name in ("weights", "optimizer"):
        estimated, held = found[name]
        assert held == pytest.approx(estimated, rel=1e-3), (
            name
        )  # the ranks' parts are padded to whole numbers
    # Beside the parts: inputs, and now and then up to two of the largest parameter's gradients on their way into the buckets.
    assert 0.97 * found["estimate"] < found["total"] < 1.03 * found["estimate"] + 2 * LARGEST, case
