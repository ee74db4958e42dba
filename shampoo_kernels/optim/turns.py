"""Whose turn it is: which blocks have their roots or bases computed anew in a step."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from shampoo_kernels.optim.stacks import Stack

REFRESHES = ("staggered", "level", "together")


def place_(stacks: Sequence[Sequence[Stack]], groups: Sequence[dict]) -> None:
    """Give every stack the place of its first block, which turns go by.

    That is its number among all blocks with a factor, so that as many are due in every step. With
    refresh="level" it makes the costliest step cheapest: costly stacks come first within a group,
    groups one after the other; a block costs m³ + n³.
    """
    position, load = 0, dict[int, list[int]]()
    for own, group in zip(stacks, groups, strict=True):
        for stack in own:
            stack.place = position + stack.first
            position += stack.total if stack.key.sides else 0
        if group["refresh"] == "level":
            slots = load.setdefault(group["refresh_every"], [0] * group["refresh_every"])
            for stack in sorted(own, key=_cost, reverse=True):
                stack.place = _level(stack, slots) + stack.first


def _cost(stack: Stack) -> int:
    """Of one block: both the iterations and eigh take a multiple of d³."""
    return sum(stack.dimension(side) ** 3 for side in stack.key.sides)


def _level(stack: Stack, slots: list[int]) -> int:
    """The place of `stack`, all ranks' blocks, which are then added to the load of every slot."""
    every, cost, count = len(slots), _cost(stack), stack.total
    rest = count % every

    def costliest(place: int) -> int:
        return max((slots[(place + i) % every] for i in range(rest)), default=0)

    place = min(range(every), key=lambda at: (costliest(at), at))
    for slot in range(every):
        slots[slot] += cost * (count // every)
    for i in range(rest):
        slots[(place + i) % every] += cost
    return place


def due(
    part: Stack, steps: Sequence[int], group: dict, place: int
) -> tuple[Sequence[int], set[int]]:
    """(the blocks of `part` to refresh in this step, those among them for the first time).

    A block at place i, the first one of `part` at `place`, takes its turn when the gradients seen
    by its parameter leave the same rest as i; places (see `place_`), and with them turns, move when
    a parameter with earlier blocks joins. Out of turn comes a block without root: on a CPU when it
    has a statistic to compute it from, on other devices, where looking would mean waiting, when its
    parameter starts. "kl" needs roots for the statistics, from the start.
    """
    every, count = group["refresh_every"], len(part.blocks)
    start = 1 if group["statistic"] == "kl" else group["start_step"]
    if not part.key.sides or max(steps[i] for i in part.parameters) < start:
        return (), set()
    own = [steps[block.parameter] for block in part.blocks]
    if part.device.type == "cpu":
        late = {i for i in waiting(part) if own[i] >= start}
    else:
        late = {i for i in range(count) if own[i] == start}
    if len(late) == count:
        return range(count), late
    return _in_turn(
        own, late, start, every, None if group["refresh"] == "together" else place
    ), late


def _in_turn(
    own: Sequence[int], late: Iterable[int], start: int, every: int, place: int | None
) -> Sequence[int]:
    """Whose turn it is at `own` steps, and the late ones; without a place all come at once."""
    count = len(own)
    if len(set(own)) == 1 and not late:
        if place is None:
            return range(0 if own[0] % every else count)
        return range((own[0] - place) % every, count, every)
    places = [0] * count if place is None else range(place, place + count)
    turns = (own[i] >= start and (own[i] - places[i]) % every == 0 for i in range(count))
    return [i for i, turn in enumerate(turns) if turn or i in late]


def absent(stack: Stack) -> Tensor:
    """(B,) bool: the blocks that have no root or basis yet."""
    side = stack.key.sides[0]
    values = stack.extra.get(f"{side}_values")
    return stack.root[side][:, 0, 0] == 0 if values is None else values.amax(-1) == 0


def waiting(stack: Stack) -> list[int]:
    """The blocks that have no root yet, but a statistic to compute it from; synchronises.

    Nobody looks again once all have one, which they keep.
    """
    if stack.complete:
        return []
    rootless = absent(stack).nonzero().flatten()
    stack.complete = not len(rootless)
    if not stack.complete:
        trace = stack.statistic[stack.key.sides[0]].diagonal(dim1=-2, dim2=-1).sum(-1)
        rootless = rootless[trace[rootless] > 0]
    return rootless.tolist()
