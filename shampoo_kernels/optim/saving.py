"""What torch.optim's state_dict and load_state_dict need on top, through their own hooks."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.optim import options
from shampoo_kernels.optim.distributed.team import team_of
from shampoo_kernels.optim.state import check_state

# Of the state's layout; every param group carries it. In version 1 a root that had not been
# computed was the identity, and long sides were split into other pieces.
VERSION = 2
OLD_VERSIONS = (1,)

ANY = range(sys.maxsize)  # block


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
    states, groups = dict(state_dict["state"]), []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        version = saved.get("version")
        if version not in (VERSION, *OLD_VERSIONS):
            raise ValueError(
                f"Shampoo: the loaded state dict must be of version {VERSION}, got {version!r}"
            )
        if "params" not in saved:
            raise ValueError("Shampoo: a loaded param group must hold 'params', got "
                             f"{sorted(map(str, saved))}")  # fmt: skip
        alone = {"process_group": None}  # the group's own comes back later: torch.optim copies deep
        plain = options.checked({**optimizer.defaults, **options.ADDED, **saved, **alone})
        others = ANY if team_of(group) else ()  # which ones are not here, a step will know
        for parameter, key in zip(group["params"], saved["params"], strict=False):
            if key in states:
                check_state(parameter, states[key], plain, others)
                if version in OLD_VERSIONS:
                    states[key] = upgraded(states[key])
        groups.append({**saved, **plain, "version": VERSION})
    groups += state_dict["param_groups"][len(groups) :]  # too many, which torch.optim refuses
    return {**state_dict, "state": states, "param_groups": groups}


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
