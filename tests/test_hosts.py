"""Two hosts, for which two network namespaces stand in: one run, and what a cut cable does to it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import forks
import pytest
import runs

pytestmark = pytest.mark.slow
HOSTS = {"coba-a": ("va", "10.77.0.1"), "coba-b": ("vb", "10.77.0.2")}
PATIENCE = 150  # seconds; a collective waits 15 here, and the watchdog 30 more
ENDED = re.compile(r"rank \d of 2 (ends|failed), at step \d+ of 120")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces for the network need root and iproute2")
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        (a, (va, _)), (b, (vb, _)) = HOSTS.items()
        ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b)
        for name, (interface, address) in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for each in ("lo", interface):
                ip("-n", name, "link", "set", each, "up")
    except subprocess.CalledProcessError as error:
        _remove()
        pytest.skip(f"no namespaces for the network here: {error.stderr}")
    yield
    _remove()


def _remove() -> None:
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(
    yaml: Path, *overrides: str, launcher: str = "torch.distributed.run"
) -> list[subprocess.Popen]:
    """A process on each host, by a launcher; what it writes goes into HOST.log beside the YAML."""
    first = HOSTS["coba-a"][1]
    started, hostfile = [], yaml.parent / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for _, address in HOSTS.values()))
    more = {
        "torch.distributed.run": ["--nnodes", "2", "--nproc_per_node", "1"],
        "deepspeed.launcher.runner": ["--hostfile", str(hostfile), "--no_ssh"],
    }[launcher]
    for rank, (name, (interface, _)) in enumerate(HOSTS.items()):
        environment = {**runs.without_a_launcher(), **forks.ENVIRONMENT}
        environment |= {"GLOO_SOCKET_IFNAME": interface, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = ["ip", "netns", "exec", name, sys.executable, "-m", launcher, *more]
        command += ["--node_rank", str(rank)]
        command += ["--master_addr", first, "--master_port", "29777", str(runs.PROGRAM)]
        command += runs.arguments(yaml, overrides, False)
        with (yaml.parent / f"{name}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
    return started


def codes(started: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit codes; -9 of those that have not ended by then."""
    end = time.monotonic() + seconds
    for one in started:
        with suppress(subprocess.TimeoutExpired):
            one.wait(max(0, end - time.monotonic()))
    for one in started:
        with suppress(ProcessLookupError):  # the launcher's ranks end with it
            os.killpg(one.pid, signal.SIGKILL)
    return [one.wait() for one in started]


def told(yaml: Path) -> dict[str, str]:
    return {name: (yaml.parent / f"{name}.log").read_text() for name in HOSTS}


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "deepspeed.launcher.runner"])
def test_two_hosts_give_what_one_gives(hosts, tmp_path, launcher):
    yaml = runs.write(tmp_path)
    assert codes(start(yaml, launcher=launcher), runs.TIMEOUT) == [0, 0], told(yaml)
    runs.train(yaml, f"output={tmp_path / 'one'}", world=2).well()
    assert runs.untimed(tmp_path / "run") == runs.untimed(tmp_path / "one")


def test_a_host_that_is_cut_off_ends_the_other_which_names_the_step_and_goes_on(hosts, tmp_path):
    """Either by gloo's own error or, in the middle of a large sum, by the watchdog."""
    yaml = runs.write(tmp_path)
    often = "train.steps=120", "checkpoint.every=10", "evaluate.every=1000"
    started = start(yaml, *often, "engine.timeout_minutes=0.25")
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + runs.TIMEOUT
    while not metrics.exists() or metrics.read_text().count("train/loss") < 25:
        assert time.monotonic() < end and all(one.poll() is None for one in started), told(yaml)
        time.sleep(0.2)
    ip("-n", "coba-b", "link", "set", "vb", "down")
    end = time.monotonic() + PATIENCE
    while not all(ENDED.search(text) for text in told(yaml).values()):
        assert time.monotonic() < end, told(yaml)
        time.sleep(0.2)
    codes(started, 0)  # a torchrun that is cut off may wait for its store
    after = runs.train(yaml, *often, world=1, resume=True).well()
    assert "resuming from" in after.err
    trained = [line["step"] for line in runs.metrics(tmp_path / "run") if "train/loss" in line]
    assert trained == list(range(120)), "none is missing or there twice"
