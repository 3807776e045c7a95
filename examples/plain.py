"""CoBa in a plain PyTorch loop: the five lines that end in `#`. Under torchrun with DDP nothing
more changes.
"""

import torch
import toy

from balancers import CoBa
from mtl.integrations.loop import Balance


def main(steps: int = 60) -> Balance:
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balance = Balance(CoBa(window=20, warmup=10), toy.TASKS)  #
    valid = toy.batch(16, seed=-1)
    for step in range(steps):
        with torch.no_grad():
            probe = balance.mean(*toy.token_losses(model, valid))  #
        batch = toy.batch(8, seed=step)
        losses, task = toy.token_losses(model, batch)
        balance.begin(task, valid_loss=probe, valid_group=0)  #
        loss = balance.loss(losses, task)  # instead of losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balance.end()  #
    print(
        f"losses {dict(zip(toy.TASKS, balance.losses.round(3).tolist(), strict=True))}, weights "
        f"{balance.weights.round(3).tolist()}"
    )
    return balance


if __name__ == "__main__":
    main()
