"""What one process of a run settles before torch is imported, and how it ends."""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping


def settle() -> None:
    """Share the cores among this machine's processes. Call before torch is imported; variables that
    are set stay.

    Launchers leave this to us: processes that each start a thread per core, and spin while they
    wait, are 3-10 times slower. Threads that do not wait at all for the next piece of work cost a
    fifth of a step: they wait for some microseconds.
    """
    os.environ |= from_srun(os.environ)
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


def from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, where `srun` started several processes itself and nothing else
    has told them who they are.

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


def is_first_on_host() -> bool:
    """Whether this process speaks for its machine before there is a process group."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say_on_host(text: str) -> None:
    """Print a message for people, once on this machine."""
    if is_first_on_host():
        print(text, file=sys.stderr, flush=True)


def exit_code(main: Callable[[], None]) -> int:
    """Run a program. A user's error (ValueError) is printed as it reads, anything else with its
    traceback.

    Errors that all processes of a machine meet alike, such as those of the YAML, are printed once
    in full.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings(
        "ignore", "`is_gradient_checkpointing`", FutureWarning
    )  # so does PEFT one of transformers'
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
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
