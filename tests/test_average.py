"""The average of the weights: its formula, the same at every ZeRO stage, and gone without a trace after use."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from distributed import run_distributed
from safetensors.torch import load_file

from mtl.check import memory
from mtl.config import parse
from mtl.distributed import comm, engine, masters
from mtl.output.state import RunState
from mtl.train.average import Average
from mtl.train.evaluate import ValidationResult
from mtl.train.optimizer import optimizer

STEPS = 6
EMA = "{decay: 0.7, warmup: 3}"
SPARSE = "{decay: 0.7, warmup: 1, every: 2, device: cpu}"
LAST = "{last: 2}"
# stage, kind, average
CASES = [
    (0, "full", EMA),
    (2, "full", EMA),
    (3, "full", EMA),
    (3, "persistent", EMA),
    (0, "full", LAST),
    (2, "full", LAST),
    (3, "full", SPARSE),
    (2, "lora", EMA),
    (3, "lora", LAST),
    (1, "bf16", SPARSE),
    (2, "bf16", EMA),
    (3, "bf16", LAST),
]
NO_PASS = ValidationResult(np.ones((1, 1)), np.ones((1, 1)))


def build(stage: int, kind: str, average: str) -> tuple[engine.Engine, Average]:
    threshold = 100_000 if kind == "persistent" else 0
    config = parse(f"""
model: {{name: x, precision: {"bf16" if kind == "bf16" else "fp32"}}}
tasks: {{a: {{train: a, validation: a, format: text}}}}
train: {{steps: {STEPS}}}
optimizer: {{name: sgd, lr: 0.05, clip: null}}
average: {average}
output: x
engine: {{zero: {stage}, deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: {threshold}}}}}}}
""")
    trained = engine.Engine(module(kind), config, optimizer(config))
    return trained, Average(trained, config.average)


def module(kind: str) -> torch.nn.Module:
    return toys.trainable(toys.tiny_llama(), kind)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 259, (6, 12), generator=torch.Generator().manual_seed(step))


def update(trained: engine.Engine, step: int) -> None:
    mine = batch(step).chunk(trained.world)[comm.rank()]
    trained.train()
    trained.backward(trained.forward(input_ids=mine, labels=mine).loss, last=True)
    trained.step(0.05)


def loss(trained: engine.Engine) -> float:
    trained.eval()
    with torch.no_grad():
        return float(trained.evaluate(input_ids=batch(99), labels=batch(99)).loss)


def run(trained: engine.Engine, average: Average, state: RunState, steps: range) -> list[dict]:
    """A pass every second update, as the loop does. What each pass saw, on rank 0."""
    seen, trail = [], []
    for step in steps:
        update(trained, step)
        trail.append(masters.whole(trained, masters.local(trained)))
        state.step = step + 1
        average.after_update(state)
        if state.step % 2:
            continue
        before, raw = trained.state_dict(), loss(trained)
        average.at_pass(state)
        with average.swapped():
            inside, averaged = trained.state_dict(), loss(trained)
            exact = masters.whole(trained, masters.local(trained))
        after = trained.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert loss(trained) == raw
        seen.append(
            {"raw": before, "average": inside, "exact": exact, "losses": (raw, averaged)}
            | {"trail": trail}
        )
    return seen


def job(folder: Path, cases: list[tuple[int, str, str]]) -> list[dict]:
    """Per case: a run at once; the same saved in the middle and gone on with; and without an average."""
    found = []
    for number, (stage, kind, given) in enumerate(cases):
        here = folder / f"{comm.world()}-{number}"
        trained, average = build(stage, kind, given)
        assert stage < 3 or kind == "persistent" or any(
            p.numel() == 0 for p in trained.module.parameters()
        )  # fmt: skip
        state = RunState()
        start = masters.whole(trained, masters.local(trained))
        seen = run(trained, average, state, range(4))
        trained.save(here / "engine")
        comm.together(lambda here=here: here.mkdir(exist_ok=True))
        average.save(here / "average.safetensors")
        averaged = state.averaged
        seen += run(trained, average, state, range(4, STEPS))

        again, average = build(stage, kind, given)
        again.load(here / "engine")
        average.load(here / "average.safetensors")
        resumed = run(again, average, RunState(step=4, averaged=averaged), range(4, STEPS))

        plain, _ = build(stage, kind, given)
        for step in range(STEPS):
            update(plain, step)
        found.append(
            {"start": start, "seen": seen, "resumed": resumed, "plain": plain.state_dict()}
        )
        del trained, again, plain, average
        gc.collect()
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[tuple, dict]:
    folder = tmp_path_factory.mktemp("average")
    found = dict(zip(CASES, run_distributed(job, 2, folder, CASES)[0], strict=True))
    return {**found, "folder": folder}


def reference(kind: str) -> list[dict[str, torch.Tensor]]:
    """The trained weights after each update of plain PyTorch in one process, those at the start first."""
    made = module(kind)
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    torch_sgd = torch.optim.SGD(trained.values(), lr=0.05)
    weights = [{n: p.detach().clone() for n, p in trained.items()}]
    for step in range(STEPS):
        made(input_ids=batch(step), labels=batch(step)).loss.backward()
        torch_sgd.step()
        torch_sgd.zero_grad()
        weights.append({n: p.detach().clone() for n, p in trained.items()})
    return weights


def averaged(weights: list[dict[str, torch.Tensor]], given: str, step: int) -> dict:
    """The formula, in fp64."""

    def mean(parts: list[float], steps: list[int]) -> dict[str, torch.Tensor]:
        return {
            name: sum(part * weights[i][name].double() for part, i in zip(parts, steps, strict=True))
            for name in weights[0]
        }  # fmt: skip

    if given == LAST:
        steps = [s for s in (2, 4, 6) if s <= step][-2:]
        return mean([1 / len(steps)] * len(steps), steps)
    every, warmup = (2, 1) if given == SPARSE else (1, 3)
    parts, steps = [1.0], [0]
    for n, s in enumerate(range(every, step + 1, every)):
        decay = min(0.7, (1 + n) / (warmup + n))
        parts, steps = [p * decay for p in parts] + [1 - decay], [*steps, s]
    return mean(parts, steps)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_average_is_that_of_one_plain_process(jobs, case):
    _, kind, given = case
    found = jobs[case]
    if kind == "bf16":  # its own masters: bf16 sums differ with the number of processes
        first, last = found["seen"][0], found["seen"][-1]
        weights = dict(enumerate([found["start"], *first["trail"], *last["trail"]]))
    else:
        weights = dict(enumerate(reference(kind)))
    for i, one in enumerate(found["seen"]):
        wanted = averaged(weights, given, 2 * i + 2)
        assert wanted.keys() == one["exact"].keys()
        for name, tensor in wanted.items():
            top = float(tensor.abs().max())  # near Adam's update of 1e-3, of weights of about 0.1
            torch.testing.assert_close(one["exact"][name].double(), tensor, rtol=0, atol=1e-5 * top)
            assert torch.equal(one["average"][name], one["exact"][name].to(one["average"][name]))
        if i or given != LAST:
            assert one["losses"][0] != one["losses"][1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_module_computes_with_the_average(jobs, case):
    """Every rank's module has it while it is swapped in, frozen parameters as they were."""
    _, kind, _ = case
    made = module(kind)
    one = jobs[case]["seen"][-1]
    made.load_state_dict(one["average"], strict=False)
    made.eval()
    with torch.no_grad():
        wanted = float(made(input_ids=batch(99), labels=batch(99)).loss)
    assert one["losses"][1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_does_not_notice_and_resume_is_exact(jobs, case):
    found = jobs[case]
    last, (resumed,) = found["seen"][-1], found["resumed"]
    for name, tensor in found["plain"].items():
        assert torch.equal(last["raw"][name], tensor), name
    for what in ("raw", "average", "exact"):
        assert all(torch.equal(last[what][name], resumed[what][name]) for name in last[what])
    assert last["losses"] == resumed["losses"]


def other_layout(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    _, average = build(stage, "full", EMA)
    average.load(folder / "average.safetensors")
    return masters.whole(average.engine, average.copies[0])


@pytest.mark.timeout(300)
def test_another_layout_reads_the_same_average(jobs):
    here = jobs["folder"] / f"2-{CASES.index((2, 'full', EMA))}"
    found = run_distributed(other_layout, 3, here, 3)[0]
    wanted = load_file(here / "average.safetensors")
    assert len(found) == len(wanted)
    assert all(torch.equal(tensor, wanted[f"0.{name}"]) for name, tensor in found.items())


def test_before_the_first_update_the_pass_is_not_repeated():
    average = Average.__new__(Average)
    assert average.measure(RunState(), NO_PASS, lambda: pytest.fail("a second pass")) is NO_PASS


def test_the_estimate_of_memory():
    """A part of the weights a process, in fp32; of the last n passes n of them, and their mean."""
    for given, copies in ((EMA, 1), ("{last: 3}", 4)):
        config = parse(f"""
model: {{name: x}}
tasks: {{a: {{train: a, validation: a, format: text}}}}
train: {{steps: 5}}
average: {given}
output: x
""")
        made = toys.tiny_llama()
        parts = memory.estimate(config, 2, made, 2, positions=1, targets=1)
        (part,) = [part for part in parts if part.name == "average"]
        assert part.bytes == copies * 4 * sum(p.numel() for p in made.parameters()) / 2
