"""Where statistics and roots live: one tensor per stack, with views of its blocks in the state.

The state of a parameter holds, next to "step", "exp_avg" and "exp_avg_sq" (parameter-shaped), for
each of its blocks i: "block_step.i" (finite gradients seen, for bias correction), and for each
side with a factor "left.i", "left_root.i", "right.i", "right_root.i".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_kernels.optim.blocks import LEFT, Block, Cut, StackKey, cut, stack_blocks

# Bytes of one packed temporary: larger stacks are processed in parts of this size.
PART_BYTES = 64 << 20

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Stack:
    """All blocks of one shape among `parameters`, and their state as stacks."""

    key: StackKey
    blocks: list[Block]
    dtype: torch.dtype
    device: torch.device
    steps: Tensor  # (B,)
    statistic: dict[str, Tensor] = field(default_factory=dict)  # side: (B, d, d)
    root: dict[str, Tensor] = field(default_factory=dict)  # side: (B, d, d)

    def __post_init__(self) -> None:
        self.members = sorted({block.parameter for block in self.blocks})

    def dimension(self, side: str) -> int:
        return self.key.m if side == LEFT else self.key.n

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state's name of each stack, and the stack."""
        yield "block_step", self.steps
        for side in self.key.sides:
            yield side, self.statistic[side]
            yield f"{side}_root", self.root[side]

    def parts(self) -> list[slice]:
        """The blocks in pieces whose packed form takes at most PART_BYTES."""
        count = max(1, PART_BYTES // (self.key.m * self.key.n * self.dtype.itemsize))
        return [slice(i, i + count) for i in range(0, len(self.blocks), count)]

    def pieces(self, matrices: Sequence[Tensor], part: slice) -> list[Tensor]:
        """The blocks of `part` as views of matrices[parameter]."""
        shape = (self.key.m, self.key.n)
        return [
            matrix if (matrix := matrices[block.parameter]).shape == shape
            else matrix[block.rows, block.cols]
            for block in self.blocks[part]
        ]  # fmt: skip

    def pack(self, matrices: Sequence[Tensor], part: slice) -> Tensor:
        """The blocks of `part` as one tensor (b, m, n) in the state's dtype.

        One block of the right dtype is a view of its matrix, not a copy.
        """
        pieces = self.pieces(matrices, part)
        packed = pieces[0].unsqueeze(0) if len(pieces) == 1 else torch.stack(pieces)
        return packed.to(self.dtype)

    def unpack_(self, matrices: Sequence[Tensor], part: slice, packed: Tensor) -> None:
        """Write (b, m, n) back into the blocks of `part`, rounding to their dtype."""
        torch._foreach_copy_(self.pieces(matrices, part), packed.unbind())


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def cut_parameter(parameter: Tensor, group: dict) -> Cut:
    p = group["p"] if group["precondition"] else (None, None)
    return cut(parameter.shape, p, group["block_size"], group["max_dimension"])


def build(parameters: Sequence[Tensor], states: Sequence[dict], group: dict) -> list[Stack]:
    """Make the stacks of `parameters`, fill them from `states`, and leave views of them there.

    A state without "step" is new. Raises ValueError, before anything changes, when a state does
    not hold what the options of `group` ask for.
    """
    for parameter, state in zip(parameters, states, strict=True):
        check_state(parameter, state, group)
    for parameter, state in zip(parameters, states, strict=True):
        _start_state(state, parameter, group["capturable"])
    cuts = [cut_parameter(parameter, group) for parameter in parameters]
    places = [(state_dtype(parameter), parameter.device) for parameter in parameters]
    stacks = []
    for key, blocks in stack_blocks(cuts, places).items():
        stack = _empty_stack(key, blocks, group["root_dtype"])
        for name, tensor in stack.tensors():
            for block, view in zip(blocks, tensor.unbind(), strict=True):
                state, name_in_state = states[block.parameter], f"{name}.{block.index}"
                if name_in_state in state:
                    view.copy_(state[name_in_state])
                state[name_in_state] = view
        stacks.append(stack)
    return stacks


def _start_state(state: dict, parameter: Tensor, capturable: bool) -> None:
    """Make "step" and the moments, or bring those that are there to where they are worked on."""
    step_device = parameter.device if capturable else "cpu"  # as torch.optim places it
    step = state.get("step", torch.zeros(()))
    state["step"] = step.to(step_device, torch.float32)
    for name in MOMENTS:
        dtype = state_dtype(parameter)
        moment = state.get(name)
        if moment is None:
            moment = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        state[name] = moment.to(parameter.device, dtype).contiguous()


def _empty_stack(key: StackKey, blocks: list[Block], root_dtype: torch.dtype | None) -> Stack:
    """No step, statistics zero, every root the identity."""
    dtype, device = key.rest
    count = len(blocks)
    stack = Stack(key, blocks, dtype, device, torch.zeros(count, dtype=dtype, device=device))
    for side in key.sides:
        d = stack.dimension(side)
        stack.statistic[side] = torch.zeros(count, d, d, dtype=dtype, device=device)
        root = torch.zeros(count, d, d, dtype=root_dtype or dtype, device=device)
        root.diagonal(dim1=-2, dim2=-1).fill_(1)
        stack.root[side] = root
    return stack


def state_shapes(parameter: Tensor, one: Cut) -> dict[str, tuple[int, ...]]:
    """Every tensor that the state of a parameter holds, and its shape."""
    shapes = {name: tuple(parameter.shape) for name in MOMENTS}
    shapes["step"] = ()
    for index, (rows, cols) in enumerate(one.pieces):
        shapes[f"block_step.{index}"] = ()
        for side in one.sides:
            piece = rows if side == LEFT else cols
            d = piece.stop - piece.start
            shapes[f"{side}.{index}"] = shapes[f"{side}_root.{index}"] = (d, d)
    return shapes


def check_state(parameter: Tensor, state: dict, group: dict) -> None:
    """ValueError unless `state` is new (no "step") or holds what the options of `group` ask for."""
    if "step" not in state:
        return
    expected = state_shapes(parameter, cut_parameter(parameter, group))
    given = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"Shampoo: state {name!r} of a parameter {tuple(parameter.shape)} must be "
                f"{_words(expected.get(name))}, got {_words(given.get(name))}; p, block_size, "
                "max_dimension and precondition cannot change once there is state"
            )


def _words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"a tensor {shape}"
