"""The error of slope estimators on a recorded run: python benchmarks/slopes.py [--defaults] [--run
tests/golden/recorded_run.npz].

The recording holds every validation row's loss at every probe, so each estimator can be fed what it
would have read and compared with the slope of all rows. The rows are cut into groups once (row i
into group i mod G), and probe p reads group (p + shift) mod G; the fixed subset is group 0.
Everything is in ratio per optimizer step, the root mean square over tasks, shifts and all windows
but the first, which the steep fall after step 0 rules.

With --defaults: the trainer's default probes with panel slopes beside the published method's, one
mini-batch of training size every step with plain slopes, both over the same window and against the
slope of all rows at every step of it. On the quickstart's model and tasks trained in full (learning
rate 1e-4) and with LoRA (2e-4), recorded by record.py with 16 examples a step and three seeds each,
one of them for 300 steps; and on the golden run of five of the tasks, which does not say what their
targets are.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from balancers.coba import default_window, least_squares
from mtl.config.schema import ProbeSection
from mtl.data.batches import stratified
from mtl.data.plan import EVERY, probed

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ((28, 4), (28, 8), (14, 8))  # probes in the window, rows per probe


@dataclass(frozen=True)
class Recording:
    """One run: the loss of every validation row at every probe."""

    step: np.ndarray  # (probes,)
    loss: np.ndarray  # (probes, K, rows), nats
    weight: np.ndarray  # (K, rows), what a row's loss is divided by in a mean over rows
    positions: np.ndarray  # (K, rows), how long a row is; 1 where that was not recorded
    answer: (
        np.ndarray
    )  # (K, rows), what the targets are (`Encoded.answers`); 0 where that was not recorded

    @classmethod
    def load(cls, path: Path, by: str) -> "Recording":
        """``by`` "tokens": every target token counts the same; "rows": every row does."""
        with np.load(path) as saved:
            step, loss, tokens = (
                saved[name].astype(np.float64) for name in ("step", "loss_sum", "target_tokens")
            )
            rows = [
                saved[name] if name in saved else np.full(tokens.shape, n)
                for name, n in (("positions", 1), ("answer", 0))
            ]
        return (
            cls(step, loss, tokens, *rows)
            if by == "tokens"
            else cls(step, loss / tokens, np.ones_like(tokens), *rows)
        )

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


BATCH, TASKS, GROUPS = 16, 6, ProbeSection().groups  # the benchmark's; the trainer's default
# By run: its files, and the default's optimizer steps between probes.
RUNS = {
    "quickstart": ("benchmarks/recorded/quickstart-full-*.npz", EVERY[False]),
    "quickstart, LoRA": ("benchmarks/recorded/quickstart-lora-*.npz", EVERY[True]),
    "golden": ("tests/golden/recorded_run.npz", EVERY[False]),
}
STARTS = 10  # optimizer steps between the first and the last window of a recording, at least


def online(run: Recording, span: int, every: int, seed: int) -> tuple[float, float]:
    """Root mean square error of the published method's slopes and of the defaults', over tasks,
    phases and windows.

    The recording has every other step; row losses in between are interpolated.
    """
    rng, k = np.random.default_rng(seed), run.loss.shape[1]
    step = np.arange(run.step[0], run.step[-1] + 1)
    before = np.searchsorted(run.step, step, side="right") - 1
    after = np.minimum(before + 1, len(run.step) - 1)
    part = np.where(
        after > before,
        (step - run.step[before]) / np.maximum(run.step[after] - run.step[before], 1),
        0.0,
    )
    loss = run.loss[before] + part[:, None, None] * (
        run.loss[after] - run.loss[before]
    )  # (steps, K, rows)
    whole = loss.sum(axis=2) / run.weight.sum(axis=1)

    def mean(t: int, task: int, rows: np.ndarray) -> float:
        return loss[t, task, rows].sum() / run.weight[task, rows].sum() / whole[0, task]

    def draw() -> np.ndarray:
        return rng.choice(loss.shape[2], int(BATCH / TASKS + rng.random()), replace=False)

    drawn = np.array([[mean(t, task, draw()) for task in range(k)] for t in range(len(step))])
    examples = probed(
        BATCH * k // TASKS, run.positions.mean(axis=1).tolist(), [run.loss.shape[2]] * k, GROUPS
    )
    cuts = [
        stratified(run.weight[i], run.answer[i], GROUPS, n, f"{seed}/{i}")
        for i, n in enumerate(examples)
    ]
    squares: tuple[list, list] = [], []
    none = np.zeros(span)
    for phase in range(every):
        times = np.arange(2 + phase, len(step), every)
        group = np.arange(len(times)) % GROUPS
        # A ratio is of the group's own first loss, as the trainer reads it.
        read = np.array(
            [
                [mean(t, task, cuts[task][g]) / mean(0, task, cuts[task][g]) for task in range(k)]
                for t, g in zip(times, group, strict=True)
            ]
        )
        for start in range(2 + phase, len(step) - span + 1, every):
            w = slice(start, start + span)
            true = least_squares(step[w], whole[w] / whole[0], none)[0]
            mine = (times >= w.start) & (times < w.stop)
            squares[0].append((least_squares(step[w], drawn[w], none)[0] - true) ** 2)
            squares[1].append(
                (least_squares(step[times[mine]], read[mine], group[mine])[0] - true) ** 2
            )
    return float(np.sqrt(np.mean(squares[0]))), float(np.sqrt(np.mean(squares[1])))


def defaults(draws: int = 30) -> list[dict[str, Any]]:
    """Of each run and window of whole rounds: both errors over the recordings that are long enough
    and all draws, ours over the published, and that of single draws. `is_default`: it is the window
    that CoBa has by default with such probes.
    """
    rows: list[dict[str, Any]] = []
    for name, (files, every) in RUNS.items():
        recordings = [Recording.load(file, "tokens") for file in sorted(ROOT.glob(files))]
        whole_round = every * GROUPS
        for span in range(2 * whole_round, 6 * whole_round, whole_round):
            long = [run for run in recordings if run.step[-1] - run.step[0] - 2 >= span + STARTS]
            if not long:
                break
            found = np.array(
                [online(run, span, every, seed) for run in long for seed in range(draws)]
            )
            published, ours = np.sqrt((found**2).mean(axis=0))
            single = found[:, 1] / found[:, 0]
            rows.append(
                {
                    "run": name, "recordings": len(long), "every": every, "steps": span,
                    "is_default": span == every * default_window(GROUPS, every),
                    "published": published, "ours": ours, "ratio": ours / published,
                    "min": single.min(), "max": single.max(),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=ROOT / "tests/golden/recorded_run.npz",
        help="without --defaults",
    )
    parser.add_argument(
        "--by",
        choices=["rows", "tokens"],
        default="rows",
        help="what counts the same in a mean loss",
    )
    parser.add_argument(
        "--defaults",
        action="store_true",
        help="the trainer's defaults beside the published method, online",
    )
    args = parser.parse_args()
    if args.defaults:
        print(
            "| run | recordings | a probe every | window, steps | published | defaults | ratio | "
            "least of a draw | most |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        line = (
            "| {run} | {recordings} | {every} | {steps}{mark} | {published:.5f} | {ours:.5f} | "
            "{ratio:.2f} | {min:.2f} | {max:.2f} |"
        )
        for row in defaults():
            print(line.format(**row, mark=", the default" if row["is_default"] else ""))
        return
    run = Recording.load(args.run, args.by)
    table = [errors(run, probes, rows) for probes, rows in COLUMNS]
    print(
        "| estimator | "
        + " | ".join(f"{probes} probes x {rows} rows" for probes, rows in COLUMNS)
        + " |"
    )
    print("|---|" + "---:|" * len(COLUMNS))
    for name in table[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.5f}" for column in table) + " |")


if __name__ == "__main__":
    main()
