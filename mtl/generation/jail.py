"""Runs one Python program that nobody has read: `python -I -S jail.py ROOT SECONDS MEMORY FILE
PREFIX PYTHON < program`. `sandbox.run` starts it, as the first process of its own namespaces.

Standard library only, and nothing of this package: it runs by its path, outside any environment.
"""

import ctypes
import os
import resource
import sys

MS_RDONLY, MS_REMOUNT, MS_BIND, MNT_DETACH = 1, 32, 4096, 2
LOCKED = 2 | 4 | 8  # nosuid, nodev, noexec: a mount that has them must keep them
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SYSTEM = "/usr", "/lib", "/lib64", "/bin"
DEVICES = "null", "zero", "random", "urandom"
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *given: object) -> None:
    raw = [one.encode() if isinstance(one, str) else one for one in given]
    if getattr(libc, name)(*raw):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}{given}: {os.strerror(error)}")


def bind(place: str, inside: str) -> None:
    """The same files at `inside`, read-only."""
    # The kernel ignores other flags of a bind mount, so it is mounted again with them.
    call("mount", place, inside, None, MS_BIND, None)
    flags = MS_BIND | MS_REMOUNT | MS_RDONLY | (os.statvfs(inside).f_flag & LOCKED)
    call("mount", None, inside, None, flags, None)


def enter(root: str, prefix: str, program: bytes) -> None:
    """Leave the file system for one of 16 MiB in memory, which has the system's programs and
    Python, both read-only, and the program.
    """
    call("mount", "tmpfs", root, "tmpfs", LOCKED & ~8, "size=16m,mode=0755")
    for place in dict.fromkeys([*SYSTEM, prefix]):
        if os.path.islink(place):
            os.symlink(os.readlink(place), root + place)
        elif os.path.isdir(place) and not os.path.exists(root + place):
            os.makedirs(root + place)
            bind(place, root + place)
    for folder in ("tmp", "dev", "old"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        call("mount", f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND, None)
    with open(f"{root}/tmp/main.py", "wb") as file:
        file.write(program)
    os.chdir(root)
    # Not chroot: the old root goes away below, and leaves no way back.
    call("pivot_root", ".", "old")
    os.chdir("/tmp")
    call("umount2", "/old", MNT_DETACH)
    os.rmdir("/old")


def limit(seconds: int, memory: int, file: int) -> None:
    """Memory and file in bytes."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def disarm() -> None:
    """No capability, now or after an exec: it cannot mount, or leave its root."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # until the kernel has no more
        capability += 1


if __name__ == "__main__":
    root, seconds, memory, file, prefix, python = sys.argv[1:]
    enter(root, prefix, sys.stdin.buffer.read())
    limit(int(seconds), int(memory), int(file))
    disarm()
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    # Standard error stays open up to here, for what goes wrong above.
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    os.execv(python, [python, "-I", "-S", "main.py"])
