"""What grows with tasks, validation rows, steps and training rows, and how: python
benchmarks/scaling.py [--out FILE].

balancer     time and state of CoBa's update, by tasks and past probes order        time of finding
the rows of a global batch, by tasks and step validation   making the cut, and one probe, by
validation rows of each of 8 tasks start        from a configuration to the first batch, by training
rows: the first time, and with a warm cache
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from mtl import process

process.settle()  # before torch is imported

import numpy as np
from turns import peak_mib

from balancers import CoBa, Signals

SECTIONS = ("balancer", "order", "validation", "start")
Row = list[Any]


def ms(call: Callable[[], Any], times: int) -> list[float]:
    """Milliseconds of each of several calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def spread(values: list[float]) -> Row:
    return [f"{x:.3f}" for x in (statistics.median(values), min(values), max(values))]


# --------------------------------------------------------------------------------------------------
# balancer


def aged(balancer: CoBa, k: int, past: int) -> dict[str, np.ndarray]:
    """The state after ``past`` probes; only the history's length matters for the cost, so it is
    filled in directly.
    """
    state, rng = balancer.init(k), np.random.default_rng(0)
    history = 1e-3 * rng.normal(size=past)
    return state | {
        "entries": np.array(past),
        "history": history,
        "divisor": np.array(np.abs(history).sum()),
    }


def updates(balancer: CoBa, k: int, past: int, updates: int = 300) -> tuple[list[float], int]:
    """Milliseconds of each update with a full window, and bytes of state at the end."""
    state, rng, times = aged(balancer, k, past), np.random.default_rng(1), []
    for step in range(balancer.window + updates):
        loss = 1 + np.exp(-step / 100) + 0.01 * rng.normal(size=k)
        signals = Signals(step=step, valid_loss=loss, valid_group=step % 8)
        start = time.perf_counter()
        state, _, _ = balancer.update(state, signals)
        times.append(1e3 * (time.perf_counter() - start))
    return times[balancer.window :], sum(array.nbytes for array in state.values())


def balancer(tasks: list[int], past: list[int], times: int = 300) -> Iterator[Row]:
    yield ["slopes", "past probes", "tasks", "ms an update", "min", "max", "state, bytes"]
    for slope in ("ols", "panel"):
        for probes in past:
            for k in tasks:
                taken, size = updates(CoBa(window=200, slope=slope), k, probes, times)
                yield [slope, probes, k, *spread(taken), size]


# -------------------------------------------------------------------------------------------------
# order, validation


def order(tasks: list[int], steps: list[int], times: int = 50) -> Iterator[Row]:
    from mtl.data.mix import Mix

    yield ["tasks", "step", "ms a batch", "min", "max"]
    for k in tasks:
        sizes = [1000 * (i % 7 + 1) for i in range(k)]
        mix = Mix([f"t{i}" for i in range(k)], sizes, sizes, max(16, k), 0)
        for step in steps:
            numbers = iter(range(step, step + times + 1))
            mix.batch(next(numbers))  # sorts the epoch it stands in
            yield [
                k,
                step,
                *spread(ms(lambda mix=mix, numbers=numbers: mix.batch(next(numbers)), times)),
            ]


def validation(rows: list[int], k: int = 8, times: int = 5) -> Iterator[Row]:
    from mtl.config import parse
    from mtl.data.batches import Layout
    from mtl.data.encoded import Encoded, TaskData
    from mtl.data.plan import validation_groups_for

    tasks = ", ".join(f"t{i}: {{train: x, validation: x, format: text}}" for i in range(k))
    config = parse(
        f"model: {{name: none}}\ntasks: {{{tasks}}}\ntrain: {{steps: 1}}\noutput: nowhere"
    )
    layout, rng = (
        Layout(1, 0, config.batch.tokens, 0, packed=True, row_length=256),
        np.random.default_rng(0),
    )
    yield [
        "validation rows a task",
        "groups",
        "s to cut",
        "positions a probe",
        "ms to lay out a probe",
        "min",
        "max",
    ]
    for n in rows:
        lengths = rng.integers(10, 100, n)
        split = Encoded.of((np.arange(m), np.arange(m) > m // 2) for m in lengths)
        data = [TaskData(name, split, split) for name in config.tasks]
        start = time.perf_counter()
        cut = validation_groups_for(config, data, layout)
        took = time.perf_counter() - start
        positions = sum(micro.input_ids.numel() for micro in cut.group(0))
        taken = ms(lambda cut=cut: list(cut.group(0)), times)
        yield [n, cut.groups, f"{took:.3f}", positions, *spread(taken)]


# --------------------------------------------------------------------------------------------------
# start


def begin(path: str) -> dict[str, float]:
    """Seconds from a configuration to the first batch, and the process's peak memory beyond the
    imports.
    """
    from mtl import build, plugins
    from mtl.data.batches import TrainBatches
    from mtl.data.plan import layouts_for, mix_for

    before, start = peak_mib(), time.perf_counter()
    config = plugins.read(path, [], [])
    data = build.encode(config, say=lambda text: None)
    prepared = time.perf_counter()
    layouts = layouts_for(
        config, data.tasks, data.examples, data.goals.of, 1, 0, True, config.batch.tokens
    )
    batches = TrainBatches(data.tasks, mix_for(config, data.tasks), layouts)
    batches.batch(0)
    end = time.perf_counter()
    batches.close()
    return {"data": prepared - start, "batch": end - prepared, "mib": peak_mib() - before}


def start(rows: list[int], times: int = 3) -> Iterator[Row]:
    sys.path.append(str(HERE.parent / "tests"))
    import toys
    import yaml

    yield [
        "training rows",
        "first start, s",
        "warm start, s",
        "min",
        "max",
        "of it the first batch, s",
        "memory, MiB",
    ]
    for n in rows:
        with tempfile.TemporaryDirectory() as folder:
            toys.save(toys.tiny_llama(), f"{folder}/model")
            tasks = toys.write_tasks(
                f"{folder}/data", train=n * 6 // 11, validation=64
            )  # n in all: a half and a third more
            config = {"model": {"name": f"{folder}/model"}, "tasks": tasks, "train": {"steps": 10}}
            config |= {
                "cache": f"{folder}/cache",
                "output": f"{folder}/run",
                "batch": {"max_length": 512},
            }
            path = Path(folder) / "x.yaml"
            path.write_text(yaml.safe_dump(config))
            command = [sys.executable, __file__, "--begin", str(path)]
            found = []
            for _ in range(1 + times):
                made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(made.stdout.splitlines()[-1]))
        first, *warm = found
        whole = [each["data"] + each["batch"] for each in warm]
        batch, memory = (
            statistics.median(each[name] for each in warm) for name in ("batch", "mib")
        )
        yield [
            n,
            f"{first['data'] + first['batch']:.1f}",
            *spread(whole),
            f"{batch:.3f}",
            f"{memory:.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument(
        "--past",
        type=int,
        nargs="+",
        default=[0, 100_000, 1_000_000],
        help="probes before the first",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1000, 1_000_000])
    parser.add_argument("--validation", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--begin", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.begin:
        print(json.dumps(begin(args.begin)))
        return
    made = {
        "balancer": lambda: balancer(args.tasks, args.past),
        "order": lambda: order(args.tasks, args.steps),
        "validation": lambda: validation(args.validation),
        "start": lambda: start(args.rows),
    }
    lines = [
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, "
        "CoBa with a window of 200 probes"
    ]
    print(lines[0])
    for section in args.sections:
        for i, row in enumerate(made[section]()):
            text = [f"| {' | '.join(map(str, row))} |"]
            if i == 0:
                text = [f"\n{section}\n", *text, "|" + "---:|" * len(row)]
            print("\n".join(text), flush=True)
            lines += text
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
