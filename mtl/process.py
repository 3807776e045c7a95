"""What one process of a run settles before torch is imported, and how it ends."""

import ctypes
import errno
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: started again, with --resume, it goes on
GRACE = 30.0  # seconds that a run whose launcher has ended may take to save
SHORT = 2.0  # seconds of work without a bar
LAUNCHERS = ("torchrun", "torch.distributed", "torch/distributed", "deepspeed", "accelerate")


class Preempted(Exception):
    """A signal has ended the run; it has saved what there was."""


class RankError(RuntimeError):
    """Another rank failed; the text holds that rank's error."""


# How a system says that a disk is full, over its quota or read-only, and that it is closed to us or
# broken, which readers meet too.
WRITING = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS"))
STORAGE = WRITING | {errno.EACCES, errno.EPERM, errno.EIO}


def storage(error: OSError, where: Path) -> str:
    """What a file that cannot be written, or read, tells: its path, the system's words, the space
    there is.

    Args:
        where: stands for the path where the error has none.
    """
    path = Path(error.filename2 or error.filename or where)
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    what = "written" if error.errno in WRITING else "read or written"
    return f"{path}: cannot be {what}: {error.strerror or error}. Free there: {free / 1e6:,.1f} MB."


def free_port() -> int:
    """A port of this machine at which nobody listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def settle() -> None:
    """Share the cores among this machine's processes. Call before torch is imported; variables that
    are set stay.

    Launchers leave this to us: processes that each start a thread per core, and spin while they
    wait, are 3-10 times slower. Threads that do not wait at all for the next piece of work cost a
    fifth of a step: they wait for some microseconds.
    """
    if "RANK" in os.environ:
        never_outlive_launcher()
    os.environ |= from_launcher(os.environ)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_world)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "20000"
    )  # of GNU's OpenMP, which the policy alone would set to 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Huge pages for tensors on the CPU: a step there allocates gigabytes anew, and faulting them in
    # by 4 KiB takes its share.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def from_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, where `mpirun` or `srun` started several processes itself and
    nothing else has told them who they are.

    MPI's variables come first: in a SLURM allocation `mpirun` starts its daemons by `srun`, and the
    processes inherit the daemons' numbers.
    """
    e = environment
    if "RANK" in e:  # torchrun, deepspeed, accelerate
        return {}
    mpi = next((one for one in MPI if all(name in e for name in one)), None)
    return from_srun(e) if mpi is None else from_mpi(e, mpi)


class Mpi(NamedTuple):
    """The variables by which an MPI launcher tells a process its place."""

    rank: str
    size: str
    local_rank: str
    local_size: str


MPI = (
    Mpi(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's
    Mpi("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray's
)


def from_mpi(environment: Mapping[str, str], mpi: Mpi) -> dict[str, str]:
    """The same of `mpirun`'s variables. It names no machine that leads: one machine needs none,
    several take SLURM's first or MASTER_ADDR. The port follows from what tells this `mpirun` from
    others on the machine, of the same job too.

    Raises:
        ValueError: several machines, and nothing says which is the first.
    """
    e, world = environment, int(environment[mpi.size])
    if world == 1:
        return {}
    if int(e[mpi.local_size]) == world:
        first = "127.0.0.1"
    elif nodes := e.get("SLURM_JOB_NODELIST"):
        first = _first_host(nodes)
    elif not (first := e.get("MASTER_ADDR")):
        raise ValueError(
            f"MASTER_ADDR: found nothing, wanted the first of the machines that the {world} "
            f"processes of {mpi.size} run on. Add it: mpirun -x MASTER_ADDR=node1 (Open MPI), "
            "mpirun -genv MASTER_ADDR node1 (MPICH, Intel MPI)."
        )
    names = ("PMIX_NAMESPACE", "I_MPI_HYDRA_UUID", "PBS_JOBID", "SLURM_JOB_ID")
    job = next(filter(None, [*map(e.get, names[:2]), _hydra(), *map(e.get, names[2:])]), "")
    found = {
        "RANK": e[mpi.rank],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": e[mpi.local_rank],
        "LOCAL_WORLD_SIZE": e[mpi.local_size],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20_000 + zlib.crc32(job.encode()) % 10_000),
    }
    return {name: e.get(name, value) for name, value in found.items()}


def _hydra() -> str | None:
    """Where MPICH's `mpiexec` listens, alike on every machine of a run. No variable says so, but
    the command line of the proxy above this process.
    """
    child = os.getpid()
    while (child := _parent(child)) > 1:
        words = _words(child)
        if "pmi_proxy" in words[0] and "--control-port" in words[:-1]:
            return words[words.index("--control-port") + 1]
    return None


def check_world(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where this process would train alone though others were started with it:
    each would write into the same folder.
    """
    e = environment
    if "RANK" not in e and int(e.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"RANK: found nothing beside WORLD_SIZE={e['WORLD_SIZE']}, wanted this process's "
            "number. Start it with torchrun, deepspeed, accelerate, srun or mpirun; or unset "
            "WORLD_SIZE to train alone."
        )
    sizes = [*(mpi.size for mpi in MPI), "SLURM_STEP_NUM_TASKS"]
    started = next((name for name in sizes if name in e), None)
    if started and int(e.get("WORLD_SIZE", "1")) == 1 < int(e[started]):
        raise ValueError(
            f"WORLD_SIZE: found {e.get('WORLD_SIZE', 'nothing')} beside {started}={e[started]}, "
            f"wanted one run of {e[started]} processes, not as many runs of one. Let mpirun or "
            "srun start launch/train.py itself, or tell the launcher between them of all its "
            f"machines (torchrun --nnodes); or unset {started} to train alone."
        )


def from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """The same of SLURM's variables.

    In a batch script or a shell of an allocation, outside of any `srun`, SLURM counts tasks too; a
    process there is alone.
    """
    e = environment
    if "RANK" in e or "SLURM_PROCID" not in e or int(e.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    node, first = (
        int(e["SLURM_NODEID"]),
        _first_host(e.get("SLURM_STEP_NODELIST") or e["SLURM_JOB_NODELIST"]),
    )
    port = (
        20_000 + (int(e["SLURM_JOB_ID"]) * 31 + int(e["SLURM_STEP_ID"])) % 10_000
    )  # below those that systems hand out
    found = {
        "RANK": e["SLURM_PROCID"],
        "WORLD_SIZE": e["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": e["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_per_node(e["SLURM_STEP_TASKS_PER_NODE"])[node],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(port),
    }
    return {name: e.get(name, value) for name, value in found.items()}


def _first_host(nodes: str) -> str:
    """Of SLURM's short form: `gpu[07-09,12],fat1` -> gpu07."""
    prefix, number, suffix = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes).groups()
    return f"{prefix}{number or ''}{suffix}"


def _tasks_per_node(counts: str) -> list[str]:
    """Of SLURM's short form: `8(x2),4` -> 8, 8, 4."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups() for part in counts.split(",")]
    return [count for count, times in found for _ in range(int(times or 1))]


_asked = threading.Event()
_listening = False


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 ask the run to save and end, instead of ending the process."""
    global _listening
    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: _asked.set()) for number in signals]
    _listening = True
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume continues from the last checkpoint") from None
    finally:
        _listening = False
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def stop_asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return _asked.is_set()


def never_outlive_launcher() -> None:
    """Watch the launcher that started this process, where one of LAUNCHERS did: when it has ended,
    save and end, or end at once where there is nothing to save.

    `deepspeed` runs a second launcher, which does not notice that the first is gone: both count.
    Programs started otherwise, with nohup say, may outlive whatever started them.
    """
    chain, child = [], os.getpid()
    while (parent := _parent(child)) > 1 and _is_launcher(parent):
        chain.append((child, parent))
        child = parent
    if chain:
        threading.Thread(target=_watch, args=(chain,), daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent has ended, as a worker's should. Linux only;
    elsewhere nothing happens.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it had ended before
            os._exit(1)


def _watch(chain: list[tuple[int, int]]) -> None:
    while all(_parent(child) == parent for child, parent in chain):
        time.sleep(0.5)
    print(f"[rank {os.environ.get('RANK', '?')}] the launcher has ended", file=sys.stderr)
    sys.stderr.flush()
    _asked.set()
    end = time.monotonic() + GRACE
    while _listening and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)  # for the way out of a run that has saved
    os.kill(os.getpid(), signal.SIGKILL)


def _parent(pid: int) -> int:
    """A process's parent; 0 where there is no such process, or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _words(pid: int) -> list[str]:
    """A process's command line; one empty word where it is not to be had."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _is_launcher(pid: int) -> bool:
    return any(name in word for name in LAUNCHERS for word in _words(pid)[:4])


def is_first_on_host() -> bool:
    """Whether this process speaks for its machine before there is a process group."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


_told: list[str] = []


def tell(text: str) -> None:
    """Print a message for people."""
    _told.append(text)
    print(text, file=sys.stderr, flush=True)


def told() -> list[str]:
    """The messages of this process so far."""
    return list(_told)


def is_screen() -> bool:
    """Whether standard error is a terminal whose lines can be written over.

    A notebook's `!command` gives a terminal too, of which the page shows every line ever written.
    """
    is_notebook = "JPY_PARENT_PID" in os.environ  # set by Jupyter for its kernels
    return sys.stderr.isatty() and not is_notebook and os.environ.get("TERM") != "dumb"


def bar(what: str, total: float | None, unit: str, *, scale: bool = False) -> tqdm:
    """A bar with the time left, for work that may take long: on a terminal, once on this machine,
    and only where the work takes more than `SHORT` seconds.

    Args:
        scale: show large numbers as 12.3M.
    """
    show = is_first_on_host() and is_screen()
    look = {"leave": False, "dynamic_ncols": True, "delay": SHORT, "disable": not show}
    return tqdm(desc=what, total=total, unit=unit, unit_scale=scale, **look)


def say_on_host(text: str) -> None:
    """Print a message for people, once on this machine."""
    if is_first_on_host():
        tell(text)


def exit_code(main: Callable[[], None]) -> int:
    """Run a program. A user's error (ValueError) is printed as it reads, anything else with its
    traceback.

    Errors that all processes of a machine meet alike, such as those of the YAML, are printed once
    in full.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # bitsandbytes says so wherever it is imported on a CPU with AVX512-BF16; it works without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    # DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings(
        "ignore", "`is_gradient_checkpointing`", FutureWarning
    )  # so does PEFT one of transformers'
    try:
        main()
    except KeyboardInterrupt as e:
        print("; ".join(["interrupted", *map(str, e.args)]), file=sys.stderr)
        return 130
    except Preempted as e:
        say_on_host(f"{e}; --resume goes on from there")
        return PREEMPTED
    except RankError as e:  # told in full by the rank that failed
        print(f"error [rank {os.environ.get('RANK', '?')}]: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        if e.errno not in STORAGE:
            traceback.print_exc()
        else:
            print(f"error: {storage(e, Path())}", file=sys.stderr)
        return 1
    except ValueError as e:
        if is_first_on_host():
            print(f"error: {e}", file=sys.stderr)
        else:
            first, *rest = str(e).splitlines() or [type(e).__name__]
            more = (
                " ... (in full above or below, by the first process of this machine)"
                if rest
                else ""
            )
            print(f"error [rank {os.environ.get('RANK', '?')}]: {first}{more}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
