"""The benchmarks' harness on a toy: it takes turns, sees what both trainers computed, and refuses what cannot be compared."""

import copy
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import toys
from distributed import run_distributed
from forks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import merging
from turns import Contender, Turns

TURNS = "2\n2\n"  # what the driver sends
STEPS = 4


def base(folder: Path) -> dict[str, Any]:
    """A configuration in the place of configs/even.yaml."""
    toys.save(toys.tiny_llama(), folder / "model")
    return {
        "model": {"name": str(folder / "model"), "precision": "fp32"},
        "tasks": toys.write_tasks(folder / "data", train=40),
        "batch": {"examples": 4, "tokens": 512, "max_length": 128},
        "engine": {"zero": 2},
    }


def answers(out: io.StringIO) -> dict[str, Any]:
    about, *turns = map(json.loads, out.getvalue().splitlines())
    return {"about": about, "same_rows": True, "turns": turns}


def turns(work: Any) -> dict[str, Any]:
    """What a contender answered to TURNS."""
    out = io.StringIO()
    with pytest.raises(SystemExit) as ended:  # the driver has had enough
        work(Turns(io.StringIO(TURNS), out))
    assert ended.value.code == 0
    return answers(out)


def of_pairs(folder: str) -> dict[str, Any]:
    """The same of a preference group."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/datasets"}
    import ours
    import peer
    import transformers

    from mtl import plugins
    from mtl.output.state import RunState
    from mtl.train.loop import train

    transformers.logging.disable_progress_bar()
    root, config = Path(folder), base(Path(folder))
    (root / "pairs").mkdir()
    for i, name in enumerate(("doc2code", "occupation")):
        for split, n in (("train", 20), ("valid", 4)):
            rows = [{"prompt": f"{i}{j} =", "chosen": f" a{j}", "rejected": " b"} for j in range(n)]
            toys.write_rows(root / "pairs" / f"{name}_pairs.{split}.jsonl", rows)
    config["tasks"] = bench.pairs(root / "pairs")
    made = bench.Bench(config, {"ours": sys.executable}, root / "work", STEPS, bench.PAIRS)
    settings = bench.preference("fp32")
    settings["ours"]["model"]["compile"] = False
    config = plugins.read(str(made.yaml_of("ours", settings["ours"])), [], [])
    rows = root / "rows.json"
    rows.write_text(json.dumps(ours.rows(config)[:STEPS]))
    found = {"ours": turns(lambda t: train(ours.build_run(config, t), RunState()))}
    for name in [name for name in settings if name != "ours"]:
        given = {key: settings[name][key] for key in ("trainer", "attention", "arguments")}
        given["arguments"] = {**given["arguments"], "output_dir": folder}
        given |= {"model": config.model.name, "rows": str(rows)}
        found[name] = turns(lambda t, given=given: peer.run(given, t))
    return found


def test_trls_dpo_computes_the_same_on_the_same_pairs(tmp_path):
    [found] = run_distributed(of_pairs, 1, str(tmp_path))
    mine, *theirs = [
        [loss for turn in value["turns"] for loss in turn["losses"]] for value in found.values()
    ]
    assert len(theirs) == 2 and mine[0] == pytest.approx(math.log(2), rel=1e-4)
    assert mine[0] - mine[-1] > 1e-3, "the policy leaves the reference"
    for losses in theirs:
        assert losses == pytest.approx(mine, rel=1e-4)
    for value in found.values():
        assert [turn["tokens"] for turn in value["turns"]] == [2 * bench.PAIRS] * 2
    assert len(bench.check("preference fp32", found)) == 2 + 2 * 3
    assert bench.unit("preference fp32") == "pairs" and bench.unit("packed fp32") != "pairs"


def both(folder: str) -> dict[str, Any]:
    """Turns of ours and of the peers on this process, as `Bench.group` would give them."""
    import ours
    import peer
    import scaling
    import transformers

    from mtl import plugins
    from mtl.output.state import RunState
    from mtl.train.loop import train

    transformers.logging.disable_progress_bar()
    made = bench.Bench(base(Path(folder)), {"ours": sys.executable}, Path(folder) / "work", STEPS)
    settings = {
        "ours": bench.ours("Tokens"),
        "padded": bench.sft("fp32"),
        "padding-free": bench.flat("fp32"),
    }
    settings["ours"]["model"]["compile"] = (
        False  # tests/test_compile.py is about that, and takes minutes
    )
    config = plugins.read(str(made.yaml_of("ours", settings["ours"])), [], [])
    rows = Path(folder) / "rows.json"
    rows.write_text(json.dumps(ours.rows(config)[:STEPS]))
    found = {"ours": turns(lambda t: train(ours.build_run(config, t), RunState()))}
    for name in ("padded", "padding-free"):
        given = {key: settings[name][key] for key in ("trainer", "attention", "arguments")}
        given["arguments"] = {**given["arguments"], "output_dir": folder}
        given |= {"model": config.model.name, "rows": str(rows)}
        found[name] = turns(lambda t, given=given: peer.run(given, t))
    return found | {"start": scaling.begin(str(made.file("ours", ".yaml")))}


def recorded(folder: str) -> dict[str, Any]:
    """What record.py reads before and after a run, and the run's own full passes there."""
    import ours
    import record

    from mtl import plugins
    from mtl.output.state import RunState
    from mtl.train.loop import train

    passes: dict[int, list[float]] = {}

    class Passes:
        def log(self, step: int, values: dict[str, float]) -> None:
            if "eval/macro" in values:
                passes[step] = [values[f"eval/{name}/loss"] for name in run.names]

        def say(self, text: str) -> None: ...

    made = bench.Bench(base(Path(folder)), {"ours": sys.executable}, Path(folder) / "work", STEPS)
    settings = bench.ours("Equal")
    settings["model"]["compile"] = False
    run = ours.build_run(
        plugins.read(str(made.yaml_of("ours", settings)), [], []), record.Unhurried()
    )
    recorder = record.Recorder(run, every=STEPS + 1)
    train(replace(run, trackers=[recorder, Passes()]), RunState())
    means = [(sums.sum(1) / recorder.targets.sum(1)).tolist() for sums in recorder.sums]
    whole = [
        len(split) == recorder.targets.shape[1] for split in run.validation.splits
    ]  # of the others some rows are left out
    return {"read": dict(zip(recorder.steps, means, strict=True)), "passes": passes, "whole": whole}


def test_a_recording_sums_up_to_the_full_passes(tmp_path):
    [found] = run_distributed(recorded, 1, str(tmp_path))
    assert found["read"].keys() == found["passes"].keys() == {0, STEPS + 1}
    assert any(found["whole"]) and not all(found["whole"])
    for step, losses in found["passes"].items():
        for mine, loss, is_whole in zip(found["read"][step], losses, found["whole"], strict=True):
            assert mine == pytest.approx(loss, rel=1e-6 if is_whole else 1e-2)
    assert sum(found["read"][0]) > sum(found["read"][STEPS + 1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    [result] = run_distributed(both, 1, str(tmp_path_factory.mktemp("bench")))
    return result


@pytest.fixture
def found(measured):
    return {name: value for name, value in measured.items() if name != "start"}


def test_both_trainers_compute_the_same(found):
    for value in found.values():
        assert [len(turn["losses"]) for turn in value["turns"]] == [2, 2]
        assert all(turn["seconds"] > 0 and turn["peak_mib"] > 0 for turn in value["turns"])
    mine, *theirs = [
        [loss for turn in value["turns"] for loss in turn["losses"]] for value in found.values()
    ]
    assert mine[0] > mine[-1] > 1
    for losses in theirs:
        assert losses == pytest.approx(mine, rel=1e-4)
    assert len({sum(turn["tokens"] for turn in value["turns"]) for value in found.values()}) == 1
    told = bench.check("padded fp32", found)
    assert (
        len(told) == 2 + 2 * 3
    )  # tokens of the run and of the data sets; isolation, first and last loss of each peer
    assert found["ours"]["about"]["parameters"] == found["padded"]["about"]["parameters"]


def test_own_time_is_what_is_left(found):
    for turn in found["ours"]["turns"]:
        parts = ["forward", "backward", "optimizer", "communication"]
        assert all(turn[name] > 0 for name in parts)
        assert 0 < sum(turn[name] for name in parts) < turn["seconds"]
        assert 0 < bench.own(turn) < 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda f: f["padded"]["turns"][0]["losses"].__setitem__(0, 9.0),
            "loss of the first batch",
        ),
        (lambda f: f["padded"]["turns"][1].update(tokens=1), "target tokens of the run"),
        (lambda f: f["padded"]["about"].update(tokens=1), "data sets"),
        (lambda f: f["padding-free"]["about"].update(isolation=1e-2), "see each other"),
    ],
)
def test_what_is_not_equal_is_refused(found, change, named):
    changed = copy.deepcopy(found)
    change(changed)
    with pytest.raises(SystemExit, match=named):
        bench.check("padded fp32", changed)


def test_the_table_takes_ratios_within_rounds(tmp_path):
    def turns(*seconds: float) -> dict[str, Any]:
        made = {
            "tokens": 100,
            "peak_mib": 7.0,
            "losses": [1.0],
            "forward": 0.2,
            "backward": 0.2,
            "optimizer": 0.1,
        }
        made |= {"communication": 0.0, "data_thread": 0.01, "data_wait": 0.0, "steps": 2}
        return {
            "about": {},
            "same_rows": True,
            "turns": [{**made, "seconds": s} for s in (99.0, *seconds)],
        }

    results = {
        "date": "2026-01-01", "commit": "abc", "rounds": 3, "warmup": 8, "checked": ["that"],
        "machine": {"processor": "p", "cores": 2, "versions": {"torch": "2"}},
        "groups": {
            "packed fp32": {"ours": turns(1.0, 2.0, 4.0), "TRL": turns(2.0, 3.0, 16.0)},
            "balancers": {"Equal": turns(1.0, 1.0, 1.0), "CoBa, defaults": turns(1.1, 1.0, 1.2)},
        },
        "slopes": [
            {"run": "q", "recordings": 3, "steps": 80, "ratio": 0.4, "min": 0.3, "max": 0.5, "is_default": True},
            {"run": "q", "recordings": 1, "steps": 120, "ratio": 0.6, "min": 0.5, "max": 0.7, "is_default": False},
        ],
        "head": {"trained": {"ours": {"mib": 30.0}, "full": {"mib": 120.0}}},
    }  # fmt: skip
    text = bench.tables(results)
    assert "| target tokens/s, fp32 | TRL | >= 1.4x | 2.00x (1.50x to 4.00x) |" in text
    assert (
        "| step time, CoBa, defaults, full | Equal | <= 1.05x | 1.100x (1.000x to 1.200x) |" in text
    )
    assert "| Equal | 100.0 (100.0 to 100.0) | 0.50 (0.50 to 0.50) | 7 |" in text
    assert (
        "| <= 0.25 | 0.25 |" in text
        and "the default window of 80 steps, recordings: 3 | a batch every step, plain | <= 0.5 | 0.40 (0.30 to 0.50) |"
        in text
    )
    assert (
        "q run, a window of 120 steps, recordings: 1 | a batch every step, plain |  | 0.60 (0.50 to 0.70) |"
        in text
    )
    assert "51.00 %" in text  # (1 - 0.5 + 0.01) / 1

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nafter\n")
    bench.into_readme(text, readme)
    assert "old" not in readme.read_text() and text in readme.read_text()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("after\n")


def test_a_contender_sleeps_between_turns_and_tells_why_it_died(tmp_path):
    program = tmp_path / "c.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nfrom turns import Turns\nt = Turns()\n"
        "print('noise')\nt.ready(kind='toy')\n"
        "for i in range(5): t.step(1.0 / (1 + i), 10, own=0.5)\nraise ValueError('no more rows')"
    )
    with Contender("toy", [sys.executable, str(program)], {}, tmp_path / "log", tmp_path) as toy:
        assert toy.about["kind"] == "toy"
        turn = toy.take(2)
        assert (turn["tokens"], turn["losses"], turn["own"]) == (20, [1.0, 0.5], 1.0)
        assert toy.take(3)["losses"] == [1 / 3, 1 / 4, 1 / 5]
        with pytest.raises(RuntimeError, match="no more rows"):
            toy.take(1)


def test_the_loss_alone_takes_less_than_full_logits():
    import head

    code = "import json, head; print(json.dumps([head.peak_of(c, 1024, 16000, 32, 0.5, True) for c in ('ours', 'full')]))"
    made = subprocess.run(
        [sys.executable, "-c", code],
        env=head.ENVIRONMENT,
        cwd=ROOT / "benchmarks",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ours, full = json.loads(made.stdout)
    assert ours["loss"] == pytest.approx(full["loss"], rel=1e-5)
    assert ours["mib"] < 0.8 * full["mib"], (ours, full)


def test_scaling_shows_what_grows(measured):
    assert all(
        measured["start"][name] > 0 for name in ("data", "batch")
    )  # with a warm cache, which ours.py has made
    import scaling

    head, *rows = scaling.balancer([2, 32], [0, 10_000], times=3)
    state = {(slope, past, k): row[-1] for row in rows for slope, past, k in [row[:3]]}
    assert all(len(row) == len(head) for row in rows) and len(state) == 8
    assert state["ols", 10_000, 2] - state["ols", 0, 2] == pytest.approx(
        8 * 10_000, rel=0.2
    )  # 8 bytes a probe
    assert state["ols", 0, 32] < 20 * state["ols", 0, 2]

    head, *rows = scaling.order([2], [0, 10**6], times=3)
    assert [row[:2] for row in rows] == [[2, 0], [2, 10**6]]
    head, *rows = scaling.validation([16], k=2, times=1)
    assert rows[0][0] == 16 and rows[0][3] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_seed_of_the_merging_table(tmp_path):
    """Every row on a toy: the figures are those of the models they name, and the page has them."""
    yaml, page = runs.write(tmp_path), tmp_path / "page.md"
    study = merging.Study(
        str(yaml), "a toy", steps=12, every=2, cosine=8, ranges=((4, 8), (2, 12)), decay=0.8, tail=2,
    )  # fmt: skip
    made = merging.Bench(study, 0, tmp_path / "seed", [])
    rows = merging.of_a_run(made)
    assert len(rows) == 9 and made.tasks == ["copy", "chat", "prose"]
    for name, row in rows.items():
        assert row["figure"] == pytest.approx(sum(row["losses"].values()) / 3), name
    own = rows["six models, each at its task's best"]
    assert own["of"].keys() == set(made.tasks) and set(own["of"].values()) <= set(range(2, 13, 2))
    assert rows == merging.of_a_run(made), "given again it repeats no training, and finds the same"

    results = tmp_path / "results"
    results.mkdir()
    begin, end = "<!-- merging: written by benchmarks/merging.py -->", "<!-- end of merging -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for seed in range(2):
        (results / f"m0-{seed}.json").write_text(json.dumps({"rows": rows}))
    merging.write_tables(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n")
    single = rows[merging.SINGLE]["figure"]
    assert f"| best single checkpoint | {single:.3f} ± 0.000 |  |  |" in text and "old" not in text


def test_an_interval_is_students():
    mean, half = merging.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-4))
    assert merging.interval([1.0])[0] == 1.0
