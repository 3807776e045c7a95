"""How often a step makes the host wait for the device, counted on the CPU by the operations that do so on any device."""

from collections import Counter
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import toys
from distributed import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

from mtl.config import parse
from mtl.data.collate import MicroBatch, collate
from mtl.distributed import comm, engine
from mtl.losses.causal_lm import causal_lm
from mtl.models import load
from mtl.train.optimizer import optimizer
from mtl.train.step import fetch, train_step

NAMES = ["a", "b"]


class Waits(TorchDispatchMode):
    """Counts what needs a value, or a size that depends on values, on the host. `.cpu()` shows on a device only."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def batch(micros: int) -> list[MicroBatch]:
    rng = np.random.default_rng(0)
    row = [
        (rng.integers(0, 257, n).astype(np.int32), np.arange(n) >= 2, k)
        for k, n in ((0, 9), (1, 14))
    ]
    return [collate([row, row], 257, packed=True) for _ in range(micros)]


def count(folder: str) -> list[int]:
    """Of a step with 1 and with 4 micro-batches."""
    config = parse(
        f"model: {{name: {folder}, precision: bf16}}\ntasks: {{a: {{train: a, validation: a, format: text}}}}\n"
        "train: {steps: 1}\nengine: {zero: 2}\noutput: x"
    )
    trained = engine.Engine(load.load(config, toys.tokenizer()), config, optimizer(config))

    def step(micros: int) -> int:
        made = batch(micros)
        with Waits() as waits:
            train_step(trained, causal_lm, fetch(lambda: made, 2), np.full(2, 0.5), 1e-3, NAMES)
        return sum(waits.counts.values())

    step(1)
    return [step(1), step(4)]


def test_a_step_waits_so_often_and_no_more(tmp_path):
    one, four = run_distributed(count, 1, toys.save(toys.tiny_llama(), tmp_path))[0]
    each = (four - one) / 3
    # A micro-batch: whether rows are packed, asked by transformers where it makes the mask.
    assert 0 < each <= 1
    # A step: all ranks made their batch, its positions, each task's tokens, DeepSpeed's three looks at the gradient's norm, and ours.
    assert 0 < one - each <= 6 + len(NAMES)


def through_the_host_group() -> dict[str, object]:
    """Collectives of CPU tensors once there is a group for them, as under NCCL, and which group each took."""
    comm.open_host_group(timedelta(minutes=1))
    host, taken = comm._host[1], []
    for name in ("all_reduce", "broadcast", "all_gather_object"):
        plain = getattr(dist, name)

        def noted(*args, group=None, plain=plain, **kwargs):
            taken.append(group is host)
            return plain(*args, group=group, **kwargs)

        setattr(dist, name, noted)
    found = {
        "sum": comm.sum_(torch.tensor([comm.rank() + 1])).item(),
        "sent": comm.broadcast_(torch.tensor([comm.rank() + 5]), source=1).item(),
    }
    try:
        comm.together(lambda: 1 // comm.rank())
    except (ZeroDivisionError, comm.RankError) as error:
        found["error"] = type(error).__name__
    return found | {"taken": taken, "device": comm._group(torch.empty(0, device="meta"))}


def test_small_host_tensors_do_not_go_through_the_device_group():
    ranks = run_distributed(through_the_host_group, 2)
    assert [r["error"] for r in ranks] == ["ZeroDivisionError", "RankError"]
    for found in ranks:
        assert (found["sum"], found["sent"], found["device"]) == (3, 6, None)
        assert found["taken"] == [True] * 4  # sum, broadcast, and together: its vote and its texts
