"""A task that is done is held to its own best: the cache, the run, its resume, and its end."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from transformers import AutoModelForCausalLM

from mtl import build, plugins
from mtl.config import ConfigError
from mtl.data.encoded import Encoded, Flat, TaskData
from mtl.data.next_token import TEACHER
from mtl.losses import teacher
from mtl.output.state import RunState
from mtl.train.anchor import Anchors, unseen

NAMES = ("copy", "chat", "prose")
PATIENCE = "evaluate.patience={evaluations: 1, action: anchor}"
SETTINGS = (
    PATIENCE,
    "evaluate.every=3",
    "balancer=Equal",
    "train.steps=15",
    "checkpoint={every: 5, keep: 9}",
    "objective=outside:causal_lm",
    "optimizer.lr=5.0e-3",
    "schedule={name: constant, warmup: 0}",
)
LORA = ("model.lora={r: 4}", "optimizer.lr=2.0e-2")
FOLLOW = ("mix={shares: equal, follow: balancer, every: 4}", "balancer=RLW")
CASES = {
    "one process": (1, ["engine.zero=0"]),
    "zero 0": (2, ["engine.zero=0"]),
    "zero 2": (2, ["engine.zero=2"]),
    "zero 3": (2, ["engine.zero=3"]),
    "lora": (2, ["engine.zero=2", *LORA]),
    "lora, one process": (1, ["engine.zero=0", *LORA]),
    "lora, zero 0": (2, ["engine.zero=0", *LORA]),
    "lora, zero 3": (2, ["engine.zero=3", *LORA]),
    "follow": (2, ["engine.zero=2", *FOLLOW]),
    "follow, one process": (1, ["engine.zero=0", *FOLLOW]),
}


def write(folder: Path) -> Path:
    """Prose is validated on letters that no task trains. Its best is step 6, and it is done at 9."""
    yaml = runs.write(folder)
    rows = [{"text": "ZQXJ KVWY"}, {"text": "QQZZ XXKK JJ"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prose.validation.jsonl").write_text(text)
    train = folder / "prose.train.jsonl"
    train.write_text(train.read_text() * 4)  # more rows than a held task draws
    return yaml


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("anchor"))


@pytest.fixture(scope="module")
def at_once(yaml) -> dict[str, Path]:
    """Every case, run at once."""
    found = {}
    for name, (world, given) in CASES.items():
        found[name] = yaml.parent / name
        runs.train(yaml, *SETTINGS, *given, f"output={found[name]}", world=world).well()
    return found


def steps(output: Path) -> list[dict]:
    return [line for line in runs.metrics(output) if "train/loss" in line]


FULL = ["one process", "zero 0", "zero 2", "zero 3"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", FULL)
def test_from_the_pass_on_prose_is_held(case, at_once):
    lines = steps(at_once[case])
    assert len(lines) == 15
    for line in lines[:9]:
        assert [line[f"train/{name}/weight"] for name in NAMES] == pytest.approx([1 / 3] * 3)
        assert not any(f"train/{name}/kl" in line for name in NAMES)
    for line in lines[9:]:
        wanted = [(1 - 0.25 / 3) / 2] * 2 + [0.25 / 3]
        assert [line[f"train/{name}/weight"] for name in NAMES] == pytest.approx(wanted)
        assert [name for name in NAMES if f"train/{name}/loss" not in line] == ["prose"]
    assert lines[9]["draws/prose/planned"] == pytest.approx(0.25 / 3, abs=1e-3)


def test_it_comes_back(at_once):
    """With LoRA, where losses hardly move: each pass finds others done, and frees some."""
    lines = steps(at_once["lora"])
    kl = {name: [line["step"] for line in lines if f"train/{name}/kl" in line] for name in NAMES}
    assert any(steps and steps[-1] < lines[-1]["step"] for steps in kl.values())
    for line in lines:
        assert not any({f"train/{n}/kl", f"train/{n}/loss"} <= set(line) for n in NAMES)
        assert sum(line[f"train/{name}/weight"] for name in NAMES) == pytest.approx(1)


@pytest.mark.parametrize(
    "case", ["zero 0", "zero 2", "zero 3", "lora", "lora, zero 0", "lora, zero 3", "follow"]
)
def test_two_processes_train_as_one(case, at_once):
    alone = {"lora": "lora, one process", "foll": "follow, one process"}.get(
        case[:4], "one process"
    )
    ours, theirs = steps(at_once[case]), steps(at_once[alone])
    for mine, wanted in zip(ours, theirs, strict=True):
        for tag in wanted:
            if tag.endswith(("/loss", "/kl", "/weight", "grad_norm")):
                assert mine[tag] == pytest.approx(wanted[tag], rel=2e-3, abs=1e-5), tag


@pytest.mark.parametrize("case", ["one process", "zero 2", "zero 3"])
def test_the_cache_is_what_the_best_model_says(case, at_once, yaml):
    stored = np.load(at_once[case] / "anchors" / "task-2-00000006-00000009.npy")
    assert stored.dtype.itemsize == 516
    best = at_once[case] / "checkpoints" / "step-00000006" / "model"
    model = AutoModelForCausalLM.from_pretrained(best).eval()
    config = plugins.read(str(yaml), [*SETTINGS], runs.ALLOWED)
    tasks = build.encode(config, runs.ALLOWED).tasks
    rows, at = tasks[2].train, 0
    mix = build.mix_for(config, tasks)
    held = mix.next(mix.first, 9, np.array([11 / 24, 11 / 24, 2 / 24]))  # from step 9 to 15
    first, last = (int(mix.drawn(step, held)[2]) for step in (9, 15))
    read = mix.rows(2, first, last + 6)
    assert len(read) < len(rows), "or no row is left out"
    for i in range(len(rows)):
        ids = torch.tensor(rows.ids(i), dtype=torch.long)
        where = torch.from_numpy(np.flatnonzero(rows.target(i))) - 1
        with torch.no_grad():
            kept, log_p = teacher.summary(model(ids[None]).logits[0, where].float())
        mine = stored[at : at + len(where)]
        at += len(where)
        if i not in read:
            assert not mine["log_p"].any() and not mine["ids"].any()
            continue
        np.testing.assert_allclose(mine["log_p"], log_p, atol=2e-4)
        assert (mine["ids"] == kept.numpy()).mean() > 0.9  # near ties change places
    assert at == len(stored)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["zero 0", "zero 2", "zero 3", "lora", "lora, zero 3", "follow"])
def test_a_run_killed_while_a_task_is_held_goes_on_bit_for_bit(case, at_once, yaml):
    world, given = CASES[case]
    output = yaml.parent / f"{case} killed"
    settings = (*SETTINGS, *given, f"output={output}")
    assert -9 in runs.train(yaml, *settings, world=world, MISFORTUNE="kill step 11 0").codes
    runs.train(yaml, *settings, world=world, resume=True).well()
    assert runs.untimed(output) == runs.untimed(at_once[case])
    names = [sorted(p.name for p in (one / "anchors").iterdir()) for one in (output, at_once[case])]
    assert names[0] == names[1] and any(name.startswith("task-") for name in names[0])


def test_a_cache_that_is_gone_is_made_anew(yaml):
    output = yaml.parent / "gone"
    settings = (*SETTINGS, "engine.zero=0", f"output={output}")
    runs.train(yaml, *settings, MISFORTUNE="kill step 11 0")
    cache = output / "anchors" / "task-2-00000006-00000009.npy"
    cache.unlink()
    ended = runs.train(yaml, *settings, resume=True).well()
    assert f"{cache} is gone: prose begins anew, not done and without a best" in ended.err
    weights = [line["train/prose/weight"] for line in steps(output)]
    assert weights[9] == pytest.approx(0.25 / 3) and weights[10] == pytest.approx(1 / 3)


def test_a_longer_run_reads_the_rows_that_it_draws_more(yaml):
    output = yaml.parent / "longer"
    settings = (*SETTINGS, "engine.zero=0", f"output={output}")
    runs.train(yaml, *settings, world=1).well()
    longer = runs.train(yaml, *settings, "train.steps=30", world=1, resume=True).well()
    assert longer.err.count("prose: its best weights read") == 1, "or a row has no answers"
    read = [line["step"] for line in runs.metrics(output) if "anchor/rows" in line]
    assert read[:2] == [9, 15]
    kl = [line.get("train/prose/kl", np.nan) for line in steps(output)[9:18]]
    assert np.nanmax(kl) < 5 and np.isfinite(kl[6:]).any(), "it is drawn after step 15 too"


def test_with_draws_that_follow_a_held_task_keeps_its_part_of_both(at_once):
    """The part of the weights is the part of the draws; rounds begin at every pass too."""
    lines = steps(at_once["follow"])
    first = next(i for i, line in enumerate(lines) if "train/prose/kl" in line)
    kept = lines[first]["draws/prose/weight"]
    for line in lines[first:]:
        assert line["draws/prose/weight"] == pytest.approx(kept)
        assert line["draws/prose/planned"] == pytest.approx(kept, abs=1e-5)
        assert sum(line[f"draws/{name}/planned"] for name in NAMES) == pytest.approx(1)


class Batches:
    forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1


def test_a_task_that_comes_back_has_no_teacher(tmp_path):
    rows = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])]
    tasks = [TaskData(name, Encoded.of(rows), Encoded.of(rows)) for name in ("a", "b")]
    stored = np.zeros(3, [("ids", "<i4", (2,)), ("log_p", "<f4", (3,))])
    stored["ids"] = [[1, 2], [3, 4], [5, 6]]
    (tmp_path / "anchors").mkdir()
    np.save(tmp_path / "anchors" / "task-1-00000030-00000040.npy", stored)
    (tmp_path / "anchors" / "weights-00000030.safetensors").touch()
    batches = Batches()
    anchors = Anchors(None, [], tasks, None, batches, tmp_path / "anchors", print)
    nan = np.nan
    state = RunState(
        best_at=np.array([nan, 30]), anchored=np.array([nan, 30]), asked=np.array([nan, 40])
    )
    anchors.restore(state)
    np.testing.assert_array_equal(tasks[1].train.columns(0)[TEACHER[0]], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(tasks[1].train.columns(1)[TEACHER[0]], [[5, 6]])
    assert tasks[1].train.columns(1)[TEACHER[1]].shape == (1, 3)
    assert TEACHER[0] not in tasks[0].train.columns(0)
    np.testing.assert_array_equal(unseen(state, np.array([1.0, 2.0])), [1, nan])
    state.anchored = state.asked = np.array([nan, nan])
    anchors._attach(state)
    assert not set(TEACHER) & set(tasks[1].train.columns(0)) and batches.forgotten == 2
    anchors._attach(state)
    assert batches.forgotten == 2, "nothing changes, so nothing is forgotten"
    np.testing.assert_array_equal(unseen(state, np.array([1.0, 2.0])), [1, 2])


def test_flat_rows():
    flat = Flat(np.arange(6).reshape(3, 2), np.array([2, 0, 1]))
    assert len(flat) == 3 and [len(flat[i]) for i in range(3)] == [2, 0, 1]
    np.testing.assert_array_equal(flat[2], [[4, 5]])
    with pytest.raises(AssertionError, match="3 elements, not 4"):
        Flat(np.arange(3), np.array([4]))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            ["evaluate.patience={evaluations: 1, action: drop, keep: 0.5}"],
            "found 0.5, wanted nothing. It has no meaning without action: anchor.",
        ),
        (
            [PATIENCE, "engine.zero=3", "engine.offload.optimizer=nvme"],
            "found anchor, wanted another action with engine.offload.optimizer: nvme.",
        ),
        (
            [PATIENCE, "objective=three:Three"],
            "found anchor, and the task copy, whose objective has no `teacher`, wanted log, freeze "
            "or drop. causal_lm has one.",
        ),
        (["evaluate.patience={evaluations: 1, action: anchor, keep: 0}"], "patience.keep: found 0"),
    ],
)
def test_what_cannot_be_held(settings, wanted, yaml):
    with pytest.raises(ConfigError) as error:
        plugins.read(str(yaml), settings, runs.ALLOWED)
    assert wanted in str(error.value)
