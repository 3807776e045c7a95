"""What CoBa's update costs, in time and state: python benchmarks/updates.py [--past 100000] [--tasks 20 2 8 32 128]."""

import argparse
import platform
import statistics
import time

import numpy as np

from balancers import CoBa, Signals


def aged(balancer: CoBa, k: int, past: int) -> dict[str, np.ndarray]:
    """The state after ``past`` probes; only the history's length matters for the cost, so it is filled in directly."""
    state, rng = balancer.init(k), np.random.default_rng(0)
    history = 1e-3 * rng.normal(size=past)
    return state | {"entries": np.array(past), "history": history, "divisor": np.array(np.abs(history).sum())}


def measure(balancer: CoBa, k: int, past: int, updates: int = 300) -> tuple[list[float], int]:
    """Milliseconds of each update with a full window, and bytes of state at the end."""
    state, rng, times = aged(balancer, k, past), np.random.default_rng(1), []
    for step in range(balancer.window + updates):
        loss = 1 + np.exp(-step / 100) + 0.01 * rng.normal(size=k)
        signals = Signals(step=step, valid_loss=loss, valid_group=step % 8)
        start = time.perf_counter()
        state, _, _ = balancer.update(state, signals)
        times.append(1e3 * (time.perf_counter() - start))
    return times[balancer.window :], sum(array.nbytes for array in state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--past", type=int, nargs="+", default=[100_000, 1_000_000], help="probes before the first")
    parser.add_argument("--tasks", type=int, nargs="+", default=[20, 2, 8, 32, 128])
    args = parser.parse_args()
    print(f"numpy {np.__version__}, {platform.machine()}, window 200; milliseconds per update\n")
    print("| slopes | past probes | tasks | median | min | max | state, bytes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for slope in ("ols", "panel"):
        for past in args.past:
            for k in args.tasks:
                times, size = measure(CoBa(slope=slope), k, past)
                row = f"{statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | {size}"
                print(f"| {slope} | {past} | {k} | {row} |")


if __name__ == "__main__":
    main()
