"""What torch.optim's state_dict and load_state_dict need on top, through their own hooks."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.optim import options
from shampoo_kernels.optim.blocks import LEFT, RIGHT
from shampoo_kernels.optim.distributed.team import Share, is_dtensor, team_of
from shampoo_kernels.optim.state import check_state

# Of the state's layout; every param group carries it. In version 1 a root that had not been
# computed was the identity, and long sides were split into other pieces.
VERSION = 2
OLD_VERSIONS = (1,)

ANY = range(sys.maxsize)  # block

_ALL_RANKS = (
    "; a state_dict() holds the blocks of one rank, also with full_state_dict=True: load on every "
    "rank its own, or go through torch.distributed.checkpoint.save, which takes those of all"
)


def warn_of_other_ranks(shares: Iterable[Share]) -> None:
    """For state_dict(): the recipe that saves what rank 0 has would lose the blocks of the others.

    torch.distributed.checkpoint, which asks every rank, is not warned.
    """
    sizes = [share.team.size for share in shares if share.team.rank == 0]
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if max(sizes, default=1) > 1 and not caller.startswith("torch.distributed.checkpoint"):
        warnings.warn(
            f"Shampoo: state_dict() of rank 0 of {max(sizes)} is a part of the state{_ALL_RANKS}",
            stacklevel=3,
        )


def cloned(states: Mapping) -> dict:
    """A copy of {parameter: state}."""
    return {
        key: {name: _cloned(value) for name, value in state.items()}
        for key, state in states.items()
    }


def upgraded(state: dict) -> dict:
    """The state of a parameter in version 1, as it is in this one."""
    return {name: _without_identity(name, value) for name, value in state.items()}


def _without_identity(name: str, value: Any) -> Any:
    if "_root." not in name or not torch.equal(value, torch.eye(len(value)).to(value)):
        return value
    return torch.zeros_like(value)


@contextmanager
def copying_tensors(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let state_dict() give copies: saving a view would save the whole stack behind it.

    Process groups, which cannot be saved, stay out.
    """

    def copy(_: torch.optim.Optimizer, state_dict: dict) -> None:
        state_dict["state"] = cloned(state_dict["state"])
        for group in state_dict["param_groups"]:
            group["process_group"] = None

    handle = optimizer.register_state_dict_post_hook(copy, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def keeping_dtypes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let load_state_dict() check the state first, and take floating tensors as they were saved.

    torch.optim casts them to the dtype of the parameter, which ruins float32 state of bfloat16
    parameters. Process groups stay what they are.
    """
    loaded: dict = {}
    process_groups = [group["process_group"] for group in optimizer.param_groups]

    def capture(_: torch.optim.Optimizer, state_dict: dict) -> dict:
        loaded.update(_current(optimizer, state_dict))
        return loaded

    def restore(_: torch.optim.Optimizer) -> None:
        for group, process_group in zip(optimizer.param_groups, process_groups, strict=True):
            group["process_group"] = process_group
        for parameter, state in _saved(optimizer, loaded):
            kept = optimizer.state[parameter]
            for name, value in state.items():
                if name == "step":
                    kept[name] = _cloned(kept[name])
                elif isinstance(value, Tensor):
                    kept[name] = value.to(parameter.device, copy=True)

    handles = (
        optimizer.register_load_state_dict_pre_hook(capture),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saved(optimizer: torch.optim.Optimizer, loaded: dict) -> Iterator[tuple[Tensor, dict]]:
    """(parameter, its saved state), matched by position."""
    for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
        for parameter, key in zip(group["params"], saved["params"], strict=False):
            if key in loaded["state"]:
                yield parameter, loaded["state"][key]


def _current(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """`state_dict`, checked and in this version; itself it stays as it is."""
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"Shampoo: the loaded state dict must hold {name!r}, got "
                             f"{sorted(map(str, state_dict))}")  # fmt: skip
    states, groups, lost = dict(state_dict["state"]), [], 0
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        version = saved.get("version")
        if version not in (VERSION, *OLD_VERSIONS):
            raise ValueError(
                f"Shampoo: the loaded state dict must be of version {VERSION}, got {version!r}"
            )
        if "params" not in saved:
            raise ValueError("Shampoo: a loaded param group must hold 'params', got "
                             f"{sorted(map(str, saved))}")  # fmt: skip
        plain = options.checked({**options.ADDED, **saved})
        team = team_of(group)
        others = ANY if team else ()  # which ones are not here, a step will know
        for parameter, key in zip(group["params"], saved["params"], strict=False):
            if key in states:
                check_state(parameter, states[key], plain, others)
                lost += team is not None and _is_lost(states[key])
                if version in OLD_VERSIONS:
                    states[key] = upgraded(states[key])
        groups.append({**saved, **plain, "version": VERSION})
    if lost:
        warnings.warn(
            f"Shampoo: the loaded state of {lost} parameters has moments but no statistics: those "
            f"of this rank's blocks start anew{_ALL_RANKS}",
            stacklevel=2,
        )
    groups += state_dict["param_groups"][len(groups) :]  # too many, which torch.optim refuses
    return {"state": states, "param_groups": groups}


def _is_lost(state: Mapping) -> bool:
    """Gradients were seen, and yet the statistics are new: they were with other ranks."""
    statistics = [x for name, x in state.items() if name.partition(".")[0] in (LEFT, RIGHT)]
    average = state.get("exp_avg", torch.zeros(()))
    seen = (average.to_local() if is_dtensor(average) else average).any()
    return bool(statistics) and bool(seen) and not any(x.any() for x in statistics)


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
