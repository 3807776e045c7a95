"""What a merge did to the deltas: counted tensor by tensor, and as figures and a table."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.merging.piece import TensorPiece

CHUNK = 2**18  # elements at once


@dataclass
class Counts:
    """Sums over elements, of K sub-models and, last, the merged one.

    Attributes:
        n: elements.
        gram: (K + 1, K + 1) inner products of the deltas.
        zeros: (K + 1,) elements equal to the base's.
        conflicts: elements that one sub-model raised and another lowered.
        base: the base's squared norm.
    """

    n: int
    gram: np.ndarray
    zeros: np.ndarray
    conflicts: int
    base: float

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.n + other.n,
            self.gram + other.gram,
            self.zeros + other.zeros,
            self.conflicts + other.conflicts,
            self.base + other.base,
        )

    def figures(self) -> dict[str, Any]:
        """The report of a tensor or of all. nan where a norm is 0."""
        # The last one is the merged model's.
        norms = np.sqrt(self.gram.diagonal())
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = self.gram / np.outer(norms, norms)
            ratio, drift = norms[-1] / norms[:-1].mean(), norms[:-1] / np.sqrt(self.base)
        k = len(norms) - 1
        pairs = cosines[:k, :k][np.triu_indices(k, 1)]
        return {
            "elements": self.n,
            "zero_fraction": _list(self.zeros[:-1] / max(1, self.n)),
            "zero_fraction_merged": _round(self.zeros[-1] / max(1, self.n)),
            "norm_ratio": _round(ratio),
            "drift": _list(drift),
            "cosines": [_list(row[:k]) for row in cosines[:k]],
            "cosine": _round(pairs.mean()) if k > 1 else None,
            "sign_conflicts": _round(self.conflicts / max(1, self.n)),
        }


def count(piece: TensorPiece, merged: Tensor) -> Counts:
    """The counts of one tensor."""
    every = [each.flatten() for each in (*piece.models, merged)]
    base = piece.base.flatten()
    gram = np.zeros((len(every), len(every)))
    zeros, conflicts, norm = np.zeros(len(every), dtype=np.int64), 0, 0.0
    # In chunks, so that K wide copies of a whole tensor are never held.
    for at in range(0, base.numel(), CHUNK):
        here = base[at : at + CHUNK].to(piece.wide)
        deltas = torch.stack([each[at : at + CHUNK].to(piece.wide) - here for each in every])
        gram += (deltas @ deltas.T).double().numpy()
        zeros += (deltas == 0).sum(1).numpy()
        ours = deltas[:-1]
        conflicts += int(((ours.amax(0) > 0) & (ours.amin(0) < 0)).sum())
        norm += float(here @ here)
    return Counts(base.numel(), gram, zeros, conflicts, norm)


@dataclass
class MergeReport:
    """What was merged, how, and what it did.

    Attributes:
        method, settings, seed, base, models: as asked.
        tensors: name -> Counts.
        weights: those that the method chose; None: it chooses none.
        tasks: losses of every model by task, where there was a config.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    base: str
    models: list[str]
    tensors: dict[str, Counts] = field(default_factory=dict)
    weights: list[float] | None = None
    tasks: dict[str, Any] | None = None

    @property
    def total(self) -> Counts:
        first, *rest = self.tensors.values()
        return sum(rest, first)

    def plain(self) -> dict[str, Any]:
        """For merge.json: fractions, ratios and losses (nats per target token)."""
        return {
            "method": self.method,
            "settings": self.settings,
            "seed": self.seed,
            "base": self.base,
            "models": self.models,
            "weights": self.weights,
            "tasks": self.tasks,
            "total": self.total.figures(),
            "tensors": {name: counts.figures() for name, counts in self.tensors.items()},
        }

    def lines(self) -> list[str]:
        """For people."""
        f = self.total.figures()
        lines = [
            f"{self.method} of {len(self.models)} sub-models, {f['elements']:,} parameters in "
            f"{len(self.tensors):,} tensors",
            f"norm_ratio           {f['norm_ratio']}  (merged delta over the mean of theirs)",
            f"zero_fraction        {_join(f['zero_fraction'])}  merged {f['zero_fraction_merged']}",
            f"drift                {_join(f['drift'])}  (delta over base)",
            f"cosines              {_pairs(f['cosines'])}",
            f"sign_conflicts       {f['sign_conflicts']}",
        ]
        if self.weights:
            lines.append(f"weights              {_join(_list(np.array(self.weights)))}")
        lines.append("least and most norm_ratio of a tensor:")
        each = {name: counts.figures()["norm_ratio"] for name, counts in self.tensors.items()}
        order = sorted((name for name in each if each[name] is not None), key=each.__getitem__)
        for name in dict.fromkeys([*order[:2], *order[-2:]]):
            lines.append(f"  {each[name]}  {name}")
        return lines + (_losses(self.tasks) if self.tasks else [])


def _losses(tasks: dict[str, Any]) -> list[str]:
    rows = [["nats per target token", *tasks["names"], "macro"]]
    for name, losses in tasks["losses"].items():
        mean = sum(losses) / len(losses)
        rows.append([name, *(f"{loss:.4f}" for loss in [*losses, mean])])
    return [f"losses on {tasks['rows']}:", *aligned(rows)]


def aligned(rows: list[list[str]]) -> list[str]:
    """A table: the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _round(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _list(values: np.ndarray) -> list[float | None]:
    return [_round(value) for value in values]


def _join(values: list[float | None]) -> str:
    return " ".join("-" if v is None else f"{v:.4g}" for v in values)


def _pairs(cosines: list[list[float | None]]) -> str:
    k = len(cosines)
    found = [cosines[i][j] for i in range(k) for j in range(i + 1, k)]
    return _join(found) if found else "(one sub-model)"
