"""The error of slope estimators on a recorded run: python benchmarks/slopes.py [--run tests/golden/recorded_run.npz].

The recording holds every validation row's loss at every probe, so each estimator can be fed what it would have read
and compared with the slope of all rows. The rows are cut into groups once (row i into group i mod G), and probe p reads
group (p + shift) mod G; the fixed subset is group 0. Everything is in ratio per optimizer step, the root mean square
over tasks, shifts and all windows but the first, which the steep fall after step 0 rules.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from balancers.coba import least_squares

COLUMNS = ((28, 4), (28, 8), (14, 8))  # probes in the window, rows per probe


@dataclass(frozen=True)
class Recording:
    """One run: the loss of every validation row at every probe."""

    step: np.ndarray  # (probes,)
    loss: np.ndarray  # (probes, K, rows), nats
    weight: np.ndarray  # (K, rows), what a row's loss is divided by in a mean over rows

    @classmethod
    def load(cls, path: str, by: str) -> "Recording":
        """``by`` "tokens": every target token counts the same; "rows": every row does."""
        with np.load(path) as saved:
            step, loss, tokens = (saved[name].astype(np.float64) for name in ("step", "loss_sum", "target_tokens"))
        return cls(step, loss, tokens) if by == "tokens" else cls(step, loss / tokens, np.ones_like(tokens))

    def mean(self, rows: slice) -> np.ndarray:
        """(probes, K) mean loss over some rows of each task, nats per target token."""
        return self.loss[:, :, rows].sum(axis=2) / self.weight[:, rows].sum(axis=1)


def errors(run: Recording, probes: int, rows: int) -> dict[str, float]:
    """Root mean square error of each estimator, beside the size of the true slopes."""
    n, groups = len(run.step), run.loss.shape[2] // rows
    whole = run.mean(slice(None))
    means = np.stack([run.mean(slice(g, None, groups)) for g in range(groups)])  # (G, probes, K)
    squares: dict[str, list[np.ndarray]] = {}

    def slopes(ratio: np.ndarray, group: np.ndarray) -> np.ndarray:
        """(windows, K)."""
        windows = (slice(start, start + probes) for start in range(1, n - probes + 1))
        return np.array([least_squares(run.step[w], ratio[w], group[w])[0] for w in windows])

    one = np.zeros(n)
    true = slopes(whole / whole[0], one)
    for shift in range(groups):
        group = (np.arange(n) + shift) % groups
        read = means[group, np.arange(n)]  # (probes, K): what each probe sees
        estimates = {
            "plain": slopes(read / whole[0], one),
            "paired": slopes(read / means[group, 0], one),
            "fixed subset": slopes(means[0] / means[0, 0], one),
            "panel": slopes(read / whole[0], group),
        }
        for name, each in estimates.items():
            squares.setdefault(name, []).append((each - true) ** 2)
    squares["size of the true slopes"] = [true**2]
    return {name: float(np.sqrt(np.mean(each))) for name, each in squares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tests/golden/recorded_run.npz")
    parser.add_argument("--by", choices=["rows", "tokens"], default="rows", help="what counts the same in a mean loss")
    args = parser.parse_args()
    run = Recording.load(args.run, args.by)
    table = [errors(run, probes, rows) for probes, rows in COLUMNS]
    print("| estimator | " + " | ".join(f"{probes} probes x {rows} rows" for probes, rows in COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for name in table[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.5f}" for column in table) + " |")


if __name__ == "__main__":
    main()
