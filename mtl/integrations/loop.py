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
        # Of the step that is open: (K,) counted by begin, (2K + 1,) as `_sum` gives it, and what
        # `drop` puts back.
        self._tokens: Tensor | None = None
        self._sums: Tensor | None = None
        self._before: tuple[np.ndarray, np.ndarray, dict[str, Any]] | None = None

    def begin(self, task: Tensor, **signals: Any) -> np.ndarray:
        """Open a step: count its target tokens over all ranks, and set its weights. A collective.

        Args:
            task: (T,) int64, the task of each target token of all of this rank's micro-batches,
                0 to K - 1; T may be 0. A label of -100 is no target: leave it out.
            signals: what the balancer reads and only the caller can measure, as `balancers.Signals`
                names it: `valid_loss` (`valid_base`, `valid_group`), `gram` ... Steps where nothing
                was measured leave it out. Rank 0's count.

        Returns:
            (K,) float64, the weights.

        Raises:
            ValueError: a signal that the balancer reads is never given, or one it does not read is;
                a step is still open; a task below 0 or above K - 1, on any rank.
        """
        if self._tokens is not None:
            raise ValueError(
                f"Balance.begin: step {self.step} is still open. Call end() after the optimizer's "
                "step."
            )
        self._check(signals)
        k, needs = len(self.holder.tasks), self.holder.balancer.needs
        # Counted at K, not refused yet: an error of this rank alone would leave the others waiting.
        place = torch.where((task < 0) | (task >= k), k, task)
        counts = comm.sum_(torch.bincount(place.reshape(-1), minlength=k + 1))
        self._refuse_outside("begin", int(counts[k]))
        tokens = counts[:k]
        if Signal.TOKENS in needs:
            signals["tokens"] = tokens.cpu().numpy()
        if Signal.TRAIN_LOSS in needs:
            signals["train_loss"] = self.losses
        # Rank 0 alone: numpy on unlike hosts differs in last bits.
        seen = Signals(step=self.step, **signals)
        before = self.weights, self._present, self.holder.state_dict()
        self.weights = comm.on_first(lambda: self.holder.update(seen))
        self._present = tokens.cpu().numpy() > 0
        self._tokens, self._before = tokens, before
        self._sums = torch.zeros(2 * k + 1, dtype=torch.float64, device=tokens.device)
        return self.weights

    def loss(self, losses: Tensor, task: Tensor) -> Tensor:
        """A micro-batch's part of the step's loss, a scalar to call `backward` on: do not divide it
        by anything. Call it once for each micro-batch whose tasks `begin` was given.

        Args:
            losses: (T,) float32, nats of each target token, the same ones that `begin` counted.
            task: (T,) int64, its task.

        Raises:
            ValueError: no step is open. Tokens that `begin` did not count are refused by `end`.
        """
        if self._tokens is None or self._sums is None:
            raise ValueError(
                "Balance.loss: no step is open. Call begin() first, with the task of every target "
                "token of the step."
            )
        terms = Terms.by_task(losses, task, len(self.holder.tasks))
        self._tokens, self._sums = self._tokens.to(losses.device), self._sums.to(losses.device)
        self._sums += self._sum(terms, task)
        return combine(
            terms, torch.from_numpy(self.weights).to(losses.device), self._tokens, comm.world()
        )

    def end(self) -> np.ndarray:
        """Close the step. Returns its (K,) losses, nats per target token over all ranks; nan =
        absent. A collective.

        Raises:
            ValueError: on every rank, that no step is open, or that `loss` saw other target tokens
                than `begin` counted. The step is then given up, as by `drop`.
        """
        if self._tokens is None or self._sums is None:
            raise ValueError("Balance.end: no step is open.")
        wanted = self._tokens.cpu().numpy()
        sums, counts, outside = self._over_ranks(self._sums)
        if outside or (counts != wanted).any():
            self.drop()
            self._refuse_outside("loss", outside)
            differ = "; ".join(
                f"found {found:.0f} of {name!r}, wanted {count}"
                for name, found, count in zip(self.holder.tasks, counts, wanted, strict=True)
                if found != count
            )
            raise ValueError(
                f"Balance.end at step {self.step}: loss() saw other target tokens than begin() "
                f"counted: {differ}. Give loss() each micro-batch whose tasks begin() was given, "
                "once, with the same labels left out. The step's gradients are wrong: if the "
                "optimizer has used them, go back to a checkpoint."
            )
        with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of an absent task
            self.losses = sums / wanted
        self._tokens = self._sums = self._before = None
        self.step += 1
        return self.losses

    def drop(self) -> None:
        """Give up the open step, as if it had not begun: where it was cut off before the
        optimizer's step. Not a collective; every rank must do it.

        Raises:
            ValueError: no step is open.
        """
        if self._before is None:
            raise ValueError("Balance.drop: no step is open.")
        # The weights apart: only rank 0's holder has them.
        self.weights, self._present, held = self._before
        self.holder.load_state_dict(held)
        self._tokens = self._sums = self._before = None

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
        say. A collective. Arguments as for `loss`.

        Raises:
            ValueError: a task below 0 or above K - 1, on any rank.
        """
        terms = Terms.by_task(losses.detach(), task, len(self.holder.tasks))
        sums, counts, outside = self._over_ranks(self._sum(terms, task))
        self._refuse_outside("mean", outside)
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

    def _sum(self, terms: Terms, task: Tensor) -> Tensor:
        """(2K + 1,) float64: the tasks' summed losses in nats, their target tokens, and the target
        tokens of no task. One tensor, so that one collective carries them.
        """
        outside = ((task < 0) | (task >= len(self.holder.tasks))).sum()
        # Made float64 before they are joined: float32 counts exactly to 16.7 million only.
        return torch.cat([terms.sums.detach().double(), terms.counts, outside[None]])

    def _over_ranks(self, sums: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        """The three parts of `_sum`, over all ranks. A collective."""
        k = len(self.holder.tasks)
        total = comm.sum_(sums).cpu().numpy()
        return total[:k], total[k : 2 * k], int(total[-1])

    def _refuse_outside(self, call: str, outside: int) -> None:
        if outside:
            names = list(self.holder.tasks)
            raise ValueError(
                f"Balance.{call} at step {self.step}: found {outside} target "
                f"token{'s' * (outside > 1)} whose task is not one of 0 to {len(names) - 1}, the "
                f"places in {names}. Leave out what is no target, such as padding."
            )

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
