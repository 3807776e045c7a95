"""docs/guarantees.md on whole runs: each test breaks a run for real, and says what must be left of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import forks
import pytest
import runs
from safetensors.numpy import load_file

from mtl import process
from mtl.data import lock
from mtl.output import lock as run_lock
from mtl.output import manifest
from mtl.output.checkpoint import CheckpointError, check_output
from mtl.process import free_port

OURS = "objective=outside:causal_lm"  # the usual one, from a module that can kill
SAVING = ["engine.zero=2", "checkpoint.every=4", "checkpoint.keep=3", "evaluate.every=100"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def whole(yaml) -> Path:
    """A run with the checkpoints of steps 4, 8 and 12."""
    output = yaml.parent / "whole"
    runs.train(yaml, OURS, *SAVING, f"output={output}", world=2).well()
    return output


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


# No user file is ever deleted or overwritten


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "run.json",
        "passed.json",
        "report.html",
        "predictions/step-00000004.jsonl",
        "bests/notes.txt",
        "anchors/notes.txt",
        "checkpoints/notes.txt",
        "checkpoints/step-00000004/notes.txt",
        "checkpoints/.resharded/notes.txt",
        "model/config.json",
    ],
)
def test_a_folder_with_files_of_others_is_refused(tmp_path, name, resume):
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("{}")
    with pytest.raises(CheckpointError, match=r"Nothing was changed\."):
        check_output(tmp_path, resume)
    assert theirs.read_text() == "{}"


def test_a_base_model_in_the_output_stays(yaml):
    """`model.name: proj/model` with `output: proj`: the export would take the base model's place."""
    project = yaml.parent / "project"
    copy(yaml.parent / "model", project / "model")
    before = runs.contents(project)
    ended = runs.train(yaml, f"model.name={project}/model", f"output={project}")
    assert ended.codes == [1] and f"{project}/model: found something without our mark" in ended.err
    assert runs.contents(project) == before


def test_an_export_somebody_worked_on_is_not_replaced(yaml, whole, tmp_path):
    for change in ("added", "changed"):
        output = copy(whole, tmp_path / change)
        theirs = output / "model" / ("notes.txt" if change == "added" else "README.md")
        theirs.write_text("mine")
        ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
        assert ended.codes == [1, 1] and str(theirs) in ended.err and theirs.read_text() == "mine"


# One run a folder


def owner(pid: int, **other: str) -> str:
    me = lock.myself()
    return json.dumps({**asdict(me), "pid": pid, **other})


def test_a_folder_in_use_is_refused_and_a_lock_left_behind_taken_over(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    (output / "run.lock").write_text(owner(os.getpid()))
    before = runs.contents(output)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
    assert ended.codes == [1, 1] and f"{output} is in use by process {os.getpid()} on" in ended.err
    assert runs.contents(output) == before
    (output / "run.lock").write_text(owner(os.getpid(), started="gone by"))
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert "does not run any more; its lock is taken over" in ended.err
    assert not list(output.glob("run.lock*"))


def test_of_many_starts_at_once_one_takes_the_lock(tmp_path):
    """Also where a lock left behind lies in their way."""
    for left in False, True:
        path = tmp_path / str(left) / "run.lock"
        path.parent.mkdir()
        if left:
            path.write_text(owner(os.getpid(), started="gone by"))
        ready, go = os.pipe()
        children = [_start(path, ready, go) for _ in range(8)]
        os.close(go)  # all start
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        os.close(ready)
        assert sorted(codes) == [0] + [3] * 7
        path.unlink()


def _start(path: Path, ready: int, go: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.close(go)
    os.read(ready, 1)
    try:
        run_lock.acquire(path, lambda text: None)
        time.sleep(1)  # the others must find it alive
        os._exit(0)
    except CheckpointError:
        os._exit(3)
    finally:
        os._exit(4)


@pytest.mark.slow  # two whole programs
def test_of_two_programs_started_at_once_one_runs_and_is_not_harmed(yaml, whole, tmp_path):
    output, last = tmp_path / "run", 40
    given = runs.arguments(yaml, [*SAVING, f"output={output}", f"train.steps={last}"], False)
    with ExitStack() as stack:
        files = [{end: tmp_path / f"{i}.{end}" for end in ("out", "err")} for i in range(2)]
        both = [stack.enter_context(runs.launched(["python"], yaml, *given, **f)) for f in files]
        codes = [one.wait(runs.TIMEOUT) for one in both]
    assert sorted(codes) == [0, 1]
    told = files[codes.index(1)]["err"].read_text()
    refused = f"{output} is in use by process {both[codes.index(0)].pid} on ", "already holds a run"
    assert any(text in told for text in refused) and "Traceback" not in told, told
    steps = [line["step"] for line in runs.metrics(output) if "train/loss" in line]
    assert steps == list(range(last)) and (output / "model/model.safetensors").is_file()
    assert not list(output.glob("run.lock*"))


def test_a_lock_of_another_host_counts_while_it_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT", 1.0)
    path, said = tmp_path / "run.lock", []
    path.write_text(owner(1, host="elsewhere"))

    def beat(text: str) -> None:
        said.append(text)
        path.write_text(owner(1, host="elsewhere", progress="1"))

    with pytest.raises(CheckpointError, match="is in use by process 1 on elsewhere"):
        run_lock.acquire(path, beat)
    assert run_lock.acquire(path, said.append).pid == os.getpid()
    assert "gave no sign of life for 1 s; its lock is taken over" in said[-1]


# Ranks that disagree are told at once


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (["--set", "engine.zero=3"], "engine.zero: 2 on rank 0; 3 on rank 1"),
        (["--set", "batch.tokens=256"], "batch.tokens: 128 on rank 0; 256 on rank 1"),
        (["--set", "checkpoint.every=5"], "checkpoint.every: 4 on rank 0; 5 on rank 1"),
        (["--set", "output=elsewhere"], "; 'elsewhere' on rank 1"),
        (["--resume"], "flags.resume: False on rank 0; True on rank 1"),
    ],
)
def test_ranks_started_differently_end_at_once(yaml, tmp_path, last, text):
    output = tmp_path / "run"
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, last=last)
    assert ended.codes == [1, 1] and text in ended.err and not output.exists()
    (shown,) = {line for line in ended.err.splitlines() if " on rank 0" in line}
    assert text in shown, "nothing but what differs"


def test_other_versions_are_a_warning(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    folder = output / "checkpoints" / "step-00000012"
    state = json.loads((folder / "state.json").read_text())
    state["versions"]["torch"] = "1.0"
    (folder / "state.json").write_text(json.dumps(state))
    manifest.seal(folder)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert "warning: step-00000012 was written with torch 1.0, here is" in ended.err


def test_other_versions_on_a_rank_are_a_warning(yaml, tmp_path):
    settings = [OURS, *SAVING, "train.steps=1", f"output={tmp_path}/run"]
    ended = runs.train(yaml, *settings, world=2, MISFORTUNE="age start 0 1").well()
    told = f"warning: versions differ: torch: {version('torch')!r} on rank 0; '1.0' on rank 1"
    assert ended.err.count(told) == 1


def test_a_state_that_drifted_apart_is_not_saved(yaml, tmp_path):
    settings = [OURS, *SAVING, f"output={tmp_path}/run"]
    ended = runs.train(yaml, *settings, world=2, MISFORTUNE="drift agree 8 1")
    assert ended.codes == [1, 1] and "step 8: what the ranks should hold alike differs" in ended.err
    shown = {line for line in ended.err.splitlines() if " on rank 0; " in line}
    assert {line.strip().partition(":")[0] for line in shown} == {"state.target_tokens"}
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000004"


# Plug-ins cannot poison a run


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("balancer=outside:Unsteady", "'seen': float32 (n), before float64 (n)"),
        ("objective=outside:misshapen", "objective misshapen: Terms.sums is torch.float32 (1,)"),
    ],
)
def test_a_plug_in_that_returns_something_else_ends_all_ranks(yaml, tmp_path, setting, text):
    """The balancer on rank 0, which alone has it; the objective on rank 1."""
    output = tmp_path / "run"
    ended = runs.train(yaml, *SAVING, setting, f"output={output}", world=2)
    assert ended.codes == [1, 1] and text in ended.err, ended.err
    assert [line["step"] for line in runs.metrics(output) if "train/loss" in line] == [0, 1]
    assert not (output / "checkpoints").exists()


def test_ranks_that_drifted_apart_stop_before_a_checkpoint(yaml, tmp_path):
    output = tmp_path / "run"
    settings = [OURS, *SAVING, "engine.zero=0", f"output={output}"]
    ended = runs.train(yaml, *settings, world=2, MISFORTUNE="flip step 5 1")
    assert ended.codes == [1, 1] and "step 8: what the ranks should hold alike differs" in ended.err
    shown = next(each for each in ended.err.splitlines() if "  weights." in each)
    assert " on rank 0; " in shown and shown.endswith(" on rank 1") and "state." not in ended.err
    assert (output / "checkpoints" / "latest").read_text() == "step-00000004"
    assert not (output / "checkpoints" / "step-00000008").exists()


# Preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_on_all_and_loses_no_step(yaml, whole, tmp_path, name):
    output = tmp_path / "run"
    settings = [OURS, *SAVING, f"output={output}"]
    ended = runs.train(yaml, *settings, world=2, MISFORTUNE=f"{name} step 5 1")
    assert ended.codes == [75, 75]
    assert "asked to stop, and saved, at step 6/12; --resume goes on from there" in ended.err
    assert (output / "checkpoints" / "latest").read_text() == "step-00000006"
    assert not (output / "run.lock").exists()
    runs.train(yaml, *settings, world=2, resume=True).well()
    assert runs.untimed(output) == runs.untimed(whole)


def test_a_run_stopped_before_its_first_step_does_not_say_that_it_saved(yaml, whole, tmp_path):
    output = tmp_path / "run"
    settings = [OURS, *SAVING, f"output={output}"]
    ended = runs.train(yaml, *settings, world=2, MISFORTUNE="SIGTERM pass 0 1")
    assert ended.codes == [75, 75]
    assert "asked to stop at step 0/12; --resume goes on from there" in ended.err
    assert not (output / "checkpoints").exists()
    runs.train(yaml, *settings, world=2, resume=True).well()
    assert runs.untimed(output) == runs.untimed(whole)


# A rank never outlives its launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(tmp_path, number):
    """Ranks in a loop, under a program by the name of a launcher under another one, whose end the inner does not notice."""
    inner = tmp_path / "deepspeed_inner.py"
    outer = tmp_path / "deepspeed"
    rank = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from mtl import process; "
        "process.never_outlive_launcher(); print(os.getpid(), flush=True); time.sleep(600)"
    )
    start = "import subprocess, sys\nsubprocess.run([sys.executable, {}])\n"
    inner.write_text(start.format(f"'-c', {rank!r}, {str(runs.ROOT)!r}"))
    outer.write_text(start.format(repr(str(inner))))
    launcher = subprocess.Popen(
        [sys.executable, str(outer)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        pid = int(launcher.stdout.readline())
        os.kill(launcher.pid, number)
        launcher.wait()
        for _ in range(200):
            if lock._ticks(pid) == "gone":
                break
            time.sleep(0.1)
        assert lock._ticks(pid) == "gone"
    finally:
        launcher.stdout.close()
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def of_command(text: str) -> set[int]:
    """The processes whose command line holds a text."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text in path.read_text(errors="replace"):
                found.add(int(path.parent.name))
    return found


LAUNCHERS = {
    "deepspeed": ["--num_gpus", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
    "accelerate": [
        *("launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
    ],
}


@pytest.mark.slow  # real launchers, which import much
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_a_launcher_that_is_killed_save_and_end(yaml, tmp_path, launcher, number):
    output, endless = tmp_path / "run", ["train.steps=1000000", "checkpoint.every=null"]
    given = runs.arguments(yaml, [*SAVING, *endless, f"output={output}"], False)
    files = {end: tmp_path / end for end in ("out", "err")}
    command = [launcher, *LAUNCHERS[launcher], str(free_port())]
    with runs.launched(command, yaml, *given, **files) as process:
        for _ in range(10 * runs.TIMEOUT):
            if (output / "metrics.jsonl").is_file() and len(runs.metrics(output)) > 3:
                break
            assert process.poll() is None, files["err"].read_text()
            time.sleep(0.1)
        assert len(of_command(f"output={output}")) >= 3
        os.kill(process.pid, number)
        process.wait(runs.TIMEOUT)
        end = time.monotonic() + 31
        while left := of_command(f"output={output}"):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    saved = int((output / "checkpoints/latest").read_text().removeprefix("step-"))
    steps = [line["step"] for line in runs.metrics(output) if "train/loss" in line]
    assert steps == list(range(saved)), "no step is lost"


ENCODE = """
import sys
from mtl.data import cache
cache.PARALLEL = 0
from mtl import build, config
build.encode(config.load(sys.argv[1]))
"""


@pytest.mark.slow  # every worker imports much
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core encodes without workers")
def test_workers_that_encode_end_with_the_program(tmp_path):
    yaml = runs.write(tmp_path)
    with (tmp_path / "copy.train.jsonl").open("a") as rows:
        rows.writelines(f'{{"prompt": "{i} =", "completion": " {i}"}}\n' for i in range(10**6))
    environment = {**os.environ, **forks.ENVIRONMENT, "PYTHONPATH": str(runs.ROOT)}
    program = subprocess.Popen([sys.executable, "-c", ENCODE, str(yaml)], env=environment)
    try:
        while not any(path.stat().st_size for path in tmp_path.glob("cache/*.partial/rows.arrow")):
            assert program.poll() is None
            time.sleep(0.1)
        workers = {pid for pid in of_command("spawn_main") if process._parent(pid) == program.pid}
        assert workers
    finally:
        program.kill()
        program.wait()
    for _ in range(50):
        if all(lock._ticks(pid) == "gone" for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers live on")


def test_a_worker_ends_with_its_parent():
    worker = "import os, time; from mtl import process; process.end_with_parent({}); print(os.getpid(), flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, subprocess, sys; w = {worker!r}; "
            "subprocess.run([sys.executable, '-c', w.format(os.getpid())])",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if lock._ticks(pid) == "gone":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the worker lives on")


# A checkpoint is whole or is not there


def test_a_flipped_bit_is_found_and_the_run_goes_on_from_the_step_before(yaml, whole, tmp_path):
    names = manifest.names(whole / "checkpoints" / "step-00000012")
    shard = next(n for n in names if "zero_pp_rank_1" in n)
    for i, name in enumerate((shard, "model/model.safetensors", "state.json")):
        output = copy(whole, tmp_path / str(i))
        folder = output / "checkpoints" / "step-00000012"
        flip(folder / name)
        before = runs.contents(output)
        ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
        assert ended.codes == [1, 1]
        assert f"{folder / name}: its content is not what was written" in ended.err
        assert f"{folder} is damaged." in ended.err and "--resume=8" in ended.err
        assert runs.contents(output) == before
    runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=8).well()
    assert runs.untimed(output) == runs.untimed(whole)
    there = [load_file(one / "model" / "model.safetensors") for one in (output, whole)]
    assert all((there[0][name] == tensor).all() for name, tensor in there[1].items())


def test_the_newest_good_checkpoint_is_named(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    for step, name in (12, "state.safetensors"), (8, "model/config.json"):
        os.truncate(output / "checkpoints" / f"step-{step:08d}" / name, 7)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
    assert ended.codes == [1, 1] and "--resume=4" in ended.err and "found 7 bytes" in ended.err
    runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=4).well()
    assert runs.untimed(output) == runs.untimed(whole)


def test_a_truncated_model_is_not_exported(yaml, whole, tmp_path):
    from mtl.output.export import ExportError, export

    output = copy(whole, tmp_path / "run")
    folder = output / "checkpoints" / "step-00000012"
    os.truncate(folder / "model" / "model.safetensors", 1000)
    with pytest.raises(ExportError, match=r"model\.safetensors: found 1000 bytes"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()


# Small files too


def test_the_export_does_not_depend_on_log_and_record(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    with (output / "metrics.jsonl").open("r+") as log:
        log.write("{torn")
    os.truncate(output / "run.json", 20)
    shutil.rmtree(output / "model")
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert f"no table of the run: {output}/metrics.jsonl:1: found " in ended.err
    assert (output / "model/model.safetensors").is_file()


def test_a_missing_pointer_does_not_begin_again(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    (output / "checkpoints" / "latest").unlink()
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True).well()
    assert "latest is missing" in ended.err and f"resuming from {output}" in ended.err
    assert runs.untimed(output) == runs.untimed(whole)


def test_a_torn_record_before_the_first_checkpoint(yaml, tmp_path):
    output = tmp_path / "run"
    runs.train(yaml, OURS, *SAVING, f"output={output}", MISFORTUNE="kill step 2 0")
    os.truncate(output / "run.json", 20)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", resume=True)
    assert ended.codes == [1] and f"{output}/run.json: is damaged" in ended.err


def test_a_step_beyond_the_last_one(yaml, whole, tmp_path):
    output = copy(whole, tmp_path / "run")
    folder = output / "checkpoints" / "step-00000012"
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"step": 12,', '"step": 13,', 1))
    manifest.seal(folder)
    ended = runs.train(yaml, OURS, *SAVING, f"output={output}", world=2, resume=True)
    assert ended.codes == [1, 1] and "is of step 13, and the run has only 12 steps" in ended.err


# Bad configs


def test_a_warm_up_beyond_a_run_given_in_epochs_is_refused(yaml):
    ended = runs.train(yaml, "train={epochs: 0.1}", "schedule.warmup=500")
    assert ended.codes == [1] and "Traceback" not in ended.err
    assert "schedule.warmup: found 500, wanted at most the run's steps, " in ended.err
