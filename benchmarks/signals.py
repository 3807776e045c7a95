"""What measuring a balancer's signals adds to a step: `python benchmarks/signals.py`. CPU seconds, over those of Equal.

One process, ZeRO 2, a random Llama of 12 million parameters, 6 tasks, 18 examples of 20 to 120 tokens a step in packed
rows. CPU time, because it stands still when others use the machine.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from balancers import Holder, make
from mtl import engine, gram, model
from mtl.checkpoint import RunState
from mtl.config import parse
from mtl.data.batches import Layout, TrainBatches, ValidationCut
from mtl.data.encoded import Encoded, TaskData
from mtl.data.mix import Mix
from mtl.objectives import causal_lm
from mtl.run import Parts, run

NAMES, WARM, STEPS = list("abcdef"), 2, 8
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("Equal", "Equal", {}),
    ("DWA (training losses)", "DWA", {}),
    ("CoBa (probe each step)", {"name": "CoBa", "window": 5, "warmup": 1}, {}),
    ("CoBa (probe every 4)", {"name": "CoBa", "window": 5, "warmup": 1}, {"evaluate.probe.every": 4}),
    ("FAMO (replay)", "FAMO", {}),
    ("GradNorm (Gramian, all)", "GradNorm", {}),
    ("GradNorm (last layer)", "GradNorm", {"gram.params": "last_layer"}),
    ("GradNorm (all, every 4)", "GradNorm", {"gram.every": 4}),
    ("MetaWeighting (all)", "MetaWeighting", {}),
]


class Nowhere:
    """Keeps no checkpoint."""

    output = Path(tempfile.mkdtemp())

    def save(self, *_: Any, **__: Any) -> Path:
        return self.output


def encoded(rows: int, seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    made = []
    for n in rng.integers(20, 120, rows):
        target = np.arange(n) >= n // 2
        made.append((rng.integers(0, 8000, n), target))
    return Encoded.of(made)


def seconds(given: Any, overrides: dict[str, Any]) -> float:
    """CPU seconds of a step."""
    tasks = ", ".join(f"{name}: {{train: x, validation: x, format: text}}" for name in NAMES)
    config = parse(
        f"model: {{name: none, precision: fp32}}\ntasks: {{{tasks}}}\ntrain: {{steps: {STEPS}}}\noutput: nowhere\n"
        "evaluate: {every: 1000, probe: {groups: 8}}\ncheckpoint: {best: false}\nexport: {which: none}",
        overrides=[f"{key}={value}" for key, value in overrides.items()],
    )
    llama = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    )
    trained = engine.Engine(LlamaForCausalLM(llama), config, model.optimizer(config))
    data = [TaskData(name, encoded(60, i), encoded(16, 100 + i)) for i, name in enumerate(NAMES)]
    layout = Layout(1, 0, 512, 0, packed=True, row_length=256)
    batches = TrainBatches(data, Mix(NAMES, [60] * 6, [1] * 6, 18, 0), layout)
    holder = Holder(make(given), NAMES)
    chosen = gram.supply(holder.balancer.needs, trained.module, config)
    clock: list[float] = []

    class Clock:
        def log(self, step: int, values: Any) -> None:
            clock.append(time.process_time())

        def say(self, text: str) -> None:
            pass

    cut = ValidationCut(data, 8, 0, layout)
    run(Parts(config, NAMES, STEPS, trained, causal_lm, holder, batches, cut, Nowhere(), [Clock()], chosen), RunState())
    batches.close()
    steps = np.diff(clock[:-1])  # the first entry is the full pass at step 0, the last that at the end
    return float(steps[WARM:].mean())


def main() -> None:
    engine.init_process_group(5)
    found = {name: seconds(given, overrides) for name, given, overrides in CASES}
    print("| balancer | CPU seconds a step | over Equal |\n|---|---:|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} | {value / found['Equal']:.2f} |")


if __name__ == "__main__":
    main()
