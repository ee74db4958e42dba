"""Where statistics and roots live: one tensor per stack, with views of its blocks in the state.

The state of a parameter holds, next to "step", "exp_avg" and "exp_avg_sq" (parameter-shaped), for
each of its blocks i: "block_step.i" (finite gradients seen, for bias correction), for each side
with a factor "left.i", "left_root.i", "right.i", "right_root.i", and what variants need besides:
see layout.py. A root that has not been computed yet is zero, which no inverse root is; a basis is
the identity.
"""

import itertools
import operator
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shampoo_kernels.optim.blocks import LEFT, RIGHT, Block, Cut, StackKey, cut, stack_blocks
from shampoo_kernels.optim.layout import block_state, kept, moment_names

# Bytes of one packed temporary: larger stacks are processed in parts of this size.
PART_BYTES = 64 << 20

HALVES = (torch.bfloat16, torch.float16)

Matrices = Sequence[Tensor] | Mapping[int, Tensor]  # by parameter


@dataclass
class Stack:
    """All blocks of one shape among `parameters`, and their state as stacks.

    Where ranks share the blocks, those of this one: `total` in all, from number `first` on.
    """

    key: StackKey
    blocks: list[Block]
    dtype: torch.dtype
    device: torch.device
    steps: Tensor  # (B,)
    statistic: dict[str, Tensor] = field(default_factory=dict)  # side: (B, d, d)
    root: dict[str, Tensor] = field(default_factory=dict)  # side: (B, d, d); or the basis
    extra: dict[str, Tensor] = field(default_factory=dict)  # name: (B, ...)
    kept: dict[str, str] = field(default_factory=dict)  # side: the state's name of `root`
    # side: (B,) int8, the RootStatus of the last refresh, -1 before; no part of the state
    status: dict[str, Tensor] = field(default_factory=dict)
    place: int = 0  # of the first block, what turns go by: `turns.place_`
    first: int = 0
    total: int = 0
    complete: bool = False  # every block is known to have its roots or bases

    def __post_init__(self) -> None:
        self.total = self.total or len(self.blocks)
        self.parameters = sorted({block.parameter for block in self.blocks})

    def dimension(self, side: str) -> int:
        return self.key.m if side == LEFT else self.key.n

    def left_right(self) -> tuple[Tensor | None, Tensor | None]:
        """The roots or bases in the dtype of the stack, None on a side without."""
        left, right = self.root.get(LEFT), self.root.get(RIGHT)
        return (
            None if left is None else left.to(self.dtype),
            None if right is None else right.to(self.dtype),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state's name of each stack, and the stack."""
        yield "block_step", self.steps
        for side in self.key.sides:
            yield side, self.statistic[side]
            yield self.kept[side], self.root[side]
        yield from self.extra.items()

    def parts(self, present: Container[int]) -> Iterator[tuple[int, "Stack"]]:
        """(index of its first block, part): the blocks of the parameters in `present`.

        A part is a run of neighbours, as views, whose packed form takes at most PART_BYTES.
        """
        count = max(1, PART_BYTES // (self.key.m * self.key.n * self.dtype.itemsize))
        for start, stop in self._runs(present):
            for first in range(start, stop, count):
                yield first, self.part(slice(first, min(first + count, stop)))

    def _runs(self, present: Container[int]) -> Iterator[tuple[int, int]]:
        if all(parameter in present for parameter in self.parameters):
            yield 0, len(self.blocks)
            return
        start = 0
        for here, run in itertools.groupby(block.parameter in present for block in self.blocks):
            stop = start + len(list(run))
            if here:
                yield start, stop
            start = stop

    def part(self, part: slice) -> "Stack":
        if part == slice(0, len(self.blocks)):
            return self
        statistic, root, extra, status = (
            {name: tensor[part] for name, tensor in tensors.items()}
            for tensors in (self.statistic, self.root, self.extra, self.status)
        )
        return replace(
            self, blocks=self.blocks[part], steps=self.steps[part], statistic=statistic, root=root,
            extra=extra, status=status,
        )  # fmt: skip

    def pieces(self, matrices: Matrices) -> list[Tensor]:
        """The blocks as views of matrices[parameter]."""
        shape = (self.key.m, self.key.n)
        return [
            matrix if (matrix := matrices[block.parameter]).shape == shape
            else matrix[block.rows, block.cols]
            for block in self.blocks
        ]  # fmt: skip

    def bytes(self) -> int:
        """Of the blocks, packed."""
        return len(self.blocks) * self.key.m * self.key.n * self.dtype.itemsize


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cut_parameter(parameter: Tensor, group: dict) -> Cut:
    p = group["p"] if group["precondition"] else (None, None)
    return cut(
        parameter.shape, p, group["block_size"], group["max_dimension"], group["split"],
        group["batch_dims"],
    )  # fmt: skip


def build(
    parameters: Sequence[Tensor], states: Sequence[dict], group: dict, cuts: Sequence[Cut],
    others: Sequence[Collection[int]] | None = None,
) -> list[Stack]:  # fmt: skip
    """Make the stacks of `parameters`, fill them from `states`, and leave views of them there.

    A state is empty, which is new, or holds what `check_state` wants. Blocks in
    others[parameter] belong to other ranks: there is no state of them, and what is there goes.
    """
    for parameter, state, one in zip(parameters, states, cuts, strict=True):
        _start_state(state, parameter, moment_names(one.sides, group), group["capturable"])
    # one dtype a stack, so that a gradient meets the same Gram kernel in whatever company
    places = [(parameter.dtype, parameter.device) for parameter in parameters]
    stacks = []
    for key, blocks in stack_blocks(cuts, places).items():
        mine = [others is None or b.index not in others[b.parameter] for b in blocks]
        own = list(itertools.compress(blocks, mine))
        stack = _empty_stack(key, own, group)
        stack.first, stack.total = mine.index(True) if own else 0, len(blocks)
        for name, tensor in stack.tensors():
            for block, view in zip(own, tensor.unbind(), strict=True):
                state, name_in_state = states[block.parameter], f"{name}.{block.index}"
                if name_in_state in state:
                    view.copy_(state[name_in_state])
                state[name_in_state] = view
            for block in itertools.compress(blocks, map(operator.not_, mine)):
                states[block.parameter].pop(f"{name}.{block.index}", None)
        stacks.append(stack)
    return stacks


def _start_state(state: dict, parameter: Tensor, moments: Sequence[str], capturable: bool) -> None:
    """Make "step" and the moments, or bring those that are there to where they are worked on."""
    step_device = parameter.device if capturable else "cpu"  # as torch.optim places it
    step = state.get("step", torch.zeros(()))
    state["step"] = step.to(step_device, torch.float32)
    for name in moments:
        dtype = state_dtype(parameter.dtype)
        moment = state.get(name)
        if moment is None:  # a DTensor for a DTensor
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        state[name] = moment.to(parameter.device, dtype).contiguous()


def _empty_stack(key: StackKey, blocks: list[Block], group: dict) -> Stack:
    """No step, no statistics, no roots: all zero; bases are the identity."""
    dtype, device = state_dtype(key.rest[0]), key.rest[1]
    count = len(blocks)
    stack = Stack(key, blocks, dtype, device, torch.zeros(count, dtype=dtype, device=device))
    stack.kept = {side: kept(side, group) for side in key.sides}
    stack.status = {
        side: torch.full((count,), -1, dtype=torch.int8, device=device) for side in key.sides
    }
    roots = {name: side for side, name in stack.kept.items()}
    for name, shape in block_state(key.m, key.n, key.sides, group):
        if name == "block_step":
            continue
        of_root = (group["root_dtype"] or dtype) if name in roots else dtype
        tensor = torch.zeros(count, *shape, dtype=of_root, device=device)
        if name in roots:
            stack.root[roots[name]] = tensor
            if name.endswith("_basis"):
                tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
        elif name in key.sides:
            stack.statistic[name] = tensor
        else:
            stack.extra[name] = tensor
    return stack
