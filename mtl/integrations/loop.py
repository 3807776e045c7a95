"""Balanced losses in any PyTorch loop, with or without a process group.

balance = Balance(CoBa(window=40, warmup=15), ["code", "math"])
for batch in loader:
    balance.begin(task, valid_loss=probe())  # the task of each target token of this rank
    losses = F.cross_entropy(logits, labels, reduction="none")
    balance.loss(losses, task).backward()    # once for each micro-batch
    optimizer.step()
    balance.end()
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balancers import Balancer, Holder, Signal, Signals
from mtl.distributed import comm
from mtl.losses.terms import Terms, combine

MEASURED_HERE = Signal.TOKENS | Signal.TRAIN_LOSS
FIRST_STEP = {Signal.VALID_LOSS: 0, Signal.GRAM: 0, Signal.VALID_GRAM: 0, Signal.REPLAY_LOSS: 1}


class Balance:
    """Weighs the tasks' losses, step by step: `begin`, `loss` for each micro-batch, `end`.

    The loss of a step is `sum_k w_k loss_k`, where loss_k is task k's loss in nats per target token
    over all micro-batches of all ranks. Where there is a process group, gradients must be averaged
    over its ranks, as DDP, FSDP and DeepSpeed do.

    Args:
        balancer: the rule.
        tasks: K names, in the order of every (K,) array; a task's number is its place here.
        loss_weight: (K,) factors on the balancer's weights.

    Attributes:
        holder: the balancer with its state (`holder.explain`).
        weights: (K,) float64, those of the newest step.
        losses: (K,) float64, nats per target token of the last complete step, nan = absent; None
            before.
        step: complete steps.
    """

    def __init__(
        self, balancer: Balancer, tasks: Sequence[str], loss_weight: Sequence[float] | None = None
    ) -> None:
        self.holder = Holder(balancer, tasks, loss_weight)
        self.weights = self.holder.weights
        self.losses: np.ndarray | None = None
        self.step = 0
        self._present = np.ones(len(tasks), dtype=bool)
        self._tokens: Tensor | None = None  # (K,) of the step that is open
        self._sums: Tensor | None = None

    def begin(self, task: Tensor, **signals: Any) -> np.ndarray:
        """Open a step: count its target tokens over all ranks, and set its weights. A collective.

        Args:
            task: (T,) int64, the task of each target token of all of this rank's micro-batches; T
                may be 0.
            signals: what the balancer reads and only the caller can measure, as `balancers.Signals`
                names it: `valid_loss` (`valid_base`, `valid_group`), `gram` ... Steps where nothing
                was measured leave it out. Rank 0's count.

        Returns:
            (K,) float64, the weights.

        Raises:
            ValueError: a signal that the balancer reads is never given, or one it does not read is;
                a step is still open.
        """
        if self._tokens is not None:
            raise ValueError(
                f"Balance.begin: step {self.step} is still open. Call end() after the optimizer's "
                "step."
            )
        self._check(signals)
        k, needs = len(self.holder.tasks), self.holder.balancer.needs
        tokens = comm.sum_(torch.bincount(task.reshape(-1), minlength=k))
        if Signal.TOKENS in needs:
            signals["tokens"] = tokens.cpu().numpy()
        if Signal.TRAIN_LOSS in needs:
            signals["train_loss"] = self.losses
        # Rank 0 alone: numpy on unlike hosts differs in last bits.
        seen = Signals(step=self.step, **signals)
        self.weights = comm.on_first(lambda: self.holder.update(seen))
        self._present = tokens.cpu().numpy() > 0
        self._tokens, self._sums = tokens, torch.zeros(k, dtype=torch.float64, device=tokens.device)
        return self.weights

    def loss(self, losses: Tensor, task: Tensor) -> Tensor:
        """A micro-batch's part of the step's loss, a scalar to call `backward` on: do not divide it
        by anything.

        Args:
            losses: (T,) float32, nats of each target token.
            task: (T,) int64, its task.
        """
        if self._tokens is None or self._sums is None:
            raise ValueError(
                "Balance.loss: no step is open. Call begin() first, with the task of every target "
                "token of the step."
            )
        terms = Terms.by_task(losses, task, len(self.holder.tasks))
        self._tokens, self._sums = self._tokens.to(losses.device), self._sums.to(losses.device)
        self._sums += terms.sums.detach()
        return combine(
            terms, torch.from_numpy(self.weights).to(losses.device), self._tokens, comm.world()
        )

    def end(self) -> np.ndarray:
        """Close the step. Returns its (K,) losses, nats per target token over all ranks; nan =
        absent. A collective.
        """
        if self._tokens is None or self._sums is None:
            raise ValueError("Balance.end: no step is open.")
        # 0 / 0 is the nan of an absent task.
        self.losses = (comm.sum_(self._sums) / self._tokens).cpu().numpy()
        self._tokens = self._sums = None
        self.step += 1
        return self.losses

    @property
    def present_weight(self) -> float:
        """The sum of the weights of the tasks that have a target in the newest step.

        The present tasks' weights are used as they are (mtl/losses/terms.py), so with weights that
        sum to 1 this is what is left of the loss where a task is absent.
        """
        return float(self.weights[self._present].sum())

    @property
    def is_open(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._tokens is not None

    def mean(self, losses: Tensor, task: Tensor) -> np.ndarray:
        """(K,) losses in nats per target token over all ranks, nan = absent: of a validation probe,
        say. A collective.
        """
        terms = Terms.by_task(losses.detach(), task, len(self.holder.tasks))
        sums, counts = (
            comm.sum_(torch.stack([terms.sums.double(), terms.counts.double()])).cpu().numpy()
        )
        with np.errstate(invalid="ignore"):
            return sums / counts

    def state_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and tensors only: `torch.save` it, and `torch.load(...,
        weights_only=True)`. Rank 0's counts.
        """
        if self.is_open:
            raise ValueError(
                f"Balance.state_dict: step {self.step} is still open. Call end() first, on every "
                "rank."
            )
        held = self.holder.state_dict()
        losses = None if self.losses is None else torch.from_numpy(self.losses.copy())
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in held["arrays"].items()}
        return {"step": self.step, "losses": losses, "meta": held["meta"], "arrays": arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError if it is of another method, other
        settings or other tasks.
        """
        arrays = {name: tensor.numpy() for name, tensor in state["arrays"].items()}
        self.holder.load_state_dict({"meta": state["meta"], "arrays": arrays})
        self.weights, self.step = self.holder.weights, state["step"]
        self.losses = None if state["losses"] is None else state["losses"].numpy()

    def _check(self, signals: dict[str, Any]) -> None:
        needs, name = self.holder.balancer.needs, self.holder.balancer.public().__name__
        read = {flag.name.lower() for flag in needs & ~MEASURED_HERE}
        read |= {"valid_base", "valid_group"} if Signal.VALID_LOSS in needs else set()
        if not signals.keys() <= read:
            raise ValueError(
                f"Balance.begin: found {sorted(signals.keys() - read)}; {name} reads "
                f"{sorted(read) or 'none of these'}."
            )
        for flag in needs & ~MEASURED_HERE:
            if self.step == FIRST_STEP[flag] and signals.get(flag.name.lower()) is None:
                raise ValueError(
                    f"Balance.begin: found no {flag.name.lower()} at step {self.step}, wanted it: "
                    f"{name} reads it."
                )
