"""Runs Python programs that a model has written, apart from everything else on this machine.

Each program is one process in user, mount, network, PID and IPC namespaces of its own (util-linux's
`unshare`). It sees Python with its standard library and the system's programs, read-only, an empty
/tmp of 16 MiB in memory, and no network, not even the loopback's other processes. It has no
capabilities, no environment variables and no input. Time, memory, the size of files and the number
of open files and processes are limited. When its time is over, all its processes are killed.

Not promised: it is no virtual machine. A hole in the kernel is a way out. Time on the CPU and in
caches is shared, so a program can slow others down, and several processes may each take the memory
of one. Linux does not limit root's number of processes. A program that looks for the way in which
it is judged can pretend to be right. Run it where nothing is at stake.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
NAMESPACES = [
    *("--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid"),
    *("--fork", "--kill-child=KILL"),
]


class NoSandbox(ValueError):
    """This machine cannot keep a program apart, so none is run."""


def run(program: str, seconds: float = 10.0, memory: int = 512, file: int = 1) -> bool:
    """Whether the program runs to its end without an error.

    Its last line must be reached: a program that exits earlier, with any code, has not.

    Args:
        seconds: of the clock, and of the CPU.
        memory: MiB of address space of each process.
        file: MiB of the largest file.

    Raises:
        NoSandbox: namespaces are not to be had here. The text says why.
    """
    available()
    return _run(program, seconds, memory, file)[0]


# An error is not cached, so a machine that cannot is asked again at each run.
@cache
def available() -> None:
    """Raises NoSandbox unless a program can be kept apart here. It tries that once."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        raise NoSandbox("running code needs Linux and util-linux's `unshare`, which is not here")
    did, why = _run("pass", 60, 512, 1)
    if not did:
        raise NoSandbox(
            f"running code needs namespaces, which this machine does not give: {why or 'no reason'}"
            ". Allow user namespaces (`sysctl -a | grep userns`, user.max_user_namespaces) and "
            "mounts in a container, or evaluate on another machine"
        )


def _run(program: str, seconds: float, memory: int, file: int) -> tuple[bool, str]:
    """Whether it came to its end, and what went wrong before its start."""
    end = 64 + secrets.randbelow(64)  # a code that no program exits with by chance
    whole = f"{program}\n\n__import__('os')._exit({end})\n"
    # Not a virtual environment's: the jail has the system's folders and base_prefix only.
    python = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    limits = [max(1, round(seconds)), memory * 2**20, file * 2**20]
    with tempfile.TemporaryDirectory(prefix="coba-mtl-jail.") as root:
        command = [
            *("unshare", *NAMESPACES, str(python), "-I", "-S", str(JAIL), root),
            *(*map(str, limits), sys.base_prefix, str(python)),
        ]
        try:
            done = subprocess.run(
                command,
                input=whole.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        except subprocess.TimeoutExpired:
            return False, "its time is over"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return done.returncode == end, lines[-1] if lines else ""
