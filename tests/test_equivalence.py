"""However a global batch is cut, laid out and sharded, the update is the one a single plain-PyTorch process makes.

Every number here comes from real engines in real process groups. A process group costs seconds to start, so all jobs of
one world size run in one group, and the tests then compare what the jobs returned with `reference`.
"""

import gc
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import peft
import pytest
import reference
import torch
import toys
from distributed import run_distributed
from near import strayed
from transformers import AutoModelForCausalLM

from balancers import Holder, Signals
from balancers.tokens import Tokens
from mtl import build, plugins
from mtl.config import Config, parse
from mtl.data.batches import Layout, ValidationGroups
from mtl.data.collate import MicroBatch, collate, deal
from mtl.data.encoded import Encoded, TaskData
from mtl.distributed import comm, engine
from mtl.distributed import masters as fp32
from mtl.losses import head
from mtl.losses.causal_lm import causal_lm
from mtl.losses.terms import Terms
from mtl.models import load as models
from mtl.models import packing
from mtl.train import evaluate
from mtl.train import optimizer as optimizers
from mtl.train.run import Run
from mtl.train.step import NonFinite, fetch, train_step

pytestmark = pytest.mark.timeout(900)  # the first test waits for all jobs

NAMES = ["apples", "bees", "cedars"]
PAD = 257  # eos too, and a token that data may hold
ROW = 64

# Five global batches in cells of example tasks. A cell is a micro-batch where the cut is finest: some lack a task, some
# have no example at all (the first step's is one rank's last), one batch lacks a task, and their number varies.
MIXED = [
    [(0, 1, 0), (1,), (2, 0, 1), ()],
    [(0,), (0, 0, 1)],
    [(2,), (1, 1), (0,), (), (0, 1, 2), (0,)],
    [(1,), (2, 2), (0, 0), (1,)],
    [(0, 1, 2), (0,)],
]
PURE = [[(0, 0), (1,), (2,), (0,), (1, 1), (2, 2)]]  # one task in every cell
WEIGHTS = [
    (0.7, 0.007, 0.293),
    (0.2, 0.3, 0.5),
    (0.01, 0.98, 0.01),
    (0.3, 0.3, 0.4),
    (0.1, 0.8, 0.1),
]
RATES = {"sgd": [0.1, 0.2, 0.05, 0.1, 0.15], "adamw": [1e-3, 2e-3, 5e-4, 1e-3, 1e-3]}
CLIP = 0.5

Cell = list[reference.Example]


def examples_of(batches: list[list[tuple[int, ...]]], seed: int = 0) -> list[list[Cell]]:
    """Random rows of 3 to 30 tokens, about half of them targets."""
    rng = np.random.default_rng(seed)

    def example(task: int) -> reference.Example:
        n = int(rng.integers(3, 30))
        ids, target = rng.integers(0, 258, n).astype(np.int32), rng.random(n) < 0.5
        target[0], target[-1] = False, True
        return ids, target, task

    return [[[example(task) for task in cell] for cell in batch] for batch in batches]


def flat(batch: list[Cell]) -> Cell:
    return [example for cell in batch for example in cell]


def micro_batches(batch: list[Cell], cut: str, packed: bool) -> list[MicroBatch]:
    """This rank's part of a global batch.

    Args:
        cut: "cells", in turn over the ranks; "merged", each rank's cells made one; "dealt", as `deal` cuts them all.
        packed: two examples a row (dealt: as many as fit), else one.
    """
    rank, world = comm.rank(), comm.world()
    most = sum(int(target.sum()) for _, target, _ in flat(batch))
    if cut == "dealt":
        examples = flat(batch)
        dealt = deal([len(ids) for ids, _, _ in examples], world, ROW, ROW if packed else None)[
            rank
        ]
        return [
            collate([[examples[i] for i in row] for row in micro], PAD, packed, most)
            for micro in dealt
        ]
    cells = batch[rank::world]
    if cut == "merged":
        cells = [flat(cells)]
    wide = 2 if packed else 1
    return [
        collate([cell[i : i + wide] for i in range(0, len(cell), wide)], PAD, packed, most)
        for cell in cells
    ]


def configuration(folder: str, **overrides: object) -> Config:
    text = f"""
        model: {{name: {folder}, precision: fp32}}
        tasks: {{{", ".join(f"{name}: {{train: x, validation: x, format: text}}" for name in NAMES)}}}
        train: {{steps: 5}}
        optimizer: {{name: sgd, lr: 1.0, clip: null}}
        engine: {{deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}}}
        output: nowhere
    """
    return parse(
        text, overrides=[f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    )


# --- jobs: what runs on every rank of a process group


class Expose(torch.optim.Optimizer):
    """Overwrites the parameters with their gradients: what an optimizer is handed, without a difference's rounding."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(p.grad)


def exposed(config: Config, data: build.Data, allow_code: Sequence[str] = ()) -> Run:
    """The run of a config. At a step its parameters become the gradients of the batch."""

    def make(module: torch.nn.Module) -> Expose:
        return Expose([p for p in module.parameters() if p.requires_grad])

    model = plugins.loader(config)(config, data.tokenizer, data.examples, empty=False)
    trained = engine.Engine(model, config, make)
    settings = {"engine": trained, "packed": False, "say": lambda text: None}
    return build.build(config, data, allow_code=allow_code, **settings)


class Nudge(Expose):
    """Multiplies the parameters by 1 + 2^-11: less than bf16 can show, until many of them have added up."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 + 2**-11)


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def start(
    folder: str, make: type[torch.optim.Optimizer] | None = None, **overrides: object
) -> engine.Engine:
    """A fresh engine. Adapters get seeded noise: the zeros they begin with would hide half of their gradients."""
    gc.collect()
    gc.freeze()  # what is alive is mostly modules: leaving them out makes collections, DeepSpeed's too, 20 times faster
    config = configuration(folder, **overrides)
    loaded = models.load(config, toys.tokenizer())
    generator = torch.Generator().manual_seed(1)
    for name, p in loaded.named_parameters():
        if "lora_" in name:
            assert p.numel(), "adapters are made whole"
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    made = optimizers.optimizer(config) if make is None else lambda module: make(trainable(module))
    return engine.Engine(loaded, config, made)


def parameters(trained: engine.Engine) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in trained.state_dict().items()}


def masters(trained: engine.Engine) -> dict[str, np.ndarray]:
    """The fp32 weights that the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(p).numpy().copy()
        for name, p in trained.module.named_parameters()
    }


def update(
    trained: engine.Engine, batch: list[Cell], weights: Sequence[float], cut: str, packed: bool
) -> None:
    """One update by an optimizer that reads no learning rate."""
    fetched = fetch(lambda: micro_batches(batch, cut, packed), len(NAMES))
    train_step(trained, causal_lm, fetched, np.array(weights), 0.0, NAMES)


def train(
    folder: str,
    cut: str = "cells",
    packed: bool = False,
    by_tokens: bool = False,
    **overrides: object,
) -> dict[str, Any]:
    """Five updates."""
    trained = start(folder, **overrides)
    before = parameters(trained)
    holder, losses, norms, used = Holder(Tokens(), NAMES), [], [], []
    rates = RATES[str(overrides.get("optimizer__name", "sgd"))]
    for t, (batch, weights, lr) in enumerate(zip(examples_of(MIXED), WEIGHTS, rates, strict=True)):
        fetched = fetch(lambda b=batch: micro_batches(b, cut, packed), len(NAMES))
        if by_tokens:
            weights = holder.update(Signals(step=t, tokens=fetched.tokens.numpy()))
        report = train_step(trained, causal_lm, fetched, np.array(weights), lr, NAMES)
        losses.append(report.losses), norms.append(report.grad_norm), used.append(weights)
    return {
        "before": before,
        "parameters": parameters(trained),
        "losses": np.array(losses),
        "norms": norms,
        "weights": np.array(used),
        "local": [p.numel() for p in trained.module.parameters()],
        "dtypes": {p.dtype for p in trained.module.parameters()},
    }


def gradient(
    folder: str,
    cut: str = "cells",
    packed: bool = False,
    batches: list = MIXED,
    weights: Sequence[float] = WEIGHTS[0],
    master: bool = False,
    **overrides: object,
) -> dict[str, Any]:
    """What the optimizer is handed for the first batch, and how often a layer ran forward."""
    trained = start(folder, Expose, **overrides)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    part = next(m for name, m in trained.module.named_modules() if name.endswith("mlp"))
    part.register_forward_pre_hook(count)
    batch = examples_of(batches)[0]
    update(trained, batch, weights, cut, packed)
    wanted = {n for n, p in trained.module.named_parameters() if p.requires_grad}
    found = masters(trained) if master else parameters(trained)
    micros = len(micro_batches(batch, cut, packed))
    return {
        "gradient": {n: g for n, g in found.items() if n in wanted},
        "forwards": forwards / micros,
        "local": [p.numel() for p in trained.module.parameters()],
    }


def nudge(folder: str, **overrides: object) -> dict[str, Any]:
    """32 updates, each too small for bf16."""
    trained = start(folder, Nudge, **overrides)
    batch = examples_of([[(0,), (1,)]])[0]
    before = parameters(trained)
    update(trained, batch, WEIGHTS[1], "cells", False)
    once = parameters(trained)
    for _ in range(31):
        update(trained, batch, WEIGHTS[1], "cells", False)
    return {"before": before, "once": once, "after": parameters(trained)}


def dithered(folder: str, **overrides: object) -> dict[str, Any]:
    """Master weights with drawn lower bits, before and after, and one update too small for bf16."""
    trained = start(folder, Nudge, **overrides)
    before = parameters(trained)
    whole = fp32.whole(trained, fp32.local(trained))
    fp32.dither(trained, 5)
    drawn = fp32.whole(trained, fp32.local(trained))
    fp32.publish(trained)
    published = parameters(trained)
    update(trained, examples_of([[(0,), (1,)]])[0], WEIGHTS[1], "cells", False)
    return {
        "before": before,
        "whole": {name: each.numpy() for name, each in whole.items()},
        "drawn": {name: each.numpy() for name, each in drawn.items()},
        "published": published,
        "once": parameters(trained),
    }


def spoiled(folder: str, value: float | None, **overrides: object) -> dict[str, Any]:
    """One task's loss is `value`, on the last rank alone; None: the loss is as it was, but its gradient is infinite."""
    trained = start(folder, **overrides)
    before = parameters(trained)

    def objective(forward: Callable, batch: MicroBatch, k: int) -> Terms:
        terms = causal_lm(forward, batch, k)
        ill = (
            (torch.arange(k) == NAMES.index("bees"))
            & (terms.counts > 0)
            & (comm.rank() == comm.world() - 1)
        )
        if value is None:
            terms.sums.register_hook(lambda gradient: torch.where(ill, math.inf, gradient))
            return terms
        return Terms(torch.where(ill, value, terms.sums), terms.counts)

    fetched = fetch(lambda: micro_batches(examples_of(MIXED)[0], "cells", False), len(NAMES))
    try:
        train_step(trained, objective, fetched, np.array(WEIGHTS[0]), 0.1, NAMES)
    except NonFinite as e:
        error = str(e)
    return {"error": error, "before": before, "after": parameters(trained)}


def same(_: str) -> list[str]:
    found = []
    for text in ("the same", f"order of {comm.rank()}"):
        try:
            comm.same({"order": text}, "order")
            found.append("agreed")
        except (ValueError, comm.RankError) as e:
            found.append(f"{type(e).__name__}: {e}")
    return found


def one_rank_fails(_: str) -> dict[str, Any]:
    """`together` and `fetch` where one rank's work fails, where all do, and afterwards where none does."""

    def work() -> int:
        if comm.rank() == 1:
            raise KeyError("row 7")
        return comm.rank()

    def all_fail() -> None:
        raise ValueError(f"rank {comm.rank()} is out of rows")

    found = []
    for attempt in (
        lambda: comm.together(work),
        lambda: fetch(work, 3),
        lambda: comm.together(all_fail),
    ):
        try:
            attempt()
        except Exception as e:
            found.append((type(e).__name__, str(e)))
    return {"found": found, "then": comm.together(comm.rank), "sum": comm.sum_(torch.tensor([1 + comm.rank()])).item(),
            "sent": comm.broadcast_(torch.tensor([comm.rank()]), source=comm.world() - 1).item()}  # fmt: skip


def validation_tasks() -> list[TaskData]:
    cells = examples_of([[(0,) * 7, (1,) * 4, (2,) * 3]], seed=3)[0]
    splits = [Encoded.of([(ids, target) for ids, target, _ in cell]) for cell in cells]
    return [TaskData(name, split, split) for name, split in zip(NAMES, splits, strict=True)]


def validate(folder: str, packed: bool, **overrides: object) -> dict[str, Any]:
    trained = start(folder, **overrides)
    layout = Layout(comm.world(), comm.rank(), ROW, PAD, packed, ROW if packed else None)
    cut = ValidationGroups(validation_tasks(), 3, 0, layout)
    full = evaluate.full_pass(trained, causal_lm, cut, len(NAMES))
    probes = [evaluate.probe(trained, causal_lm, cut, g, len(NAMES)) for g in range(cut.groups)]
    return {
        "full": full,
        "probes": np.array(probes),
        "micros": [len(list(cut.group(g))) for g in range(cut.groups)],
    }


def isolation(folder: str, **overrides: object) -> packing.Isolation:
    return packing.measure(start(folder, **overrides), 258)


def run_jobs(
    folders: dict[str, str], jobs: dict[str, tuple[Callable, dict[str, Any]]]
) -> dict[str, Any]:
    results = {}
    for name, (function, arguments) in jobs.items():
        others = {key: value for key, value in arguments.items() if key not in ("family", "slice_")}
        rows = arguments.get("slice_", 1000)
        head.slice_rows = lambda hidden, rows=rows: rows
        try:
            results[name] = function(folders[arguments.get("family", "llama")], **others)
        except Exception as e:
            e.add_note(f"in the job {name!r}")
            raise
    return results


# --- which jobs there are

CUTS = {
    "1x4": {"world": 1, "cut": "cells"},
    "2x2": {"world": 2, "cut": "cells"},
    "2x1": {"world": 2, "cut": "merged"},
    "2x1 packed": {"world": 2, "cut": "merged", "packed": True},
    "2x2 packed": {"world": 2, "cut": "cells", "packed": True},
    "2 dealt": {"world": 2, "cut": "dealt"},
    "2 dealt packed": {"world": 2, "cut": "dealt", "packed": True},
    "1 dealt packed": {"world": 1, "cut": "dealt", "packed": True},
    "2x2 sliced": {"world": 2, "cut": "cells", "slice_": 20},
}
STAGES = (0, 1, 2, 3)
ALL_CUTS = [(cut, zero) for cut in ("1x4", "2x2", "2x1") for zero in STAGES]
MORE_CUTS = [
    ("2x1 packed", 1),
    ("2x2 packed", 3),
    ("2 dealt", 2),
    ("2 dealt packed", 2),
    ("1 dealt packed", 3),
    ("2x2 sliced", 2),
    ("2x2 sliced", 3),
]
GPT2_CUTS = [
    ("2x2 packed", 0),
    ("2x2 packed", 1),
    ("2x2", 2),
    ("2x2", 3),
    ("1x4", 2),
    ("2x1", 2),
    ("2x2 sliced", 3),
]
LOUD, QUIET = (0.98, 0.01, 0.01), (0.01, 0.98, 0.01)
LORA = {"model__lora__r": 4, "model__lora__alpha": 8}
BF16 = {"model__precision": "bf16"}

JOBS: dict[str, tuple[int, Callable, dict[str, Any]]] = {}


def job(name: str, function: Callable, world: int = 2, **arguments: Any) -> None:
    assert name not in JOBS
    JOBS[name] = world, function, arguments


for at, z in ALL_CUTS + MORE_CUTS:
    job(f"llama gradient {at} zero {z}", gradient, **CUTS[at], engine__zero=z)
    job(f"llama sgd {at} zero {z}", train, **CUTS[at], engine__zero=z)
for at, z in GPT2_CUTS:
    job(f"gpt2 gradient {at} zero {z}", gradient, family="gpt2", **CUTS[at], engine__zero=z)
    job(f"gpt2 sgd {at} zero {z}", train, family="gpt2", **CUTS[at], engine__zero=z)
for at, z in [("1x4", 2), ("2x2", 0), ("2x2", 1), ("2x2", 2), ("2x2", 3), ("2x1 packed", 2)]:
    job(f"llama adamw {at} zero {z}", train, **CUTS[at], engine__zero=z, optimizer__name="adamw")
for z in STAGES:
    job(f"clip zero {z}", train, engine__zero=z, optimizer__clip=CLIP)
    job(f"quiet zero {z}", gradient, batches=PURE, weights=QUIET, engine__zero=z)
    job(f"nan zero {z}", spoiled, value=math.nan, engine__zero=z)
    job(f"steep zero {z}", spoiled, value=None, engine__zero=z)
for z in (2, 3):
    job(f"lora zero {z}", train, engine__zero=z, **LORA)
    job(f"lora gradient zero {z}", gradient, engine__zero=z, **LORA)
    job(
        f"lora checkpointing zero {z}",
        gradient,
        engine__zero=z,
        model__activation_checkpointing="true",
        **LORA,
    )
    job(
        f"lora gradient sliced zero {z}",
        gradient,
        slice_=20,
        engine__zero=z,
        model__activation_checkpointing="true",
        **LORA,
    )
    job(f"checkpointing zero {z}", gradient, engine__zero=z, model__activation_checkpointing="true")
    job(f"tokens zero {z}", train, engine__zero=z, by_tokens=True)
    job(f"loud zero {z}", gradient, batches=PURE, weights=LOUD, engine__zero=z)
job("tokens adamw zero 2", train, by_tokens=True, optimizer__name="adamw", engine__zero=2)
job("inf zero 2", spoiled, value=math.inf, engine__zero=2)
for z in (1, 2, 3):
    job(f"bf16 zero {z}", train, engine__zero=z, **BF16)
    job(f"bf16 gradient 1x4 zero {z}", gradient, **CUTS["1x4"], engine__zero=z, master=True, **BF16)
    job(f"bf16 gradient 2x2 zero {z}", gradient, **CUTS["2x2"], engine__zero=z, master=True, **BF16)
    job(f"nudge zero {z}", nudge, engine__zero=z, **BF16)
    job(f"dither zero {z}", dithered, engine__zero=z, **BF16)
job("bf16 zero 0", train, engine__zero=0, **BF16)
job("autocast zero 2", train, engine__zero=2, model__precision="bf16_autocast")
job("one rank fails", one_rank_fails)
job("same", same)
for n, z in ((1, 2), (2, 2), (2, 3)):
    for p in (False, True):
        job(
            f"validation {n} {'packed' if p else 'padded'} zero {z}",
            validate,
            world=n,
            packed=p,
            engine__zero=z,
        )
job("isolation zero 3", isolation, engine__zero=3)
job("isolation bf16", isolation, engine__zero=2, **BF16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    makers = {"llama": toys.tiny_llama, "gpt2": toys.tiny_gpt2}
    return {name: toys.save(make(), root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def results(folders: dict[str, str]) -> dict[str, list[Any]]:
    """Job name -> what each rank returned."""
    found = {}
    for world in (1, 2):
        mine = {
            name: (function, arguments)
            for name, (n, function, arguments) in JOBS.items()
            if n == world
        }
        ranks = run_distributed(run_jobs, world, folders, mine)
        found |= {name: [rank[name] for rank in ranks] for name in mine}
    return found


# --- the reference, and what is compared


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def optimizer(name: str) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=1.0)
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )


BATCHES = [flat(batch) for batch in examples_of(MIXED)]


@pytest.fixture(scope="module")
def trajectory(folders: dict[str, str]) -> Callable[..., reference.Trajectory]:
    """(family, optimizer, clip) -> the reference's five updates."""

    @cache
    def run(family: str, name: str = "sgd", clip: float | None = None) -> reference.Trajectory:
        return reference.train(
            load(folders[family]), BATCHES, WEIGHTS, RATES[name], optimizer(name), clip
        )

    return run


@pytest.fixture(scope="module")
def first_gradient(folders: dict[str, str]) -> Callable[[str], dict[str, np.ndarray]]:
    return cache(lambda family: reference.gradient(load(folders[family]), BATCHES[0], WEIGHTS[0]))


def furthest(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest absolute difference of any element."""
    assert set(found) == set(wanted)
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


def apart(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest relative difference (2-norm) of any tensor."""
    assert set(found) == set(wanted)
    return max(
        float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in wanted
    )


def apart_together(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The relative difference (2-norm) of all tensors as one vector."""
    assert set(found) == set(wanted)
    difference = sum(float(np.square(found[n] - wanted[n]).sum()) for n in wanted)
    return math.sqrt(difference / sum(float(np.square(wanted[n]).sum()) for n in wanted))


def moved(result: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: result["parameters"][name] - before for name, before in result["before"].items()}


def named(start: str) -> list[str]:
    names = [name for name in JOBS if name.startswith(start)]
    assert names
    return names


# --- fp32


@pytest.mark.parametrize("name", named("llama gradient") + named("gpt2 gradient"))
def test_gradients(name, results, first_gradient):
    assert apart(results[name][0]["gradient"], first_gradient(name.split()[0])) < 1e-6


@pytest.mark.parametrize("name", named("llama sgd") + named("gpt2 sgd"))
def test_five_sgd_updates(name, results, trajectory):
    wanted = trajectory(name.split()[0])
    for found in results[name]:  # the losses are the same on every rank
        np.testing.assert_allclose(found["losses"], wanted.losses, rtol=1e-6)
    found = results[name][0]
    assert strayed(found["parameters"], wanted.parameters, found["before"]) < 5e-5
    assert furthest(found["parameters"], found["before"]) > 1e-2
    for found, norm in zip(results[name][0]["norms"], wanted.norms, strict=True):
        assert math.isclose(found, norm, rel_tol=1e-6)


def test_a_task_that_is_absent_from_the_batch_has_no_loss(results):
    absent = np.isnan(results["llama sgd 2x2 zero 2"][1]["losses"])
    assert absent.sum() == 1 and absent[1, 2]


@pytest.mark.parametrize("name", named("llama adamw"))
def test_five_adamw_updates(name, results, trajectory):
    found, wanted = results[name][0], trajectory("llama", "adamw")
    assert strayed(found["parameters"], wanted.parameters, found["before"]) < 1e-2
    assert (
        furthest(found["parameters"], found["before"]) > 4e-3
    )  # five updates of about the learning rate


@pytest.mark.parametrize(
    "name", [name for name in JOBS if name.endswith("zero 3") and "gradient" in name]
)
def test_zero_3_is_partitioned_for_real(name, results):
    for rank in results[name]:
        assert set(rank["local"]) == {0}


def test_lower_stages_are_not(results):
    assert min(results["llama gradient 2x2 zero 2"][0]["local"]) > 0


@pytest.mark.parametrize("zero", STAGES)
def test_clipping(zero, results, trajectory):
    found, wanted = results[f"clip zero {zero}"][0], trajectory("llama", "sgd", CLIP)
    assert wanted.norms.min() > 2 * CLIP  # it is in force
    assert strayed(found["parameters"], wanted.parameters, found["before"]) < 5e-5
    for mine, norm in zip(found["norms"], wanted.norms, strict=True):  # before clipping
        assert math.isclose(mine, norm, rel_tol=1e-6)


@pytest.mark.parametrize("name", named("loud") + named("quiet"))
def test_weights_act_where_every_micro_batch_holds_one_task(name, results, folders):
    """The gradient is the weights' combination of the tasks' own gradients, with weights that differ by 100 times."""
    weights = LOUD if name.startswith("loud") else QUIET
    batch = flat(examples_of(PURE)[0])
    own = [reference.gradient(load(folders["llama"]), batch, np.eye(3)[k]) for k in range(3)]
    wanted = {n: sum(w * g[n] for w, g in zip(weights, own, strict=True)) for n in own[0]}
    assert apart(results[name][0]["gradient"], wanted) < 1e-6
    swapped = {
        n: sum(w * g[n] for w, g in zip(weights[1::-1] + weights[2:], own, strict=True))
        for n in own[0]
    }
    assert apart_together(results[name][0]["gradient"], swapped) > 0.5


@pytest.mark.parametrize("name", named("tokens"))
def test_token_weights_give_the_loss_of_ordinary_fine_tuning(name, results, folders):
    rule = "adamw" if "adamw" in name else "sgd"
    curve, parameters = reference.transformers_loss_curve(
        load(folders["llama"]), BATCHES, RATES[rule], optimizer(rule)
    )
    found = results[name][0]
    np.testing.assert_allclose(
        np.nansum(found["weights"] * found["losses"], axis=1), curve, rtol=1e-6
    )
    bound = 5e-5 if rule == "sgd" else 1e-2
    assert strayed(found["parameters"], parameters, found["before"]) < bound


@pytest.mark.parametrize("name", named("checkpointing"))
def test_activation_checkpointing_gives_the_same_gradients(name, results, first_gradient):
    assert apart(results[name][0]["gradient"], first_gradient("llama")) < 1e-6
    assert (
        results[name][0]["forwards"] == 2
        and results["llama gradient 2x2 zero 2"][0]["forwards"] == 1
    )


# --- LoRA

# PEFT asks transformers for it when it adds an adapter.
peft_warns = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def adapted(folder: str, state: dict[str, np.ndarray]) -> torch.nn.Module:
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )
    result = peft.get_peft_model(load(folder), settings)
    result.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return result


@peft_warns
@pytest.mark.parametrize("zero", (2, 3))
def test_lora(zero, results, folders):
    found = results[f"lora zero {zero}"][0]
    wanted = reference.train(
        adapted(folders["llama"], found["before"]), BATCHES, WEIGHTS, RATES["sgd"], optimizer("sgd")
    )
    assert strayed(found["parameters"], wanted.parameters, found["before"]) < 5e-5
    change = {name: np.abs(array).max() for name, array in moved(found).items()}
    assert min(x for name, x in change.items() if "lora_" in name) > 1e-4
    assert max(x for name, x in change.items() if "lora_" not in name) == 0


@peft_warns
@pytest.mark.parametrize("zero", (2, 3))
@pytest.mark.parametrize("kind", ("gradient", "checkpointing"))
def test_lora_gradients(kind, zero, results, folders):
    start = results[f"lora zero {zero}"][0]["before"]
    wanted = reference.gradient(adapted(folders["llama"], start), BATCHES[0], WEIGHTS[0])
    found = results[f"lora {kind} zero {zero}"][0]
    assert apart(found["gradient"], wanted) < 1e-6
    assert found["forwards"] == (2 if kind == "checkpointing" else 1)


# --- bf16


@pytest.mark.parametrize("name", named("bf16 zero") + named("autocast"))
def test_bf16_stays_close_to_fp32(name, results, trajectory):
    """Within a few of bf16's roundings (2^-9): losses to 0.1 %, five updates together to 4 % (autocast: 1 %)."""
    found, wanted = results[name][0], trajectory("llama")
    np.testing.assert_allclose(found["losses"], wanted.losses, rtol=1e-3)
    start = results["llama sgd 2x2 zero 2"][0]["before"]
    change = {n: wanted.parameters[n] - start[n] for n in start}
    assert apart_together(moved(found), change) < (0.01 if "auto" in name else 0.04)
    assert found["dtypes"] == {torch.float32 if "auto" in name else torch.bfloat16}
    if "auto" in name:  # and it does compute in bf16
        assert np.nanmax(np.abs(found["losses"] - wanted.losses)) > 1e-4


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_bf16_gradients_add_up_in_fp32(zero, results, first_gradient):
    """A micro-batch's gradient is the same bf16 numbers in both cuts; added or sent in bf16, the sums would differ."""
    whole, parts = (
        results[f"bf16 gradient {cut} zero {zero}"][0]["gradient"] for cut in ("1x4", "2x2")
    )
    assert apart(parts, whole) < 1e-6
    assert apart(parts, first_gradient("llama")) < 0.02


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_bf16_has_fp32_master_weights(zero, results):
    """32 updates by a factor 1 + 2^-11: bf16, which keeps 8 bits, shows none of them alone and all of them together."""
    found = results[f"nudge zero {zero}"][0]
    assert furthest(found["once"], found["before"]) == 0
    for name, before in found["before"].items():
        np.testing.assert_allclose(found["after"][name], before * (1 + 2**-11) ** 32, rtol=2**-8)
        assert (found["after"][name] != before)[before != 0].all()


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_drawn_lower_bits_change_no_weight_and_show_the_mean_of_an_update(zero, results):
    """The update is a factor of 1 + 2^-11: a sixteenth to an eighth of the space between bf16 numbers."""
    found = results[f"dither zero {zero}"][0]
    assert furthest(found["published"], found["before"]) == 0
    places, moved = [], []
    for name, before in found["before"].items():
        np.testing.assert_array_equal(found["whole"][name], before, err_msg="on the grid before")
        np.testing.assert_array_equal(found["drawn"][name], results["dither zero 1"][0]["drawn"][name])
        assert (found["drawn"][name] == before)[before == 0].all()
        has = before != 0
        bits = [np.ascontiguousarray(one[has]).view(np.int32) for one in (found["drawn"][name], before)]
        places.append((bits[0] - bits[1]) / 2**16)  # in spaces of the grid
        moved.append(found["once"][name][has] / before[has] - 1)
    places, moved = np.concatenate(places), np.concatenate(moved)
    assert len(places) > 10_000
    assert np.abs(places).max() < 0.5
    wanted = (np.arange(len(places)) + 0.5) / len(places) - 0.5
    # Kolmogorov and Smirnov's distance, at p = 0.001
    assert np.abs(np.sort(places) - wanted).max() < 1.95 / len(places) ** 0.5
    noise = moved.std() / len(moved) ** 0.5
    assert abs(moved.mean() - 2**-11) < 4 * noise and noise < 2**-11 / 10


# --- errors


@pytest.mark.parametrize("name", named("nan") + named("inf"))
def test_a_loss_that_is_not_finite_on_one_rank_ends_both_before_the_update(name, results):
    value = name.split()[0]
    for rank in results[name]:
        assert f"the loss of bees ({value}) is not finite" in rank["error"]
    assert furthest(results[name][0]["after"], results[name][0]["before"]) == 0


@pytest.mark.parametrize("name", named("steep"))
def test_a_gradient_that_is_not_finite_ends_both_without_an_update(name, results):
    for rank in results[name]:
        assert rank["error"].startswith(("the gradient norm is nan.", "the gradient norm is inf."))
    assert furthest(results[name][0]["after"], results[name][0]["before"]) == 0


def test_other_texts_on_other_ranks_are_noticed(results):
    text = "order: 'order of 0' on rank 0; 'order of 1' on rank 1"
    for found in results["same"]:
        assert found[0] == "agreed" and found[1].startswith("ValueError") and text in found[1]


def test_an_error_on_one_rank_ends_both(results):
    one, two = results["one rank fails"]
    assert one["found"][0] == one["found"][1] == ("RankError", "rank 1 failed: KeyError: 'row 7'")
    assert two["found"][0] == two["found"][1] == ("KeyError", "'row 7'")
    for rank, found in enumerate((one, two)):
        assert found["found"][2] == ("ValueError", f"rank {rank} is out of rows")
    assert (one["then"], two["then"]) == (0, 1)  # and the group still works
    assert (one["sum"], two["sum"]) == (3, 3) and (one["sent"], two["sent"]) == (1, 1)


# --- validation and isolation


@pytest.mark.parametrize("name", named("validation"))
def test_validation(name, results, folders):
    """Every group's sums and counts on every rank, and the probe of a group is that group's loss."""
    tasks = validation_tasks()
    cut = ValidationGroups(tasks, 3, 0, Layout(1, 0, ROW, PAD))
    module, losses = load(folders["llama"]).eval(), np.zeros((3, 3))
    tokens = np.zeros((3, 3))
    with torch.no_grad():
        for group in range(3):
            for k, rows in enumerate(cut.rows(group)):
                split = tasks[k].validation
                examples = [(split.ids(i), split.target(i), k) for i in rows.tolist()]
                found, counts = reference.task_losses(module, examples, 3)
                losses[k, group], tokens[k, group] = found[k], counts[k]
    assert tokens.sum() == sum(task.validation.targets.sum() for task in tasks)
    for rank in results[name]:
        full = rank["full"]
        assert (full.tokens == tokens).all()
        np.testing.assert_allclose(full.sums, losses * tokens, rtol=1e-6)
        np.testing.assert_allclose(rank["probes"], losses.T, rtol=1e-6)
        np.testing.assert_allclose([full.group(g) for g in range(3)], losses.T, rtol=1e-6)
        np.testing.assert_allclose(full.losses, (losses * tokens).sum(1) / tokens.sum(1), rtol=1e-6)
    summary = results[name][0]["full"].summary(NAMES)
    means = (losses * tokens).sum(1) / tokens.sum(1)
    wanted = dict(zip(NAMES, means, strict=True)) | {"macro": means.mean(), "worst": means.max()}
    wanted["token"] = (losses * tokens).sum() / tokens.sum()
    wanted["log"] = np.log(means).mean()
    assert summary == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", named("isolation"))
def test_isolation_is_measured_in_an_engine(name, results):
    one, two = results[name]
    assert one.holds and one == two
    assert one.leak == 0 and one.apart < (0.02 if "bf16" in name else 1e-6)
