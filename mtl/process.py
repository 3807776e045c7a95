"""What one process of a run settles before torch is imported, and how it ends."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable


def settle() -> None:
    """Share the cores among this machine's processes. Call before torch is imported; variables that are set stay.

    Launchers leave this to us: processes that each start a thread per core, and spin while they wait, are 3-10 times slower.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_world)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Huge pages for tensors on the CPU: a step there allocates gigabytes anew, and faulting them in by 4 KiB takes its share.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def is_first_on_host() -> bool:
    """Whether this process speaks for its machine before there is a process group."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def exit_code(main: Callable[[], None]) -> int:
    """Run a program. A user's error (ValueError) is printed as it reads, anything else with its traceback.

    Errors that all processes of a machine meet alike, such as those of the YAML, are printed once in full.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
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
            more = " ... (in full above or below, by the first process of this machine)" if rest else ""
            print(f"error [rank {os.environ.get('RANK', '?')}]: {first}{more}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
