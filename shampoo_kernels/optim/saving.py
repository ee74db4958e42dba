"""What torch.optim's state_dict and load_state_dict need on top, through their own hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shampoo_kernels.optim.stacks import check_state

# Of the state's layout; every param group carries it.
VERSION = 1


@contextmanager
def copying_tensors(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let state_dict() give copies: saving a view would save the whole stack behind it."""

    def copy(_: torch.optim.Optimizer, state_dict: dict) -> None:
        state_dict["state"] = {
            key: {name: _cloned(value) for name, value in state.items()}
            for key, state in state_dict["state"].items()
        }

    handle = optimizer.register_state_dict_post_hook(copy, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def keeping_dtypes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let load_state_dict() check the state first, and take floating tensors as they were saved.

    torch.optim casts them to the dtype of the parameter, which ruins float32 state of bfloat16
    parameters.
    """
    loaded: dict = {}

    def capture(_: torch.optim.Optimizer, state_dict: dict) -> None:
        loaded.update(state_dict)
        for parameter, state, group in _saved(optimizer, loaded):
            _check(parameter, state, {**optimizer.defaults, **group})

    def restore(_: torch.optim.Optimizer) -> None:
        for parameter, state, _group in _saved(optimizer, loaded):
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


def _saved(optimizer: torch.optim.Optimizer, loaded: dict) -> Iterator[tuple[Tensor, dict, dict]]:
    """(parameter, its saved state, its saved group), parameters matched by position."""
    for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
        for parameter, key in zip(group["params"], saved["params"], strict=False):
            if key in loaded["state"]:
                yield parameter, loaded["state"][key], saved


def _check(parameter: Tensor, state: dict, group: dict) -> None:
    version = group.get("version")
    if version != VERSION:
        raise ValueError(
            f"Shampoo: the loaded state dict must be of version {VERSION}, got {version!r}"
        )
    check_state(parameter, state, group)


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
