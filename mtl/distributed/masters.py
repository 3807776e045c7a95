"""The trained weights in fp32, as this rank holds them: a run averages them and puts them into the
module.

At ZeRO 0 they are the parameters themselves, whole on every rank. At ZeRO 1-3 they are this rank's
part of the master weights, a slice of each parameter's flat values. We rely on DeepSpeed 0.19.8's
`_hp_mapping` (ZeRO 1, 2) and `fp32_partitioned_groups_flat` (ZeRO 3), and do what its own step does
after them.
"""

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mtl.distributed import comm
from mtl.distributed.engine import Engine, shape

BLOCK = 1 << 20  # values of a parameter whose lower bits are drawn at once: 2 MB


def local(engine: Engine) -> dict[str, Tensor]:
    """Name to this rank's part, as flat fp32 views. Values written into them are trained on.

    Names without a part on this rank are absent. At ZeRO 1-3 call `publish` after a change.
    """
    return {name: values for name, (values, _) in _fragments(engine).items()}


def dither(engine: Engine, seed: int) -> None:
    """Draw the lower bits of master weights of bf16 parameters, of which they have none yet.

    Every master weight gets a value, at random and evenly, among those that round to its bf16
    weight. So the model does not change. Without this a weight moves only when its updates add up
    to half a space of bf16's grid, all weights alike; with it, some weights move at each update,
    and the mean is the update. Zeros stay, as they have no space around them. Values depend on the
    seed and the parameter's name, not on the number of processes or the stage.
    """
    for name, (values, start) in _fragments(engine).items():
        stop = start + len(values)
        for first in range(start - start % BLOCK, stop, BLOCK):
            key = [seed, zlib.crc32(name.encode()), first // BLOCK]
            drawn = np.random.default_rng(key).integers(-32767, 32768, BLOCK, dtype=np.int16)
            low, high = max(start, first), min(stop, first + BLOCK)
            part = values[low - start : high - start]
            # fp32's bits as integers stand in the order of the numbers, bf16's 65,536 apart.
            bits = part.view(torch.int32)
            lower = torch.from_numpy(drawn[low - first : high - first])
            on_grid = part.isfinite() & (part != 0) & (bits & 0xFFFF == 0)
            bits += torch.where(on_grid, lower.to(bits.device, torch.int32), 0)


def publish(engine: Engine) -> None:
    """Copy the master weights into the module's parameters. A collective."""
    if not engine._stage:
        return
    optimizer = engine._engine.optimizer
    if engine._stage < 3:
        optimizer.update_lp_params()
        return
    # Parameters that a forward left gathered would keep their old values.
    optimizer.parameter_offload.partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if persistent := optimizer.persistent_parameters:
        persistent[0].all_gather(persistent)
    optimizer.invalidate_secondary_tensor()


def exchange(engine: Engine, others: Mapping[str, Tensor]) -> None:
    """Swap the contents of the trained weights and of `others`, named as in `local`. A collective.

    Two swaps restore everything, bit for bit. It needs extra memory for one parameter's part.
    """
    for name, mine in local(engine).items():
        kept = mine.to(others[name].device, copy=True)
        mine.copy_(others[name])
        others[name].copy_(kept)
    publish(engine)


def whole(engine: Engine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's `parts`, named and sliced as those of `local`, put together: fp32, on the CPU of
    rank 0 (elsewhere empty). A collective.
    """
    fragments, found = _fragments(engine), {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        size = shape(parameter).numel()
        values = torch.zeros(size, dtype=torch.float32, device=engine.device)
        if name in fragments:
            start = fragments[name][1]
            part = parts[name][: max(0, size - start)]  # the rest is ZeRO 3's padding
            values[start : start + len(part)] = part.to(engine.device)
        if engine._stage:
            comm.sum_(values)
        if comm.rank() == 0:
            found[name] = values.cpu().view(shape(parameter))
    return found


def scatter(engine: Engine, read: Callable[[str], Tensor], device: str | None) -> dict[str, Tensor]:
    """This rank's parts of whole tensors: the reverse of `whole`, for any number of processes and
    any stage.

    Args:
        read: turns a parameter's name into the whole tensor, fp32 on the CPU.
        device: where the parts go; None: beside the trained weights.
    """
    parts = {}
    for name, (values, start) in _fragments(engine).items():
        part = torch.zeros_like(values, device=device)
        given = read(name).reshape(-1)[start : start + len(values)]
        part[: len(given)] = given.to(part.device)
        parts[name] = part
    return parts


def _fragments(engine: Engine) -> dict[str, tuple[Tensor, int]]:
    """Name to this rank's values, and their start in the flat parameter."""
    found = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if not engine._stage:
            found[name] = p.detach().view(-1), 0
        elif engine._stage == 3:
            values, _ = engine._engine.optimizer._get_fp32_opt_state_partition(
                p, release_swap_buffers=True
            )
            found[name] = values.detach(), len(values) * comm.rank()
        elif p._hp_mapping is not None:
            found[name] = (
                p._hp_mapping.hp_fragment.detach(),
                p._hp_mapping.lp_fragment_address.start,
            )
    return found
