"""What the state of a parameter holds; every tensor's name and shape."""

from collections.abc import Container, Mapping

from torch import Tensor

from shampoo_kernels.optim.blocks import Cut
from shampoo_kernels.optim.layout import STRUCTURE, block_state, moment_names
from shampoo_kernels.optim.stacks import cut_parameter


def state_shapes(parameter: Tensor, one: Cut, group: dict) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(parameter.shape) for name in moment_names(one.sides, group)}
    shapes["step"] = ()
    for index, (rows, cols) in enumerate(one.pieces):
        m, n = rows.stop - rows.start, cols.stop - cols.start
        for name, shape in block_state(m, n, one.sides, group):
            shapes[f"{name}.{index}"] = shape
    return shapes


def check_state(
    parameter: Tensor, state: Mapping, group: dict, others: Container[int] = ()
) -> None:
    """ValueError unless `group` fits, and `state` is empty or holds what its options ask for.

    Blocks in `others` belong to other ranks: their state may be absent.
    """
    one = cut_parameter(parameter, group)
    if not state:
        return
    expected = state_shapes(parameter, one, group)
    for name in sorted(expected.keys() | state.keys(), key=str):
        wanted, given = _words(expected.get(name)), _described(state.get(name))
        if name not in state and _block(name) in others:
            continue
        if wanted != given:
            raise ValueError(
                f"Shampoo: state {name!r} of a parameter {tuple(parameter.shape)} must be "
                f"{wanted}, got {given}; {', '.join(STRUCTURE[:-1])} and {STRUCTURE[-1]} cannot "
                "change once there is state"
            )


def _block(name: str) -> int:
    """The block whose state has this name; -1 where it is of the whole parameter."""
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def _described(value: object) -> str:
    if value is not None and not isinstance(value, Tensor):
        return repr(value)
    if value is not None and not value.is_floating_point():
        return f"one of {value.dtype}"
    return _words(None if value is None else tuple(value.shape))


def _words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"a floating tensor {shape}"
