"""Whatever starts the processes, they are the same run; and the templates that ship are at least well formed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import runs
import yaml as pyyaml

from mtl import cli, process

LAUNCH = runs.ROOT / "launch"
STEPS = ["train.steps=3", "evaluate.every=100"]
STEP = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "20", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_STEP_NODELIST": "gpu[07-09]",
}  # fmt: skip


def test_srun_tells_a_process_its_place():
    assert process.from_srun(STEP) == {
        "RANK": "9", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "27137",
    }  # fmt: skip
    last = {**STEP, "SLURM_PROCID": "19", "SLURM_NODEID": "2", "SLURM_LOCALID": "3"}
    assert process.from_srun(last)["LOCAL_WORLD_SIZE"] == "4"
    assert process.from_srun({**STEP, "MASTER_PORT": "29500"})["MASTER_PORT"] == "29500", (
        "what is set stays"
    )
    other = process.from_srun({**STEP, "SLURM_STEP_ID": "2"})["MASTER_PORT"]
    assert other != "27137", "two steps of a job may run at once"


@pytest.mark.parametrize(
    "changed",
    [
        {"RANK": "0"},  # started by torchrun or deepspeed inside of srun
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1, as to prepare the data
        {"SLURM_STEP_NUM_TASKS": None},  # the batch script itself, where SLURM_PROCID is 0
        {"SLURM_PROCID": None},
    ],
)
def test_srun_is_left_alone_where_it_does_not_decide(changed):
    environment = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    assert process.from_srun(environment) == {}


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[07-09]", "gpu07"),
        ("gpu[12,07-09],fat1", "gpu12"),
        ("fat1,gpu[07-09]", "fat1"),
        ("n1", "n1"),
        ("rack-a-[001-004]-ib,x", "rack-a-001-ib"),
        ("node-1.example.com", "node-1.example.com"),
    ],
)
def test_the_first_host_leads(nodes, first):
    assert process.from_srun({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


OMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "1841561601", "MASTER_ADDR": "n1",
}  # fmt: skip
PMI = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
    "MASTER_ADDR": "n1",
}
CRAY = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
    "MASTER_ADDR": "n1",
}


@pytest.mark.parametrize("given", [OMPI, PMI, CRAY], ids=["Open MPI", "PMI", "Cray"])
def test_mpirun_tells_a_process_its_place(given):
    found = process.from_launcher(given)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    }  # fmt: skip
    assert 20_000 <= port < 30_000
    assert process.from_launcher({**given, "MASTER_PORT": "29500"})["MASTER_PORT"] == "29500"
    # Its daemons were started by srun, whose variables the processes inherit.
    within = {**given, **STEP, "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_STEP_NUM_TASKS": "2"}
    assert process.from_launcher(within)["RANK"] == "5"
    assert process.from_launcher({**given, "RANK": "0"}) == {}, "torchrun within mpirun"


def test_one_machine_needs_no_address_and_several_do():
    one = {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    del one["MASTER_ADDR"]
    assert process.from_launcher(one)["MASTER_ADDR"] == "127.0.0.1"
    several = {**one, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    with pytest.raises(ValueError, match="MASTER_ADDR: found nothing.*mpirun -x MASTER_ADDR="):
        process.from_launcher(several)
    found = process.from_launcher({**several, "SLURM_JOB_NODELIST": "gpu[07-09]"})
    assert found["MASTER_ADDR"] == "gpu07"
    ports = {process.from_launcher({**one, "PMIX_NAMESPACE": n})["MASTER_PORT"] for n in "ab"}
    assert len(ports) == 2, "two runs on a machine"


INTEL = {**PMI, "MPI_LOCALNRANKS": "8"}


@pytest.mark.parametrize("uuids", [("a", "b"), ("a", "a")])
def test_two_mpiruns_of_a_job_have_ports_of_their_own(uuids):
    """Intel MPI's name the run; all processes of a run, and no others, have a port."""
    given = [{**INTEL, "PBS_JOBID": "7", "I_MPI_HYDRA_UUID": uuid} for uuid in uuids]
    ports = {process.from_launcher(one)["MASTER_PORT"] for one in given}
    assert len(ports) == len(set(uuids)) and "20000" not in ports


def test_mpichs_own_port_tells_its_runs_apart():
    """It stands in the command line of the proxy, whatever comes between it and the program."""
    code = (
        "import os; from mtl import process as p; print(p.from_launcher(os.environ)['MASTER_PORT'])"
    )
    inner = shlex.join([sys.executable, "-c", code])
    environment = {**runs.without_a_launcher(), **INTEL, "PYTHONPATH": str(runs.ROOT)}

    def port(own: str) -> str:
        script = shlex.join(["sh", "-c", f"{inner}; true"]) + "; true"
        proxy = ["/x/hydra_pmi_proxy", "-c", script]
        return subprocess.run(
            [*proxy, "--control-port", own], executable="/bin/sh", env=environment,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    one, again, other = port("vm:46285"), port("vm:46285"), port("vm:46286")
    assert one == again != other and "20000\n" not in (one, other)


@pytest.mark.parametrize("given", [OMPI, PMI, STEP], ids=["Open MPI", "PMI", "SLURM"])
def test_a_world_of_one_among_others_is_an_error(given):
    """As where mpirun starts a torchrun on each machine, and none knows of the others."""
    alone = {**given, "RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(ValueError, match=r"WORLD_SIZE: found 1 beside \w+=(8|20), wanted one run"):
        process.check_world(alone)
    process.check_world({**alone, "WORLD_SIZE": "16"})
    process.check_world({})
    process.check_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # a shell of an allocation
    with pytest.raises(ValueError, match="RANK: found nothing beside WORLD_SIZE=4"):
        process.check_world({"WORLD_SIZE": "4"})


@pytest.fixture(scope="module")
def yaml(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("launchers"))


def test_the_program_does_not_train_alone_among_others(yaml):
    output = yaml.parent / "alone"
    ended = runs.train(yaml, *STEPS, f"output={output}", OMPI_COMM_WORLD_SIZE="8")
    assert ended.codes == [1] and not output.exists()
    assert "WORLD_SIZE: found 1 beside OMPI_COMM_WORLD_SIZE=8" in ended.err


@pytest.fixture(scope="module")
def alike(yaml):
    """Asserts that a run in a folder is the one that two forked processes make."""
    expected = yaml.parent / "expected"
    runs.train(yaml, *STEPS, f"output={expected}", world=2).well()

    def check(output: Path) -> None:
        assert json.loads((output / "run.json").read_text())["world"] == 2
        mine, others = runs.untimed(output), runs.untimed(expected)
        assert [line.keys() for line in mine] == [line.keys() for line in others]
        for line, other in zip(mine, others, strict=True):
            np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-5)

    return check


def launched(n: int) -> dict[str, dict[str, str]]:
    """What each launcher sets for the n-th of two processes of a machine."""
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n),
    }  # fmt: skip
    ompi = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in {
            "RANK": str(n), "SIZE": "2", "LOCAL_RANK": str(n), "LOCAL_SIZE": "2",
        }.items()
    }  # fmt: skip
    return {"srun": slurm, "mpirun": ompi}


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_srun_and_mpirun_start_a_run(yaml, alike, launcher):
    """As they do it: the same command twice, with nothing but their variables to tell them apart."""
    output = yaml.parent / launcher
    command = [
        sys.executable,
        str(runs.PROGRAM),
        *runs.arguments(yaml, [*STEPS, f"output={output}"], resume=False),
    ]
    environment = {
        **runs.without_a_launcher(), **forks.ENVIRONMENT, "MASTER_PORT": str(process.free_port()),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            command, env={**environment, **launched(n)[launcher]}, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    errors = [task.communicate(timeout=runs.TIMEOUT)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    alike(output)


def mpirun() -> list[str]:
    """`mpirun -n 2` of the MPI that is installed, with what Open MPI asks of root."""
    found = shutil.which("mpirun")
    if not found:
        pytest.skip("no mpirun here: apt-get install openmpi-bin, or pip install mpich")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    more = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    return [found, *more, "-n", "2"]


def test_a_real_mpirun_starts_a_run(yaml, alike):
    output = yaml.parent / "real-mpirun"
    ended = runs.launch([*mpirun(), sys.executable], yaml, *STEPS, f"output={output}")
    ended.well()
    alike(output)


def test_accelerate_starts_a_run(yaml, alike):
    """By the line in docs/cluster.md, with 2 for its 8."""
    output = yaml.parent / "accelerate"
    text = (runs.ROOT / "docs" / "cluster.md").read_text()
    (line,) = re.findall(r"`(accelerate launch .*) launch/train\.py --config x\.yaml`", text)
    launcher = ["2" if word == "8" else word for word in shlex.split(line)]
    launcher += ["--num_machines", "1", "--main_process_port", str(process.free_port())]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    runs.launch(launcher, yaml, *STEPS, f"output={output}").well()
    alike(output)


def test_the_console_script_runs_the_programs(yaml):
    command = [sys.executable, "-m", "mtl.cli"]
    environment = {**os.environ, **forks.ENVIRONMENT, "PYTHONPATH": str(runs.ROOT)}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, cwd=yaml.parent
        )

    shown = call("--help")
    assert shown.returncode == 0 and all(
        re.search(rf"^  {name} +\w", shown.stdout, re.M) for name in cli.PROGRAMS
    ), shown.stdout
    wrong = call("trian")
    assert wrong.returncode == 2 and "found 'trian', wanted init, " in wrong.stderr
    assert "Did you mean train?" in wrong.stderr
    checked = call("check", "--config", str(yaml), "--world", "2")
    assert checked.returncode == 0 and "nothing stands in the way" in checked.stdout, checked.stderr
    refused = call("train", "--config", str(yaml), "--set", "train.steps=none")
    assert refused.returncode == 1 and "train.steps" in refused.stderr


def test_the_console_script_passes_everything_on(tmp_path, monkeypatch):
    for name in ("train", "check"):
        (tmp_path / f"{name}.py").write_text(
            "import sys\nfrom pathlib import Path\n"
            "def main(): Path('said').write_text(repr(sys.argv))"
        )
    monkeypatch.setattr(cli, "folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["mtl", "--local_rank=1", "train", "--config", "x.yaml", "--set", "a=b"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    said = "['mtl train', '--config', 'x.yaml', '--set', 'a=b']"
    assert (tmp_path / "said").read_text() == said


def test_the_console_script_says_its_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mtl", "--version"])
    cli.main()
    assert capsys.readouterr().out == "mtl 0.1.0\n"


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_help_is_under_the_programs_name_and_imports_little(name):
    """Torch alone takes a second, and pydantic half of one: what a program needs is imported once
    the arguments are read.
    """
    heavy = {"torch", "transformers", "deepspeed", "numpy", "pydantic", "yaml"}
    code = (
        "import sys, atexit; from mtl import cli\n"
        f"atexit.register(lambda: print({heavy} & set(sys.modules)))\n"
        f"sys.argv = ['mtl', {name!r}, '--help']; cli.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: mtl {name} ")
    assert shown.stdout.endswith("set()\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel of this checkout holds, and its scripts in bin/."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, folder)
    for name in ("mtl", "balancers", "launch"):
        shutil.copytree(
            runs.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [
            *pip,
            "install",
            "--no-deps",
            "--no-index",
            "--no-compile",
            "--target",
            str(folder / "site"),
            str(wheel),
        ],
        check=True,
    )
    return folder / "site"


def test_a_wheel_holds_the_whole_package(installed):
    def files(folder: Path) -> set[str]:
        return {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(installed / "balancers") == files(runs.ROOT / "balancers")
    assert files(installed / "mtl") == files(runs.ROOT / "mtl") | {
        f"launch/{name}" for name in files(LAUNCH)
    }


def test_an_installed_wheel_needs_no_checkout(installed, yaml, tmp_path):
    environment = {**os.environ, **forks.ENVIRONMENT, "PYTHONPATH": str(installed)}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(installed / "bin" / "mtl"), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    assert call("--help").stdout.endswith(f": {installed / 'mtl' / 'launch'}\n"), (
        "it says where the templates are"
    )
    checked = call("check", "--config", str(yaml), "--world", "2")
    assert checked.returncode == 0 and "nothing stands in the way" in checked.stdout, checked.stderr
    source = f"import sys, runpy; runpy.run_path({str(installed / 'mtl/launch/report.py')!r}); print(sys.path)"
    shown = subprocess.run(
        [sys.executable, "-c", source],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert f"'{installed}'" in shown.stdout and f"'{installed / 'mtl'}'" not in shown.stdout, (
        "where `import data` would be ours"
    )


# --- templates and the page about clusters


def options_of(program: str) -> set[str]:
    """A program's long options, from its own parser's help."""
    help_ = subprocess.run(
        [sys.executable, program, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][\w-]*", help_.stdout))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    def of(parser) -> set[str]:
        return {name for action in parser._actions for name in action.option_strings}

    found = {
        f"launch/{name}.py": options_of(str(LAUNCH / f"{name}.py"))
        for name in ("train", "check", "export", "init")
    }
    deepspeed = set(re.findall(r"[\"'](--\w+)[\"']", Path(runner.__file__).read_text()))
    return found | {
        "torchrun": of(get_args_parser()),
        "accelerate": of(launch_command_parser()),
        "deepspeed": deepspeed,
    }


def assert_known(command: list[str], options: dict[str, set[str]]) -> None:
    """Every long option belongs to the launcher or, after it, to the program."""
    owner = next(word for word in command if word in options or word.startswith("launch/"))
    for word in command:
        if word in options:
            owner = word
        elif word.startswith("--"):
            assert word.partition("=")[0] in options[owner], (
                f"{owner} has no {word}: {shlex.join(command)}"
            )


def by_files(text: str) -> str:
    """With the programs' files in the place of their names under `mtl`."""
    return re.sub(r"-m mtl\.cli (\w+)", r"launch/\1.py", text)


def commands(text: str) -> list[list[str]]:
    text = by_files(text)
    return [
        shlex.split(one)
        for one in re.findall(
            r"`((?:deepspeed|torchrun|accelerate|python) [^`]*launch/[^`]*)`", text
        )
    ]


def test_the_commands_of_the_cluster_page_exist(options):
    found = commands((runs.ROOT / "docs" / "cluster.md").read_text())
    assert len(found) > 8
    for command in found:
        assert_known(command, options)
        for word in command:
            assert not word.startswith("launch/") or (runs.ROOT / word).is_file(), word


def test_the_slurm_script(options):
    script = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "launch/" not in "".join(line for line in text.splitlines() if line[:1] != "#"), (
        "a wheel has no such folder beside it"
    )
    for line in by_files(text).splitlines():
        if line.startswith("srun"):
            program = line[line.index("launch/") :].replace('"$@"', "--config x.yaml")
            assert_known(shlex.split(program), options)
    assert text.index("#SBATCH") < text.index("set -euo"), (
        "sbatch reads no option after the first command"
    )
    outside = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert outside.returncode != 0 and "submit this with sbatch" in outside.stderr


def test_the_slurm_script_prepares_then_trains(tmp_path):
    """With an srun that only says what it was given."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "srun $*"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PYTHON": "py",
    }
    command = ["bash", str(LAUNCH / "slurm.sh"), "--config", "x.yaml", "--set", "a=b c"]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [
        "srun --nodes=1 --ntasks=1 py -m mtl.cli check --prepare --config x.yaml --set a=b c",
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 py -m mtl.cli train --resume --config x.yaml --set a=b c",
    ]


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_script_queues_what_was_preempted_again(tmp_path, code):
    for name, text in (
        ("srun", f'case "$*" in *cli\\ train*) exit {code};; esac'),
        ("scontrol", 'echo "scontrol $*"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "12",
    }
    ended = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh")], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code
    assert ended.stdout == ("scontrol requeue 12\n" if code == 75 else "")


def test_the_kubernetes_job(options):
    job = pyyaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (
        replicas["Master"]["replicas"] == 1
        and replicas["Worker"]["template"] == replicas["Master"]["template"]
    )
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    command = shlex.split(by_files(container["args"][0]))[1:]
    assert_known(command, options)
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in command
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


def test_the_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile"))) == {"worker-1": 8, "worker-2": 8}


def test_bitsandbytes_does_not_greet_every_start():
    """Where it is installed peft imports it, and on CPUs with AVX512-BF16 it then misses a kernel. The rest is said."""
    code = (
        "import logging; from mtl.process import exit_code\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "def main():\n"
        "    log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s', 'x')\n"
        "    log.warning('something else')\n"
        "exit_code(main)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr == "WARNING bitsandbytes.backends.cpu.ops: something else\n"
