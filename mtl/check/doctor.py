"""What stands in the way of a run on this machine, whatever its configuration: what
`launch/doctor.py` prints and refuses.
"""

import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from mtl import process

SIZE = 64 * 2**20  # bytes of the tensor that is summed
TIMES = 5
PROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


class DoctorError(ValueError):
    """Something that would end a run, or make it silently wrong."""


def machine() -> list[str]:
    """What is here, a line each."""
    free = shutil.disk_usage(".").free / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = {name: value for name, value in sorted(os.environ.items()) if _matters(name)}
    return [
        f"host        {socket.gethostname()}, {platform.platform()}",
        f"cores       {cores}, memory {memory:.0f} GiB, free disk here {free:.0f} GiB",
        f"devices     {_devices()}",
        f"variables   {', '.join(f'{name}={value}' for name, value in told.items()) or 'none'}",
    ]


def versions() -> list[str]:
    """What is installed of what a run needs, a line each, beside what is wanted."""
    lines = [f"python      {platform.python_version()}"]
    for wanted in _wanted():
        lines.append(f"{wanted.name:<16} {_found(wanted.name) or 'absent':<14} {wanted.specifier}")
    return lines


def check() -> None:
    """Refuse packages that are absent or of versions known to be wrong, and a torch that does not
    see this machine's GPUs.

    DeepSpeed before the wanted version is among them: `mtl/distributed` relies on details of it.

    Raises:
        DoctorError: with all that was found.
    """
    wrong = []
    for wanted in _wanted():
        found = _found(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(
                f"{wanted.name}: found {found or 'none'}, wanted {wanted.specifier}. "
                f"pip install '{wanted}'"
            )
    import torch

    cards, seen = _cards(), torch.accelerator.device_count()
    if cards and not seen and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        wrong.append(
            f"torch {torch.__version__}: found none of the {cards} GPUs that nvidia-smi lists. "
            "Install a build for CUDA, not newer than the driver"
        )
    if wrong:
        raise DoctorError("\n  ".join(["a run would fail here:", *wrong]))


def speed() -> list[str]:
    """What `model.precision: bf16` costs on this machine's CPUs; nothing where it has another
    device. Call it after `check`: it needs DeepSpeed.
    """
    import torch

    from mtl.models import accelerate

    if torch.accelerator.device_count():
        return []
    times = accelerate.bf16_over_fp32()
    return [f"bf16        a matrix product takes {times:.1f} times as long as in fp32"]


def start(processes: int, command: Sequence[str]) -> None:
    """Run `command` as that many ranks of this host, and wait.

    Raises:
        DoctorError: a rank has failed. What it wrote stands above.
    """
    port = process.free_port()
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {name: str(value) for name, value in shared.items()},
        )
        for rank in range(processes)
    ]
    codes = [one.wait() for one in ranks]
    if any(codes):
        failed = ", ".join(f"{r} (code {code})" for r, code in enumerate(codes) if code)
        raise DoctorError(f"{processes} processes cannot talk here: rank {failed} failed")


def talk(minutes: float, say: Callable[[str], None]) -> None:
    """As one of the ranks that a launcher started: meet the others, sum, compare and measure.

    Args:
        say: takes rank 0's lines.

    Raises:
        RendezvousError: a rank did not come within `minutes`.
        DoctorError: a sum was wrong, or the ranks' versions differ.
    """
    import torch

    from mtl.distributed import comm, engine
    from mtl.output import provenance

    engine.init_process_group(minutes)
    n, device = comm.world(), engine.device()
    hosts = len(set(comm.gather(socket.gethostname())))
    total = comm.sum_(torch.tensor([2.0 ** comm.rank()], dtype=torch.float64, device=device))
    if total.item() != 2.0**n - 1:
        raise DoctorError(f"the sum of 1, 2, 4 ... over {n} ranks: found {total.item()}")
    comm.same(provenance.versions(), "versions")
    small, large = (torch.ones(size // 4, device=device) for size in (4, SIZE))
    for _ in range(10):
        comm.sum_(small)
    latency, seconds = (_seconds(lambda t=tensor: comm.sum_(t)) for tensor in (small, large))
    if comm.rank() == 0:
        rate = 2 * (n - 1) / n * SIZE / seconds / 2**30  # each process sends and gets that much
        say(
            f"{n} processes on {hosts} host{'s' * (hosts > 1)} over "
            f"{torch.distributed.get_backend()}: one number summed in {1e6 * latency:.0f} µs, "
            f"{SIZE // 2**20} MiB in {1e3 * seconds:.0f} ms ({rate:.2f} GiB/s of each process)"
        )
    comm.leave()


def _seconds(work: Callable[[], object]) -> float:
    """The median."""
    import torch

    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        torch.accelerator.is_available() and torch.accelerator.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _wanted() -> list[Requirement]:
    """The packages that this one names, without those of its extras."""
    try:
        named = requires("coba-mtl") or []
    except PackageNotFoundError:  # a checkout that is not installed
        named = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [one for one in map(Requirement, named) if one.marker is None]


def _found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> str:
    import torch

    seen = torch.accelerator.device_count()
    kind = torch.accelerator.current_accelerator() if seen else None
    built = torch.version.cuda or torch.version.hip or "CPU"
    return (
        f"{seen} {kind.type if kind else 'GPUs'} (torch built for {built}), nvidia-smi {_cards()}"
    )


def _cards() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU") for line in listed.splitlines())


def _matters(name: str) -> bool:
    exact = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return name in exact or name.startswith(("NCCL_", "GLOO_", "TORCH_", "SLURM_NNODES"))
