"""When a task counts as done, and what its weight is then."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl.output.state import RunState


@dataclass(frozen=True)
class Patience:
    """`evaluate.patience` of the YAML. What changes is in the `RunState`: `lowest`, `stalled`,
    `held`, and with "anchor" `best_at` and `anchored`.

    Args:
        evaluations: full passes in a row without improvement after which a task is done, >= 1; None
            with `times`.
        action: what a done task's weight is. "log": the balancer's. A task that improves again
            is no longer done. "freeze": its part of all weights stays as it was. "drop": 0, and
            none of its rows are drawn. With these two the others share the rest in the balancer's
            proportions, and a done task stays done. "anchor": `keep` times the part that it had
            while no task was done, of the weights as of the draws, until it improves again; its
            loss is meanwhile the divergence from its own best (`mtl.train.anchor`).
        margin: an improvement is a loss more than this below the lowest so far, in nats per target
            token, >= 0.
        keep: above 0, at most 1; with "anchor" only.
        times: (K,) steps from which on the tasks are done, and stay so, whatever their losses;
            None: `evaluations` decides.
    """

    evaluations: int | None = None
    action: str = "log"
    margin: float = 0.0
    keep: float = 0.25
    times: tuple[float, ...] | None = None

    def observe(self, state: RunState, losses: np.ndarray, names: Sequence[str]) -> list[str]:
        """Take the (K,) losses of a full pass into `state`. Returns messages: which tasks are done,
        and which go on after all.
        """
        if state.lowest is None:
            k = len(names)
            state.lowest, state.stalled, state.held = (
                np.full(k, np.inf),
                np.zeros(k),
                np.full(k, np.nan),
            )
            if self.action == "anchor":
                state.best_at, state.anchored = np.full(k, np.nan), np.full(k, np.nan)
        # Before the state changes: what is new is told below.
        was = self.done(state)
        better = losses < state.lowest - self.margin
        state.lowest = np.where(better, losses, state.lowest)
        state.stalled = np.where(better, 0.0, state.stalled + 1)
        if self.action != "log":
            # Before `held` changes, as the weights at hand were made with the old one.
            part = self._part(state)
            if self.action == "anchor":
                state.best_at = np.where(better, state.step, state.best_at)
                if self.times is None:
                    state.held = np.where(better, np.nan, state.held)
            state.held = np.where(np.isnan(state.held) & self._is_time(state), part, state.held)
            if self.action == "anchor":
                # Tasks that were held keep their teachers; newly held ones get their best so far.
                first = np.where(np.isnan(state.anchored), state.best_at, state.anchored)
                state.anchored = np.where(np.isnan(state.held), np.nan, first)
        now, told = self.done(state), []
        for i in np.flatnonzero(now & ~was):
            what = {
                "log": "",
                "freeze": f"; its part of the weights stays {state.held[i]:.3f}",
                "drop": "; its weight is now 0",
                "anchor": f"; its part of the weights is now {state.held[i]:.3f}, and its loss the "
                "divergence from its own best",
            }
            since = (
                f"its lowest loss is {state.lowest[i]:.4f}, full passes since: "
                f"{int(state.stalled[i])}"
            )
            told.append(f"{names[i]} is done: {since}{what[self.action]}")
        return told + [
            f"{names[i]} goes on after all, with a loss of {losses[i]:.4f}"
            for i in np.flatnonzero(was & ~now)
        ]

    def _part(self, state: RunState) -> np.ndarray:
        """(K,) float64, the part of all weights at which a task would be held from now on."""
        if self.action == "drop" or not state.weights.sum():
            return np.zeros(len(state.held))
        part = state.weights / state.weights.sum()
        if self.action == "freeze":
            return part
        # Tasks that are held have given up (1 / keep - 1) of their parts to the others: taken back
        # out, so that it does not matter which was done first, and weights agree with draws.
        given = np.nansum(state.held)
        if given < 1:
            part = part * (1 - given / self.keep) / (1 - given)
        return self.keep * part

    def _is_time(self, state: RunState) -> np.ndarray:
        if self.times is not None:
            return state.step >= np.array(self.times)
        return state.stalled >= self.evaluations

    def kept(self, state: RunState) -> np.ndarray:
        """(K,) float64: the part of its draws that each task keeps. A row that counts nothing is
        not drawn.
        """
        if self.action == "anchor":
            return np.where(np.isnan(state.held), 1.0, self.keep)
        return np.where(state.held == 0, 0.0, 1.0)

    def done(self, state: RunState) -> np.ndarray:
        """(K,) bool. Where all are, the run is over."""
        # Before the first pass K is not known; one False says that not all are done.
        if state.lowest is None:
            return np.zeros(1, dtype=bool)
        return self._is_time(state) if self.action == "log" else ~np.isnan(state.held)


def hold(held: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(K,) weights of the same sum: held tasks have their parts, the others share the rest.

    If the others' weights are all 0, they share equally. If their sum is below 0 (methods that
    subtract gradients), they stay as they are.

    Args:
        held: (K,) float64, parts of the sum; nan = not held.
        weights: (K,) float64, the balancer's.
    """
    is_held = ~np.isnan(held)
    others = np.where(is_held, 0.0, weights)
    if not others.any():
        others = np.where(is_held, 0.0, 1.0)
    if others.sum() > 0:
        rest = max(1 - held[is_held].sum(), 0.0) * weights.sum()
        others = others * (rest / others.sum())
    return np.where(is_held, held * weights.sum(), others)
