"""What a run logs, prints and leaves; the trackers, the table and the end of a process."""

import json
import math
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtl import process
from mtl.output import manifest, provenance, report, trackers
from mtl.output.export import export
from mtl.train import loop

TASKS = ["copy", "chat", "prose"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, runs.Ended]:
    """12 steps on two processes, a probe every 2 steps, evaluated every 5, TensorBoard too."""
    yaml = runs.write(tmp_path_factory.mktemp("run"))
    settings = [
        "evaluate.every=5",
        "evaluate.probe.every=2",
        "checkpoint.every=4",
        "tasks.chat.loss_weight=2.0",
    ]
    output = yaml.parent / "run"
    return output, runs.train(
        yaml, *settings, "trackers=[tensorboard, {name: console, every: 4}]", world=2
    ).well()


def steps(output: Path) -> list[dict]:
    return [line for line in runs.metrics(output) if "train/loss" in line]


# metrics.jsonl


def test_every_step_has_its_tags_and_no_other(finished):
    every = {f"train/{task}/{what}" for task in TASKS for what in ("loss", "weight", "tokens")}
    every |= {
        f"train/{what}"
        for what in ("loss", "positions", "grad_norm", "lr", "target_tokens", "tokens_per_second")
    }
    every |= {"step", "time/step_seconds", "time/left_seconds"}
    every |= {f"draws/{task}/{what}" for task in TASKS for what in ("planned", "actual", "epoch")}
    probed = {
        f"coba/{task}/{what}" for task in TASKS for what in ("slope", "rcs", "acs", "panel")
    } | {"coba/df", "probe/group"}
    probed |= {f"probe/{task}/{what}" for task in TASKS for what in ("loss", "base")}
    for line in steps(finished[0]):
        missing = (
            {f"coba/{task}/slope" for task in TASKS} if line["step"] == 0 else set()
        )  # one probe has no slope
        assert line.keys() == every | (probed - missing if line["step"] % 2 == 0 else set()), line[
            "step"
        ]


def test_the_numbers_of_a_step_fit_each_other(finished):
    for line in steps(finished[0]):
        loss, weight, tokens = (
            np.array([line[f"train/{task}/{what}"] for task in TASKS])
            for what in ("loss", "weight", "tokens")
        )
        assert line["train/loss"] == pytest.approx((weight * loss).sum(), rel=1e-12)
        assert weight.sum() == pytest.approx(1, abs=1e-9) and (weight > 0).all()
        assert line["train/positions"] >= tokens.sum() and (tokens > 0).all()
        seconds = line["time/step_seconds"]
        assert line["train/tokens_per_second"] == pytest.approx(tokens.sum() / seconds, rel=1e-9)
        cosine = 0.5e-3 * (1 + math.cos(math.pi * line["step"] / 11))  # 0 at the last of 12 steps
        assert line["train/lr"] == pytest.approx(cosine, rel=1e-6, abs=1e-12)
    first = steps(finished[0])[0]
    assert [first[f"train/{task}/weight"] for task in TASKS] == pytest.approx(
        [0.25, 0.5, 0.25]
    )  # loss_weight 2 for chat
    assert first["train/loss"] == pytest.approx(math.log(259), abs=0.1), (
        "a random model: uniform over 259 tokens"
    )


def test_validation_comes_before_the_first_step_at_its_interval_and_at_the_end(finished):
    evaluated = [line for line in runs.metrics(finished[0]) if "eval/macro" in line]
    assert [line["step"] for line in evaluated] == [0, 5, 10, 12]
    state = next((finished[0] / "checkpoints").glob("step-*/state.safetensors"))
    targets = load_file(state)["run.base_tokens"].sum(1).numpy()
    assert targets.tolist() == [
        54,
        22,
        67,
    ]  # those of test data: bytes of the completions, their ends
    for line in evaluated:
        assert line.keys() == {
            "step",
            "time/evaluate_seconds",
            "memory/host_gib",
            "eval/macro",
            "eval/token",
            "eval/worst",
            "eval/log",
        } | {f"eval/{task}/loss" for task in TASKS}
        losses = np.array([line[f"eval/{task}/loss"] for task in TASKS])
        assert line["eval/macro"] == pytest.approx(losses.mean(), rel=1e-12)
        assert line["eval/token"] == pytest.approx(
            (losses * targets).sum() / targets.sum(), rel=1e-9
        )
        assert line["eval/worst"] == losses.max()
        assert line["eval/log"] == np.log(losses).mean()
    assert evaluated[-1]["eval/macro"] < evaluated[0]["eval/macro"] - 0.3, "it learns"


def test_tokens_of_a_step_follow_the_shares(finished):
    """6 examples a batch at equal shares: 2 of each task, so over an epoch each row counts as often as it is drawn."""
    for line in steps(finished[0]):
        assert line["draws/chat/planned"] == line["draws/chat/actual"] == pytest.approx(1 / 3)
        assert line["draws/chat/epoch"] == 2 * (line["step"] + 1) / 12
    chat = [line["train/chat/tokens"] for line in steps(finished[0])]
    assert sum(chat[:6]) == 68, "2 x 6 draws are the task's 12 rows, each once"
    assert sum(chat[6:]) == 68


# What it prints


def test_the_console_without_a_terminal(finished):
    lines = [line for line in finished[1].err.splitlines() if line.startswith("step ")]
    trained = [line for line in lines if " loss " in line]
    assert [line.split()[1] for line in trained] == ["4/12", "8/12", "12/12"]
    number = r"\d+\.\d+"
    for line in trained:
        assert re.fullmatch(
            rf"step \d+/12  loss {number}, \d+ tokens/s \| weights: copy {number}, chat {number}, prose {number} "
            rf"\| {number} min left",
            line,
        ), line
    assert [line.split()[1] for line in lines if "validation: macro" in line] == [
        "0/12",
        "5/12",
        "10/12",
        "12/12",
    ]
    assert "model shards" not in finished[1].err, "a library's bar would write over the table"
    saved = [line for line in lines if " saved " in line]
    assert [line.split()[1] for line in saved] == ["4/12", "5/12", "8/12", "10/12", "12/12"]
    assert ["the best so far (macro" in line for line in saved] == [False, True, False, True, True]
    assert (
        "copy: 33.3% of the examples\n  train: 24 of 24 rows kept: 346 tokens, 173 of them targets"
        in finished[1].err
    )


def test_the_table_holds_the_runs_numbers(finished):
    output, ended = finished
    evaluated = [line for line in runs.metrics(output) if "eval/macro" in line]
    rows = {line.split()[0]: line.split() for line in ended.out.splitlines()}
    for task in TASKS:
        losses = [line[f"eval/{task}/loss"] for line in evaluated]
        best = int(np.argmin(losses))
        want = [
            f"{losses[0]:.3f}",
            f"{losses[best]:.3f}",
            str(evaluated[best]["step"]),
            f"{losses[-1]:.3f}",
        ]
        assert rows[task][1:5] == want
        weights = np.array([line[f"train/{task}/weight"] for line in steps(output)])
        fifths = [weights[a:b].mean() for a, b in ((0, 3), (3, 6), (6, 8), (8, 10), (10, 12))]
        assert rows[task][7:] == [f"{w:.2f}" for w in fifths]
    assert report.table(report.read(output)) in ended.out


def test_a_task_that_turned_is_told_by_the_table():
    history = report.History(
        ["a", "b"],
        np.array([0, 4, 8]),
        np.array([[4.0, 3.0], [2.0, 2.5], [3.0, 2.0]]),
        np.arange(8),
        np.tile([0.25, 0.75], (8, 1)),
        np.full(3, np.nan),
    )
    a, b, macro = (re.split(r"\s{2,}", line) for line in report.table(history).splitlines()[2:])
    assert a[:6] == ["a", "4.000", "2.000", "4", "3.000", "50.0 %"] and b[:6] == [
        "b",
        "3.000",
        "2.000",
        "8",
        "2.000",
        "0.0 %",
    ]
    assert macro[:6] == ["macro mean", "3.500", "2.250", "4", "2.500", "11.1 %"]


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no such file; wanted the folder of a run"):
        report.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    with pytest.raises(ValueError, match="no validation pass in it yet"):
        report.read(tmp_path)


def test_no_step_beat_the_start(tmp_path):
    yaml = runs.write(tmp_path)
    worse = ["optimizer.lr=3.0", "optimizer.name=sgd", "optimizer.clip=null", "train.steps=4"]
    ended = runs.train(yaml, *worse, "evaluate.every=2", "schedule.name=constant").well()
    losses = [line["eval/macro"] for line in runs.metrics(tmp_path / "run") if "eval/macro" in line]
    assert min(losses[1:]) > losses[0]
    (line,) = (line for line in ended.out.splitlines() if "model, of" in line)
    assert line == (
        "no step was better than the start (by evaluate.best: macro): last model, of step-00000004: "
        f"{tmp_path}/run/model"
    )


def test_a_batch_without_a_task_says_what_is_left_of_the_weights(tmp_path):
    """One example a step: the others' weights stay as they are, and the loss is that part."""
    yaml = runs.write(tmp_path)
    one = ["batch.examples=1", "train.steps=3", "evaluate.every=100", "balancer=Equal"]
    runs.train(yaml, *one).well()
    for line in steps(tmp_path / "run"):
        (loss,) = (line[tag] for task in TASKS if (tag := f"train/{task}/loss") in line)
        assert line["train/present_weight"] == pytest.approx(1 / 3, rel=1e-12)
        assert line["train/loss"] == pytest.approx(loss / 3, rel=1e-12)
    # The gradient too: a task that weighs 1/2 instead of 1/3 has half as much again.
    first = steps(tmp_path / "run")[0]
    (task,) = (task for task in TASKS if f"train/{task}/loss" in first)
    more = ["train.steps=1", f"tasks.{task}.loss_weight=2.0", f"output={tmp_path}/more"]
    runs.train(yaml, *one, *more).well()
    (more,) = steps(tmp_path / "more")
    assert more["train/present_weight"] == pytest.approx(1 / 2, rel=1e-12)
    assert more["train/grad_norm"] / first["train/grad_norm"] == pytest.approx(1.5, rel=1e-5)


# What it leaves


def test_the_revision_is_that_of_the_code_and_not_of_what_it_lies_in(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    code = tmp_path / "provenance.py"
    code.touch()
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.git_revision() is None
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert provenance.git_revision() == git("rev-parse", "HEAD")


def test_provenance_is_written(finished):
    record = json.loads((finished[0] / "run.json").read_text())
    assert (record["steps"], record["world"]) == (12, 2)
    assert (
        record["config"]["tasks"]["chat"]["loss_weight"] == 2.0
        and record["config"]["batch"]["too_long"] == "drop"
    )
    chat = record["tasks"]["chat"]
    assert (chat["train"]["rows"], chat["train"]["target_tokens"], chat["validation"]["rows"]) == (
        12,
        68,
        4,
    )
    assert record["versions"]["torch"] == version("torch")


def test_the_newest_two_checkpoints_and_the_best_are_kept(finished):
    left = sorted(path.name for path in (finished[0] / "checkpoints").glob("step-*"))
    assert left == ["step-00000010", "step-00000012"]
    evaluated = {
        line["step"]: line["eval/macro"]
        for line in runs.metrics(finished[0])
        if "eval/macro" in line
    }
    state = json.loads((finished[0] / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["best"] == "step-00000012" and state["run"]["best"] == {
        "step": 12,
        "value": min(evaluated.values()),
    }


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_export(finished, tmp_path, dtype):
    checkpoint, target = finished[0] / "checkpoints" / "step-00000012", tmp_path / "out"
    checkpoint / "model"
    manifest.mark(target, "export")
    for name in ("config.json", "stale.txt"):  # an older export
        (target / name).touch()
    manifest.seal(target)
    assert export(checkpoint, target, dtype) == target and not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    trained = load_file(checkpoint / "model" / "model.safetensors")
    for name, tensor in load_file(target / "model.safetensors").items():
        torch.testing.assert_close(tensor, trained[name].to(model.dtype), rtol=0, atol=0)


def test_what_is_exported_gives_the_loss_that_was_logged(finished):
    """The model a user takes away, on the validation text read here: the last `eval/prose/loss`."""
    import toys

    output = finished[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output / "model"), toys.tokenizer()
    total, count = 0.0, 0
    for line in (output.parent / "prose.validation.jsonl").read_text().splitlines():
        ids = torch.tensor(
            [[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(runs.metrics(output)[-1]["eval/prose/loss"], rel=1e-6)


# Trackers


def test_jsonl_writes_no_nan(tmp_path):
    jsonl = trackers.Jsonl(tmp_path, steps=2)
    jsonl.log(
        0,
        {
            "train/loss": 1.5,
            "train/a/loss": math.nan,
            "train/b/loss": math.inf,
            "train/c/loss": -math.inf,
        },
    )
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "train/loss": 1.5}\n', (
        "flushed at once"
    )
    jsonl.close()
    again = trackers.Jsonl(tmp_path, steps=2, start=1)
    again.log(1, {"train/loss": 1.0})
    again.close()
    assert [line["step"] for line in runs.metrics(tmp_path)] == [0, 1]


def test_metrics_are_cut_back_to_a_checkpoint(tmp_path):
    said = []
    trackers.cut_metrics(tmp_path, 0, said.append)  # none yet
    assert trackers.metrics_bytes(tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    trackers.cut_metrics(tmp_path, 12, said.append)
    assert path.read_text() == '{"step": 0}\n' and not said
    path.write_text('{"step": 0}\n{"st')
    trackers.cut_metrics(tmp_path, 24, said.append)
    assert path.read_text() == '{"step": 0}\n'
    assert "found 16 bytes, the checkpoint knew of 24" in said[0] and "is torn" in said[1]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def test_tensorboard_holds_what_metrics_hold(finished):
    logged = events(finished[0] / "tensorboard")
    want = [(line["step"], np.float32(line["train/loss"])) for line in steps(finished[0])]
    assert logged["train/loss"] == want
    assert [step for step, _ in logged["eval/macro"]] == [0, 5, 10, 12]


@pytest.mark.parametrize("start", [0, 1])
def test_tensorboard_forgets_what_came_after_a_checkpoint(tmp_path, start):
    for begin, value in (0, 1.0), (start, 2.0):
        board = trackers.TensorBoard(tmp_path, steps=3, start=begin)
        for step in range(begin, 3):
            board.log(step, {"loss": value})
        board.close()
    # What was measured at the step resumed from stays: its validation is not repeated.
    kept = [(0, 1.0), (1, 1.0)] if start else [(0, 2.0)]
    assert events(tmp_path / "tensorboard")["loss"] == [*kept, (1, 2.0), (2, 2.0)]


def test_the_memory_of_a_device_is_logged(monkeypatch):
    """With a fake: no GPU has run this."""
    held = {torch.device("cuda", 1): 3 * 2**30}
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", held.__getitem__)
    assert loop._memory(torch.device("cuda:1"))["memory/device_gib"] == 3
    (only, peak) = loop._memory(torch.device("cpu")).popitem()
    assert only == "memory/host_gib" and 0.05 < peak < 64


def test_a_tracker_that_is_not_asked_for_writes_nothing(tmp_path, capsys):
    console = trackers.Console(tmp_path, steps=40)
    for step in range(40):
        console.log(
            step,
            {
                "train/loss": 1.0,
                "train/a/weight": 1.0,
                "train/tokens_per_second": 10.0,
                "time/left_seconds": 90.0,
            },
        )
    console.close()
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 20
        and lines[-1] == "step 40/40  loss 1.000, 10 tokens/s | weights: a 1.00 | 1.5 min left"
    )
    assert not list(tmp_path.iterdir())


# The end of a process, and what it settles at its start


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (None, 0, ""),
        (ValueError("a.yaml:3: wrong\nand more"), 1, "error: a.yaml:3: wrong\nand more\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("broken"), 1, "RuntimeError: broken\n"),
    ],
    ids=["well", "user's error", "interrupted", "our error"],
)
def test_exit_code(monkeypatch, capsys, raised, code, said):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main() -> None:
        if raised is not None:
            raise raised

    assert process.exit_code(main) == code
    err = capsys.readouterr().err
    assert err.endswith(said) and err.startswith("Traceback") == isinstance(raised, RuntimeError)


def test_an_interrupted_training_says_how_to_go_on(capsys):
    def main() -> None:
        with process.stoppable():
            raise KeyboardInterrupt

    assert process.exit_code(main) == 130
    said = "interrupted; --resume continues from the last checkpoint\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "text, said",
    [("one line", "one line"), ("first\nsecond", "first ... (in full"), ("", "ValueError")],
)
def test_other_ranks_are_brief_about_a_users_error(monkeypatch, capsys, text, said):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")

    def main() -> None:
        raise ValueError(text)

    assert process.exit_code(main) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error [rank 9]: {said}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "given, threads",
    [({}, "8"), ({"LOCAL_WORLD_SIZE": "2"}, "4"), ({"LOCAL_SIZE": "3"}, "2"), ({"LOCAL_SIZE": "16"}, "1"),
     ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "5"}, "5")],
)  # fmt: skip
def test_settle_shares_the_cores(monkeypatch, given, threads):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    process.settle()
    assert os.environ["OMP_NUM_THREADS"] == threads
    assert os.environ["OMP_WAIT_POLICY"] == "passive" and os.environ["GOMP_SPINCOUNT"] == "20000"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize("is_asked", [False, True])
def test_deterministic_refuses_what_is_not(tmp_path, is_asked):
    yaml = runs.write(tmp_path)
    ended = runs.train(
        yaml, "train.steps=2", "checkpoint.every=2", "objective=outside:causal_lm",
        f"engine.deterministic={str(is_asked).lower()}", MISFORTUNE="put step 1 all",
    )  # fmt: skip
    assert ended.codes == [int(is_asked)], ended.err
    assert ("put_ does not have a deterministic implementation" in ended.err) == is_asked
    assert len(steps(tmp_path / "run")) == 2 - is_asked


def test_deterministic_gives_the_same_run(tmp_path):
    yaml = runs.write(tmp_path)
    for name, value in {"plain": "false", "once": "true", "again": "true"}.items():
        given = f"output={tmp_path / name}", f"engine.deterministic={value}"
        runs.train(yaml, "train.steps=4", *given, world=2).well()
    plain, once, again = (runs.untimed(tmp_path / name) for name in ("plain", "once", "again"))
    assert once == again
    for one, other in zip(plain, once, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
