"""The processes that share the work on a param group, and whether they mean the same group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shampoo_kernels.optim.blocks import Block
from shampoo_kernels.optim.distributed import sharding
from shampoo_kernels.optim.layout import STRUCTURE
from shampoo_kernels.optim.stacks import cut_parameter


@dataclass(frozen=True)
class Team:
    """The ranks of `process_group`; `sharded` when each holds rows of the parameters, not all."""

    process_group: Any
    rank: int
    size: int
    sharded: bool


@dataclass
class Share:
    """Who owns the blocks with factors of one param group."""

    team: Team
    owners: dict[Tensor, tuple[int, ...]]  # the rank of every block; () without factors
    spent: list[int]  # flops given to every rank
    signature: tuple = field(default=(), repr=False)

    def runs(self, parameters: Sequence[Tensor], blocks: Sequence[Block]) -> list[list[Block]]:
        """The blocks of one stack, by owner: neighbours, as `sharding.share_out` gives them out."""
        result: list[list[Block]] = [[] for _ in range(self.team.size)]
        for block in blocks:
            result[self.owners[parameters[block.parameter]][block.index]].append(block)
        return result

    def others(self, parameter: Tensor) -> set[int]:
        """The blocks of `parameter` that other ranks own."""
        ranks = enumerate(self.owners[parameter])
        return {index for index, rank in ranks if rank != self.team.rank}


def team_of(group: dict) -> Team | None:
    """None where every process works for itself.

    Raises:
        RuntimeError: DTensors that are not cut along their first dimension alone, or that are in
            one param group with other tensors or meshes;
        ValueError: process_group together with DTensors, which bring their own.
    """
    parameters = group["params"]
    if not any(is_dtensor(parameter) for parameter in parameters):
        return None if group["process_group"] is None else _team(group["process_group"], False)
    if group["process_group"] is not None:
        raise ValueError(
            "Shampoo: process_group must be None for DTensor parameters, which are shared out over "
            f"their own device mesh, got {group['process_group']}"
        )
    places = {(p.device_mesh, p.placements) if is_dtensor(p) else None for p in parameters}
    if len(places) > 1:
        raise RuntimeError(
            "Shampoo: the DTensors of a param group must share one mesh and its placements, and "
            f"other tensors need a group of their own; got {sorted(map(str, places))}"
        )
    mesh, placements = places.pop()  # type: ignore[misc]
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or type(placements[cut[0]]).__name__ != "Shard" or placements[cut[0]].dim != 0:
        raise RuntimeError(
            "Shampoo: DTensors must be Shard(0) on one dimension of their mesh and Replicate() on "
            f"the others, as fully_shard makes them; got {placements}"
        )
    return _team(mesh.get_group(cut[0]), True)


def is_process_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _team(process_group: Any, sharded: bool) -> Team:
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    return Team(process_group, rank, size, sharded)


def shares(groups: Sequence[dict], known: dict[int, Share]) -> dict[int, Share]:
    """The shares of those of `groups` that are shared out, by number.

    A group's blocks go where the groups before it left least to do. Shares in `known` stay as they
    are while the group's parameters and options do: groups that come later do not move state. All
    parameters of a group count, with gradients or without, so that late ones do not either.
    """
    result: dict[int, Share] = {}
    for number, group in enumerate(groups):
        team = team_of(group)
        if team is None:
            continue
        parameters = list(dict.fromkeys(group["params"]))
        signature = (team, *(group[name] for name in STRUCTURE), *map(id, parameters))
        if number in known and known[number].signature == signature:
            result[number] = known[number]
            continue
        before = [
            share.spent for share in result.values()
            if share.team.process_group == team.process_group
        ]  # fmt: skip
        loads = [sum(spent) for spent in zip(*before, strict=True)] or [0] * team.size
        start = list(loads)
        cuts = [cut_parameter(parameter, group) for parameter in parameters]
        places = [(parameter.dtype, parameter.device) for parameter in parameters]
        owners = dict(zip(parameters, sharding.owners(cuts, places, loads), strict=True))
        spent = [after - earlier for after, earlier in zip(loads, start, strict=True)]
        result[number] = Share(team, owners, spent, signature)
    return result


def description(number: int, groups: Sequence[dict], members: Sequence[Tensor]) -> tuple[str, ...]:
    """What all ranks must agree on, in words short enough to send and to read."""
    group = groups[number]
    shapes = repr([tuple(parameter.shape) for parameter in members])
    dtypes = repr([parameter.dtype for parameter in members])
    options = repr([group[name] for name in STRUCTURE])
    return (
        f"{len(groups)} param groups",
        f"{len(members)} parameters to train",
        f"shapes {_digest(shapes)}",
        f"dtypes {_digest(dtypes)}",
        f"options {_digest(options)} ({', '.join(STRUCTURE)})",
    )


def agree(team: Team, number: int, mine: tuple[str, ...]) -> None:
    """Compare `mine`, a `description`, over the ranks, once for each; every rank must call it.

    Raises:
        RuntimeError: on every rank, if one has another.
    """
    everyone: list[Any] = [None] * team.size
    dist.all_gather_object(everyone, mine, team.process_group)
    for rank, theirs in enumerate(everyone):
        for ours, other in zip(everyone[0], theirs, strict=True):
            if ours != other:
                raise RuntimeError(
                    f"Shampoo: param group {number} must be the same on every rank of its process "
                    f"group; rank 0 has {ours}, rank {rank} has {other}"
                )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
