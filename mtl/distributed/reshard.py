"""Re-partition the state of one ZeRO layout (ranks, stage) for another, in the files that DeepSpeed
writes. Every rank does it.

Every file says which piece of which parameter it holds. So the new engine writes a checkpoint of
its fresh state. We overwrite its pieces with the old values, and the engine loads it like any
other.

DeepSpeed 0.19.8 has a universal checkpoint for this, which does not suffice. It holds AdamW's two
moments and nothing else (SGD: KeyError 'exp_avg'). Stages 1 and 2 cannot read stage 3's form, nor
the reverse, and stage 0 has none. At stage 3 it loads the first parameter group's weight decay into
all groups.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the key of the parameter itself; other keys are the optimizer's: exp_avg, momentum_buffer ...
FP32 = "fp32"


@dataclass(frozen=True)
class Fragment:
    """The place of a part of a flattened parameter in one rank's file: `numel` elements from
    `start`.

    Attributes:
        group: the group whose flat tensors hold it.
        offset: its first element in them.
    """

    name: str
    start: int
    numel: int
    group: int
    offset: int


class Shard:
    """One rank's part of the optimizer's state and of the fp32 parameters, as in DeepSpeed's file:
    one flat tensor for each group and key.
    """

    def __init__(self, content: dict[str, Any]):
        held = content["optimizer_state_dict"]
        # Stages 1 and 2 save the parameters without the last rank's padding, but not the
        # optimizer's state.
        self.padding = held.get("group_paddings") if "zero_stage" in held else None
        if _is_stage_3(held):
            self.flat, self.state = held["fp32_flat_groups"], held["optimizer_state_dict"]["state"]
        else:
            self.flat = held["single_partition_of_fp32_groups"]
            self.state = held["base_optimizer_state"]["state"]

    def tensors(self, group: int) -> dict[str, Tensor]:
        """The flat tensors of a group by key; scalars (AdamW's step) have no dimension."""
        return {FP32: self.flat[group].detach().view(-1)} | {
            k: v for k, v in self.state.get(group, {}).items() if torch.is_tensor(v)
        }


class Files:
    """A checkpoint folder of DeepSpeed's, whatever its layout.

    Args:
        folder: holds the `*.pt` files. The caller has checked that they run no code.
        order: names of the trained parameters as the torch optimizer has them. Only stage 0 needs
            it.

    Attributes:
        pieces: each parameter's pieces in the order of their starts, each with the rank that holds
            it.
    """

    def __init__(self, folder: Path, order: list[str]):
        self.folder, self.order = folder, order
        self.paths = sorted(
            folder.glob("*zero_pp_rank_*_optim_states.pt"), key=lambda path: _rank_of(path)
        )
        self.pieces: dict[str, list[tuple[int, Fragment]]] = {}
        self.shards: list[Shard] = []
        if not self.paths:
            self.whole = _open(folder / "mp_rank_00_model_states.pt")
            return
        shapes, world = _shapes(folder), len(self.paths)
        before: Counter[str] = Counter()  # elements of each parameter on earlier ranks
        for rank, path in enumerate(self.paths):
            content = _open(path)
            self.shards.append(Shard(content))
            held = content["optimizer_state_dict"]
            places = (
                _stage_3(shapes, rank, world)
                if _is_stage_3(held)
                else _stages_1_and_2(held["param_slice_mappings"], before)
            )
            for piece in places:
                self.pieces.setdefault(piece.name, []).append((rank, piece))
                before[piece.name] += piece.numel

    @property
    def names(self) -> set[str]:
        return set(self.pieces) if self.paths else set(self.order) & self.whole["module"].keys()

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The optimizer's scalars, the same for every parameter: AdamW's step."""
        states = self.shards[0].state if self.paths else self.whole["optimizer"]["state"]
        some = next(iter(states.values()), {})
        return {
            key: value for key, value in some.items() if torch.is_tensor(value) and value.dim() == 0
        }

    def read(self, name: str) -> dict[str, Tensor]:
        """A parameter and its optimizer state by key, flattened."""
        if not self.paths:
            state = self.whole["optimizer"]["state"].get(self.order.index(name), {})
            kept = {
                key: value.view(-1)
                for key, value in state.items()
                if torch.is_tensor(value) and value.dim()
            }
            return {FP32: self.whole["module"][name].detach().view(-1).float()} | kept
        parts: dict[str, list[Tensor]] = {}
        for rank, piece in self.pieces[name]:
            for key, flat in self.shards[rank].tensors(piece.group).items():
                if flat.dim():
                    parts.setdefault(key, []).append(
                        flat[piece.offset : piece.offset + piece.numel]
                    )
        return {key: torch.cat(some) for key, some in parts.items()}


@torch.no_grad()  # some of the tensors in the files are parameters
def fill(
    source: Path, target: Path, rank: int, order: list[str], aliases: Mapping[str, str]
) -> None:
    """Overwrite this rank's files in `target`, which a fresh engine wrote, with the state in
    `source`, of any layout.

    Args:
        order: names of the trained parameters as the torch optimizer has them.
        aliases: from every trained parameter's name, tied ones included, to the optimizer's name
            for it.

    Raises:
        ValueError: the two are of different models or optimizers.
    """
    old, new = Files(source, order), Files(target, order)
    if old.names != new.names:
        lacks, extra = sorted(new.names - old.names), sorted(old.names - new.names)
        raise ValueError(
            f"{source} is of another model: it lacks {lacks[:3]} ({len(lacks)}) and has the "
            f"unknown {extra[:3]} ({len(extra)})"
        )
    if new.paths:
        content = torch.load(new.paths[rank], map_location="cpu", weights_only=False)
        shard = Shard(content)
        for name, places in new.pieces.items():
            # A parameter is read only where this rank holds a part of it.
            mine = [piece for owner, piece in places if owner == rank and piece.numel]
            values = old.read(name) if mine else {}
            for piece in mine:
                for key, value in values.items():
                    flat = _flat(shard, piece.group, key)
                    flat[piece.offset : piece.offset + piece.numel] = value[
                        piece.start : piece.start + piece.numel
                    ]
        for group in range(len(shard.flat)):
            if group in shard.state:
                shard.state[group] |= {key: value.clone() for key, value in old.scalars.items()}
        _save(content, new.paths[rank])
    model = target / "mp_rank_00_model_states.pt"
    if (
        rank == 0 and model.exists()
    ):  # one file for all ranks; stage 3 has no such file: its parameters are in the others
        content = torch.load(model, map_location="cpu", weights_only=False)
        # Tied parameters stand in the file under each of their names.
        for alias, name in aliases.items():
            parameter = content["module"][alias]
            parameter.copy_(old.read(name)[FP32].view(parameter.shape))
        if not new.paths:
            state = content["optimizer"]["state"]
            for i, name in enumerate(order):
                shape = content["module"][name].shape
                kept = {
                    key: value.view(shape).clone()
                    for key, value in old.read(name).items()
                    if key != FP32
                }
                scalars = {key: value.clone() for key, value in old.scalars.items()}
                state[i] = {**scalars, **kept} or state.get(i, {})
        _save(content, model)


def _flat(shard: Shard, group: int, key: str) -> Tensor:
    if key == FP32:
        return shard.flat[group].view(-1)
    state = shard.state.setdefault(group, {})
    if not torch.is_tensor(state.get(key)):
        # A fresh optimizer has none before its first step.
        state[key] = torch.zeros(
            shard.flat[group].numel() + (shard.padding[group] if shard.padding else 0)
        )
    return state[key].view(-1)


def _is_stage_3(held: Mapping[str, Any]) -> bool:
    return "fp32_flat_groups" in held


def _stages_1_and_2(
    groups: Sequence[Mapping[str, Any]], before: Mapping[str, int]
) -> Iterator[Fragment]:
    """A rank's pieces at stages 1 and 2. All parameters stand in one row, divided where a rank's
    share ends. So a piece starts where that of the rank before ends.

    Args:
        groups: of each group DeepSpeed's fragments by name, whose `start` is the offset in this
            rank's flat tensor.
        before: elements of each parameter that the ranks before hold.
    """
    for group, fragments in enumerate(groups):
        for name, fragment in fragments.items():
            yield Fragment(name, before.get(name, 0), fragment.numel, group, fragment.start)


def _stage_3(groups: Sequence[Mapping[str, Any]], rank: int, world: int) -> Iterator[Fragment]:
    """A rank's pieces at stage 3. Every parameter is divided into one equal part for each rank; the
    last ones are padded.

    Args:
        groups: of each group the parameters' shapes by name.
    """
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            whole = math.prod(shape)
            part = -(-whole // world)
            start = min(rank * part, whole)
            yield Fragment(name, start, min(part, whole - start), group, offset)
            offset += part


def _shapes(folder: Path) -> list[Mapping[str, Any]]:
    return _open(sorted(folder.glob("*_model_states.pt"))[0])["param_shapes"]


def _open(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _save(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)  # the file is whole at any moment: other ranks may be reading it


def _rank_of(path: Path) -> int:
    return int(path.name.partition("zero_pp_rank_")[2].partition("_")[0])
