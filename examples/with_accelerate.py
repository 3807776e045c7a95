"""CoBa with Accelerate, several micro-batches a step: `accelerate launch
examples/with_accelerate.py`.

Accelerate divides a loss by its own `gradient_accumulation_steps`; `balance.loss` is divided by the
step's counts already. So that stays 1, and `no_sync` says which micro-batches only accumulate.
"""

from contextlib import nullcontext

import torch
import toy
from accelerate import Accelerator

from balancers import CoBa
from mtl.integrations.loop import Balance


def main(steps: int = 40, micro_batches: int = 2, cpu: bool = False) -> Balance:
    accelerator = Accelerator(cpu=cpu)
    model = toy.model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    balance = Balance(CoBa(window=20, warmup=10), toy.TASKS)
    rank, world = accelerator.process_index, accelerator.num_processes

    def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(accelerator.device) for name, tensor in toy.batch(rows, seed).items()
        }

    valid = batch(16, seed=-1 - rank)
    for step in range(steps):
        with torch.no_grad():
            probe = balance.mean(*toy.token_losses(model, valid))
        micros = [
            batch(4, seed=(step * micro_batches + i) * world + rank) for i in range(micro_batches)
        ]
        balance.begin(
            torch.cat([micro["task"].repeat_interleave(toy.LENGTH - 1) for micro in micros]),
            valid_loss=probe,
        )
        for i, micro in enumerate(micros):
            with accelerator.no_sync(model) if i + 1 < micro_batches else nullcontext():
                accelerator.backward(balance.loss(*toy.token_losses(model, micro)))
        optimizer.step()
        optimizer.zero_grad()
        balance.end()
    accelerator.print(
        f"losses {dict(zip(toy.TASKS, balance.losses.round(3).tolist(), strict=True))}, weights "
        f"{balance.weights.round(3)}"
    )
    return balance


if __name__ == "__main__":
    main()
