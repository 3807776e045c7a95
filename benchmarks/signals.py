"""What each balancer adds to a step, in CPU time and memory: `python benchmarks/signals.py
[--rounds 3] [--memory]`.

One process, ZeRO 2, a random Llama of 9 million parameters in fp32, 6 tasks, 18 examples of 20 to
120 tokens a step in packed rows, AdamW. All cases take turns on one engine, four steps each a
round, so that whatever slows the machine down for a while slows all of them. CPU seconds of the
process, not wall clock: they count no other program's work.
"""

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from balancers import Holder, make
from mtl import build
from mtl.config import parse
from mtl.data.encoded import Encoded, TaskData
from mtl.distributed import engine
from mtl.losses import head
from mtl.output.trackers import Tracker
from mtl.train.loop import train
from mtl.train.optimizer import optimizer

NAMES, TURN = list("abcdef"), 4  # a turn is as long as the rarest measurement's period
COBA = {"name": "CoBa", "window": 5, "warmup": 1}
LAST, FOURTH = {"gram.params": "last_layer"}, {"gram.every": 4}
GRAMIAN = ("MGDA", "PCGrad", "CAGrad", "IMTLG", "NashMTL", "AlignedMTL", "UPGrad")
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("Equal", "Tokens")},
    "Static": ({"name": "Static", "weights": [1, 2, 3, 4, 5, 6]}, {}),
    **{name: (name, {}) for name in ("RLW", "DWA", "LBTW", "GLS", "Uncertainty")},
    "FAMO, replay": ("FAMO", {}),
    "FAMO, replay: false": ({"name": "FAMO", "replay": False}, {}),
    "CoBa": (COBA, {}),
    "CoBa, probe.every: 4": (COBA, {"evaluate.probe.every": 4}),
    "CoBa, default probes": (COBA, {"evaluate.probe": "{}"}),
    "CoBa, slope: panel, gate: 1": ({**COBA, "window": 16, "slope": "panel", "gate": 1.0}, {}),
    **{name: (name, {}) for name in ("LBTWValid", "FAMOValid")},
    "Scheduled CoBa": ({"name": "Scheduled", "warmup": 1, "balancer": COBA}, {}),
    "Bounded CoBa": ({"name": "Bounded", "floor": 0.05, "balancer": COBA}, {}),
    "Grouped CoBa": ({"name": "Grouped", "groups": {"ab": ["a", "b"]}, "balancer": COBA}, {}),
    "GradNorm": ("GradNorm", {}),
    "GradNorm, params: last_layer": ("GradNorm", LAST),
    "GradNorm, every: 4": ("GradNorm", FOURTH),
    "GradNorm, both": ("GradNorm", {**LAST, **FOURTH}),
    "GradNormValid": ("GradNormValid", {}),
    **{f"TorchJD {method}": ({"name": "TorchJD", "method": method}, {}) for method in GRAMIAN},
    "MetaWeighting": ("MetaWeighting", {}),
    "MetaWeighting, params: last_layer": ("MetaWeighting", LAST),
}
HELD = (
    "Equal",
    "GradNorm",
    "GradNorm, params: last_layer",
    "MetaWeighting",
)  # whose memory is measured


class Turn(Tracker):
    """Ends each turn."""

    class Over(Exception):
        pass

    def log(self, step: int, values: Any) -> None:
        if "train/loss" in values and (step + 1) % TURN == 0:
            raise self.Over

    def say(self, text: str) -> None:
        pass


def encoded(rows: int, seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    made = []
    for n in rng.integers(20, 120, rows):
        target = np.arange(n) >= n // 2
        made.append((rng.integers(0, 8000, n), target))
    return Encoded.of(made)


def configuration(overrides: dict[str, Any]) -> Any:
    tasks = ", ".join(f"{name}: {{train: x, validation: x, format: text}}" for name in NAMES)
    return parse(
        f"model: {{name: none, precision: fp32}}\ntasks: {{{tasks}}}\ntrain: {{steps: "
        f"100000}}\noutput: nowhere\n"
        "batch: {examples: 18, tokens: 512, max_length: 128, row_length: 256}\n"
        "evaluate: {every: 100000, probe: {every: 1, groups: 8, examples: all}}\n"
        "checkpoint: {best: false}\nexport: {which: none}",
        overrides=[f"{key}={value}" for key, value in overrides.items()],
    )


class Case:
    """A run that goes on turn by turn."""

    def __init__(self, trained: engine.Engine, name: str, folder: str, first: "Case | None" = None):
        given, overrides = CASES[name]
        config = configuration(overrides)
        probe = config.evaluate.probe
        rows = 2 * probe.groups if probe.examples == "all" else 3 * probe.groups
        data = [
            TaskData(name, encoded(60, i), encoded(rows, 100 + i)) for i, name in enumerate(NAMES)
        ]
        tokenizer = SimpleNamespace(pad_token_id=0)
        holder = Holder(make(given), NAMES)
        self.run = build.build(
            config,
            build.in_memory(config, tokenizer, data),
            engine=trained,
            packed=True,
            holder=holder,
            say=lambda text: None,
        )
        self.run.checkpoints, self.run.trackers = SimpleNamespace(output=Path(folder)), [Turn()]
        self.state = build.restore(self.run, False)
        if (
            first is not None and first.run.validation.groups == self.run.validation.groups
        ):  # its pass over all validation rows does for all
            seen = first.state
            self.state.base_sums, self.state.base_tokens, self.state.evaluated = (
                seen.base_sums,
                seen.base_tokens,
                0,
            )

    def turn(self) -> float:
        """CPU seconds of a step."""
        began = time.process_time()
        try:
            train(self.run, self.state)
        except Turn.Over:
            pass
        return (time.process_time() - began) / TURN


def start() -> engine.Engine:
    llama = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    config, model = configuration({}), LlamaForCausalLM(llama)
    head.install(model)
    return engine.Engine(model, config, optimizer(config))


def times(names: list[str], rounds: int, folder: str) -> None:
    trained = start()
    first = Case(trained, "Equal", folder)
    first.turn()
    cases = {name: Case(trained, name, folder, first) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first, when balancers begin, is not counted
        gc.collect()
        for name, case in cases.items():
            seconds = case.turn()
            if turn:
                found[name].append(seconds)
    for case in (first, *cases.values()):
        case.run.batches.close()
    print("| balancer | CPU seconds a step, median of turns | over Equal |\n|---|---:|---:|")
    for name, each in found.items():
        ratios = [mine / equal for mine, equal in zip(each, found["Equal"], strict=True)]
        print(f"| {name} | {statistics.median(each):.3f} | {statistics.median(ratios):.2f} |")


def peak(name: str, folder: str) -> None:
    case = Case(start(), name, folder)
    case.turn()
    case.run.batches.close()
    count = sum(p.numel() for p in case.run.differentiated)
    print(name, count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, sep="|")


def memory() -> None:
    print(
        "| balancer | parameters differentiated by | peak MiB | over Equal | K x N x 4 bytes "
        "|\n|---|---:|---:|---:|---:|"
    )
    least = None
    for name in HELD:
        command = [sys.executable, __file__, "--peak-of", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        _, count, found = out.strip().splitlines()[-1].split("|")
        least = least or float(found)
        whole = len(NAMES) * int(count) * 4 / 2**20
        print(
            f"| {name} | {int(count):,} | {float(found):.0f} | {float(found) - least:.0f} | "
            f"{whole:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", help="beside Equal, such as 'CoBa' 'TorchJD MGDA'; all unless given"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each case that count")
    parser.add_argument("--memory", action="store_true", help="peak memory instead, a process each")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory()
    engine.init_process_group(5)
    with tempfile.TemporaryDirectory() as folder:
        peak(args.peak_of, folder) if args.peak_of else times(
            list(dict.fromkeys(["Equal", *(args.cases or CASES)])), args.rounds, folder
        )
    sys.stdout.flush()
    os._exit(0)  # the group's threads are not what is measured


if __name__ == "__main__":
    main()
