"""What an optimizer knows about its blocks, as tensors on their device."""

from collections.abc import Iterable

import torch
from torch import Tensor

from shampoo_kernels.ops.inverse_root import RootStatus
from shampoo_kernels.optim.stacks import Stack
from shampoo_kernels.optim.turns import absent

STATUSES = {f"roots_{status.name.lower()}": status for status in RootStatus}
NAMES = ("blocks", "blocks_without_root", "skipped_gradients", *STATUSES)


def metrics(stacks: Iterable[tuple[Stack, list[int]]]) -> dict[str, Tensor]:
    """Counts over (stack, gradients seen by each of its parameters), each an integer tensor ().

    "blocks" with a factor; "blocks_without_root" (or basis) yet; "skipped_gradients": how often a
    block, with or without factor, stood still because its gradient was not finite; "roots_...": how
    many roots, left and right ones each, have which `RootStatus` from their last refresh since the
    stacks were built.
    """
    found: dict[str, Tensor] = {}
    for stack, steps in stacks:
        for name, count in _of_stack(stack, steps):
            count = count.to(torch.int64)
            found[name] = found[name] + count.to(found[name].device) if name in found else count
    return {name: found.get(name, torch.zeros((), dtype=torch.int64)) for name in NAMES}


def _of_stack(stack: Stack, steps: list[int]) -> Iterable[tuple[str, Tensor]]:
    seen = torch.tensor([steps[block.parameter] for block in stack.blocks], dtype=stack.dtype)
    yield "skipped_gradients", (seen.to(stack.device, non_blocking=True) - stack.steps).sum()
    if not stack.key.sides:
        return
    yield "blocks", torch.tensor(len(stack.blocks))
    yield "blocks_without_root", absent(stack).sum()
    for status in stack.status.values():
        for name, value in STATUSES.items():
            yield name, (status == value).sum()
