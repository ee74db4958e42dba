"""How work, memory and traffic spread over 8 to 1024 ranks, on the shapes of real models.

    python bench/sharding.py > bench/results/sharding.md

Nothing is timed and nothing allocated: all numbers follow from the shapes alone, by the functions
that the optimizer itself uses.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shampoo_kernels.optim import stacks
from shampoo_kernels.optim.blocks import LEFT, Block, Cut, StackKey, cut, stack_blocks
from shampoo_kernels.optim.distributed import gathering
from shampoo_kernels.optim.distributed.exchange import chunks, row_bounds
from shampoo_kernels.optim.distributed.sharding import cost, owners

RANKS = (8, 32, 128, 256, 512, 1024)
BLOCK_SIZE, MAX_DIMENSION = 1024, 8192  # the defaults
REST = (torch.bfloat16, torch.device("cpu"))
WEIGHT, STATE = 2, 4  # bytes: bfloat16 parameters and gradients, float32 state

Shapes = list[tuple[int, ...]]


def gpt2() -> Shapes:
    """124M: 12 layers; embeddings and the head, which is the same, run AdamW here and below."""
    return [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12


def llama(layers: int, width: int, heads: int, inner: int) -> Shapes:
    """Llama 3; `heads` is the width of keys and values."""
    attention = [(width, width), (heads, width), (heads, width), (width, width)]
    return [*attention, (inner, width), (inner, width), (width, inner)] * layers


def vit() -> Shapes:
    """ViT-B/16 with its patch embedding; the head runs AdamW."""
    return [(768, 3, 16, 16), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]


def resnet50() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7)]
    wide = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(count):
            shapes += [(width, wide, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, wide, 1, 1)] if number == 0 else []
            wide = 4 * width
    return [*shapes, (1000, 2048)]


MODELS = {
    "ResNet-50": resnet50(),
    "ViT-B/16": vit(),
    "GPT-2 124M": gpt2(),
    "Llama 3.2 1B": llama(16, 2048, 512, 8192),
    "Llama 3 8B": llama(32, 4096, 1024, 14336),
    "Llama 3 70B": llama(80, 8192, 1024, 28672),
}


@dataclass
class Spread:
    """One model on so many ranks."""

    shapes: Shapes
    cuts: list[Cut]
    keys: list[StackKey]
    runs: list[list[list[Block]]]  # by stack and rank
    ranks: int

    def by_rank(self, of_each) -> list[int]:
        """The sum of of_each(key) over the blocks of every rank."""
        totals = [0] * self.ranks
        for key, runs in zip(self.keys, self.runs, strict=True):
            for rank, run in enumerate(runs):
                totals[rank] += len(run) * of_each(key)
        return totals


def spread(shapes: Shapes, ranks: int) -> Spread:
    cuts = [cut(shape, (2, 2), BLOCK_SIZE, MAX_DIMENSION) for shape in shapes]
    every = {
        key: blocks
        for key, blocks in stack_blocks(cuts, [REST] * len(cuts)).items() if key.sides
    }  # fmt: skip
    own = owners(cuts, [REST] * len(cuts), [0] * ranks)
    runs = []
    for blocks in every.values():
        by_rank: list[list[Block]] = [[] for _ in range(ranks)]
        for block in blocks:
            by_rank[own[block.parameter][block.index]].append(block)
        runs.append(by_rank)
    return Spread(shapes, cuts, list(every), runs, ranks)


def state_bytes(key: StackKey) -> int:
    """Statistic and root of one block."""
    return sum(2 * STATE * (key.m if side == LEFT else key.n) ** 2 for side in key.sides)


def gathered(one: Spread) -> tuple[int, int]:
    """(bytes that every rank receives, collectives): of a step of replicas."""
    plan = gathering.buckets(one.keys, one.runs)
    return sum(bucket.bytes() for bucket in plan) * (one.ranks - 1) // one.ranks, len(plan)


def travelled(one: Spread) -> tuple[float, float, int]:
    """(mean and largest number of bytes that a rank sends, chunks): of a step of shards."""
    bounds = [
        row_bounds(shape, own.matrix[0], one.ranks)
        for shape, own in zip(one.shapes, one.cuts, strict=True)
    ]
    sent, count = [0] * one.ranks, 0
    for key, runs in zip(one.keys, one.runs, strict=True):
        most = stacks.PART_BYTES // (4 * STATE)
        count += len(chunks(key, runs, bounds, 0, most))
        for owner, block in ((rank, block) for rank, run in enumerate(runs) for block in run):
            for holder, elements in pieces_of(block, bounds[block.parameter]):
                if holder != owner:
                    sent[holder] += elements * (2 * WEIGHT + 2 * STATE)
                    sent[owner] += elements * (WEIGHT + 2 * STATE)
    return sum(sent) / one.ranks, max(sent), count


def pieces_of(block: Block, bounds: list[int]) -> Iterator[tuple[int, int]]:
    for rank, (low, high) in enumerate(itertools.pairwise(bounds)):
        rows = min(high, block.rows.stop) - max(low, block.rows.start)
        if rows > 0:
            yield rank, rows * (block.cols.stop - block.cols.start)


def row(name: str, shapes: Shapes, ranks: int) -> list[str]:
    one = spread(shapes, ranks)
    work, state = one.by_rank(cost), one.by_rank(state_bytes)
    weights = sum(len(b) * k.m * k.n * WEIGHT for k, r in zip(one.keys, one.runs, strict=True)
                  for b in r)  # fmt: skip
    received, collectives = gathered(one)
    mean, largest, count = travelled(one)
    return [
        name,
        str(ranks),
        f"{sum(len(run) for runs in one.runs for run in runs):,}",
        f"{sum(work) / max(work):.0f}",
        f"{max(work) * ranks / sum(work):.2f}",
        size(max(state)),
        f"{max(state) * ranks / sum(state):.2f}",
        size(received),
        f"{received / (weights * (ranks - 1) / ranks):.2f}",
        str(collectives),
        size(mean),
        f"{mean / (3 * weights * (ranks - 1) / ranks):.3f}",
        f"{largest / mean:.2f}",
        str(count),
    ]


def size(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"


HEADER = """# Many processes, from the shapes

Written by `python bench/sharding.py`: numbers of the sharing itself, on no machine. Blocks of at
most 1024, bfloat16 weights and gradients, float32 state, sizes in MiB. A number like 1.07 says how
much more the rank with the most has than the mean.

- Work: flops of Gram matrices, preconditioning and refreshes (`sharding.cost`). "times faster" is
  all work over that of the busiest rank: what sharing can win at best.
- State: statistics and roots. The moments are not in it.
- Replicas: new weights that every rank receives per step; the padding in it; collectives.
  Where there are more ranks than blocks most of it is padding: share the work in smaller groups.
- Shards: bytes that a rank sends per step, pieces to owners and back; the same as a part of what
  FSDP itself sends for these weights (three times their bytes); chunks, of which each takes four
  all-to-alls with bfloat16 parameters, two with float32.

| model | ranks | blocks | times faster | work, most | state of the rank with most | most | \
replicas: received | padded | collectives | shards: sent | of FSDP's | most | chunks |
| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |"""


def main() -> None:
    print(HEADER)
    for name, shapes in MODELS.items():
        for ranks in RANKS:
            print("| " + " | ".join(row(name, shapes, ranks)) + " |", flush=True)


if __name__ == "__main__":
    main()
