"""The few collectives that training needs, over torch.distributed. Without a process group they
change nothing.

Tensors may live on any device. Under a GPU-only backend, CPU tensors have a gloo group of their
own. Through NCCL each would wait for all work that is queued on the device.
"""

import os
import socket
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.distributed import watchdog
from mtl.process import RankError

T = TypeVar("T")


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def barrier() -> None:
    """Wait for all ranks: an all-reduce, because `dist.barrier` guesses a device."""
    sum_(torch.zeros(1))


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place. Returns `tensor`."""
    if active():
        dist.all_reduce(tensor, group=_group(tensor))
        watchdog.tick()
    return tensor


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite `tensor` on every rank with that of `source`. Returns `tensor`."""
    if active():
        dist.broadcast(tensor, source, group=_group(tensor))
        watchdog.tick()
    return tensor


def leave() -> None:
    """Leave the process group once all ranks are ready to. A collective.

    A group that is still open when Python exits may abort the process: its threads still run while
    Python frees what they use.
    """
    global _host
    if active():
        barrier()
        watchdog.stop()
        dist.destroy_process_group()
        _host = None


def together(work: Callable[[], T]) -> T:
    """Run `work` on this rank, then check that it failed on no rank.

    One rank's exception would leave the others waiting in their next collective until the timeout.
    Here it ends all of them, and each shows its text. `work` itself must not communicate.

    Raises:
        RankError: on the ranks that did not fail. It names the failed rank and its error. The
            failed rank raises its own.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    failed = sum_(torch.tensor([float(error is not None)]))
    if not failed.item():
        return result
    texts: list[str | None] = [None] * world()
    mine = error and "".join(traceback.format_exception_only(error)).strip()
    dist.all_gather_object(texts, mine, group=_group(failed)) if active() else None
    if error is not None:
        raise error
    raise RankError("; ".join(f"rank {r} failed: {text}" for r, text in enumerate(texts) if text))


def on_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0. Every rank gets its result, or its error. A collective, but `work`
    itself must not communicate.

    With several ranks the result is pickled: return plain values and small arrays.

    Raises:
        RankError: on the other ranks, with the text of rank 0's error. Rank 0 raises its own.
    """
    result = together(work if rank() == 0 else lambda: None)
    if world() == 1:
        return result
    box = [result]
    dist.broadcast_object_list(box, 0, group=_group(torch.zeros(1)))
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks. A collective.

    With several ranks it is pickled: give plain values and small arrays.
    """
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value, group=_group(torch.zeros(1)))
    watchdog.tick()
    return values


def differences(values: Mapping[str, Any]) -> list[str]:
    """What differs between ranks, a line a key: `engine.zero: 2 on rank 0, 3 on ranks 1-3`.

    It is empty where all agree. A collective; every rank gets the same lines.

    Args:
        values: dotted name to plain value, or mappings of those.
    """
    everyone = gather(_flat(values))
    lines = []
    for key in sorted({key for each in everyone for key in each}):
        holders: dict[str, list[int]] = {}
        for r, each in enumerate(everyone):
            holders.setdefault(repr(each[key]) if key in each else "absent", []).append(r)
        if len(holders) > 1:
            shown = (
                f"{value[:200]} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in holders.items()
            )
            lines.append(f"{key}: {'; '.join(shown)}")
    return lines


def same(values: Mapping[str, Any], what: str) -> None:
    """Agree that every rank holds the same values. A collective.

    Raises:
        ValueError: on all ranks. It shows only what differs, by key and rank.
    """
    if lines := differences(values):
        raise ValueError(
            "\n  ".join([f"the ranks' {what} differ. Start all of them alike.", *lines])
        )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


_host: tuple[object, dist.ProcessGroup] | None = (
    None  # the default group, and the CPU group made beside it
)


def open_host_group(timeout: timedelta | None = None) -> None:
    """Make the group for tensors on the CPU, where the backend has none. A collective.

    Gloo finds its network interface by the host's name, which often means loopback. So we give it
    the interface that `NCCL_SOCKET_IFNAME` names.
    """
    global _host
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if wanted in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", wanted)
    _host = dist.group.WORLD, dist.new_group(backend="gloo", timeout=timeout)


def _group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The group for a tensor's collectives; None = the default one."""
    if tensor.device.type != "cpu":
        return None
    if _host is None or _host[0] is not dist.group.WORLD:
        if dist.get_backend() != "nccl":
            return None
        open_host_group()
    return _host[1]
