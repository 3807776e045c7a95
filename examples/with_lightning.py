"""CoBa in a LightningModule: `begin` and `loss` in `training_step`, `end` after it, the state in
Lightning's checkpoints.

Needs lightning (`pip install lightning`). With `accumulate_grad_batches` above 1 Lightning divides
the loss: leave it at 1.
"""

from typing import Any

import lightning as L
import torch
import toy
from torch import Tensor

from balancers import CoBa
from mtl.integrations.loop import Balance


class Multitask(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = toy.model()
        self.balance = Balance(CoBa(window=20, warmup=10), toy.TASKS)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.eval()
        with torch.no_grad():
            valid = {
                name: tensor.to(self.device)
                for name, tensor in toy.batch(16, seed=-1 - self.global_rank).items()
            }
            probe = self.balance.mean(*toy.token_losses(self.model, valid))
        self.train()
        losses, task = toy.token_losses(self.model, batch)
        self.balance.begin(task, valid_loss=probe)
        return self.balance.loss(losses, task)

    def on_train_batch_end(self, *_: Any) -> None:
        losses = self.balance.end()
        self.log_dict(
            {f"{name}/loss": float(loss) for name, loss in zip(toy.TASKS, losses, strict=True)}
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["balance"] = self.balance.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.balance.load_state_dict(checkpoint["balance"])


def main(steps: int = 40, **trainer: Any) -> Multitask:
    module, batches = Multitask(), [toy.batch(8, seed) for seed in range(steps)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    L.Trainer(max_steps=steps, max_epochs=1, **trainer).fit(module, loader)
    print(f"weights {module.balance.weights.round(3).tolist()}")
    return module


if __name__ == "__main__":
    main()
