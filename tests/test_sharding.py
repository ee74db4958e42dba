"""Who owns which block, what the collectives bring, which rows travel: functions of shapes."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import parameters

from shampoo_kernels import Shampoo
from shampoo_kernels.optim.blocks import StackKey, cut, stack_blocks
from shampoo_kernels.optim.distributed import gathering, sharding, team
from shampoo_kernels.optim.distributed.exchange import chunks, pieces, row_bounds

STACKS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 1000)), max_size=6)
SHAPES = [(40, 24), (7,), (24, 40), (17, 3, 3), (40, 24), (64, 8), (5, 1, 4), (1, 6, 5), (2, 2)]
REST = (torch.float32, torch.device("cpu"))


@given(STACKS, st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_every_block_has_one_rank_and_no_rank_much_more_to_do_than_another(stacks, loads):
    before = list(loads)
    bounds = sharding.share_out(stacks, loads)
    for (count, _), own in zip(stacks, bounds, strict=True):
        assert own[0] == 0
        assert own[-1] == count
        assert own == sorted(own)
    given_out = [
        sum((own[r + 1] - own[r]) * cost for own, (_, cost) in zip(bounds, stacks, strict=True))
        for r in range(len(loads))
    ]
    assert [b + g for b, g in zip(before, given_out, strict=True)] == loads
    # Graham 1969: the last block went to the rank that had least
    dearest = max((cost for count, cost in stacks if count), default=0)
    assert max(loads) <= max(max(before), sum(loads) / len(loads) + dearest)


def test_the_dearest_come_first():
    """In the order of the stacks one rank would get 2 + 4, the other 2."""
    loads = [0, 0]
    assert sharding.share_out([(4, 1), (1, 4)], loads) == [[0, 0, 4], [0, 1, 1]]
    assert loads == [4, 4]


def test_the_cost_of_a_block():
    both = sharding.cost(StackKey(30, 20, ("left", "right"), None))
    left, right = (sharding.cost(StackKey(30, 20, (side,), None)) for side in ("left", "right"))
    assert both == left + right
    assert left == 3 * 30 * 30 * 20 + sharding.ROOT_FLOPS * 30**3
    assert sharding.cost(StackKey(1, 20, (), None)) == 0


def blocks_of(shapes, size=8):
    cuts = [cut(shape, (2, 2), size, 8192) for shape in shapes]
    return cuts, stack_blocks(cuts, [REST] * len(cuts))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_owners_are_neighbours_in_every_stack(ranks):
    cuts, stacks = blocks_of(SHAPES)
    owners = sharding.owners(cuts, [REST] * len(cuts), [0] * ranks)
    for one, own in zip(cuts, owners, strict=True):
        assert len(own) == (len(one.pieces) if one.sides else 0)
    for key, blocks in stacks.items():
        if key.sides:
            ranks_in_order = [owners[b.parameter][b.index] for b in blocks]
            assert ranks_in_order == sorted(ranks_in_order)


def test_a_group_for_every_layer_is_shared_out_as_evenly_as_one(monkeypatch):
    """Each group goes on where those before it left off; what was given out stays."""
    ours = team.Team("a process group", 0, 4, False)
    monkeypatch.setattr(team, "team_of", lambda group: ours if group["process_group"] else None)
    options = {**Shampoo(parameters((2, 2)), block_size=8).defaults}
    groups = [
        {
            **options,
            "params": parameters((8, 8), (5,)),
            "process_group": None if i == 2 else ours,
        }
        for i in range(9)
    ]
    first = team.shares(groups[:4], {})
    every = team.shares(groups, first)
    assert [number for number in range(9) if number not in every] == [2]
    assert all(every[number] is first[number] for number in first)
    given_out = [sum(spent) for spent in zip(*(s.spent for s in every.values()), strict=True)]
    assert len(set(given_out)) == 1
    (W, b), one = groups[0]["params"], every[0]
    assert (one.owners[W], one.owners[b]) == ((0,), ())
    assert one.others(W) == set()
    assert every[1].others(groups[1]["params"][0]) == {0}


def runs_of(stacks, cuts, ranks):
    owners = sharding.owners(cuts, [REST] * len(cuts), [0] * ranks)
    return [
        (key, [[b for b in blocks if owners[b.parameter][b.index] == r] for r in range(ranks)])
        for key, blocks in stacks.items() if key.sides
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [1, 1000, 3000, 10**9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_buckets_bring_every_block_once_and_are_no_larger_than_they_may(
    monkeypatch, ranks, limit
):
    monkeypatch.setattr(gathering, "GATHER_BYTES", limit)
    cuts, stacks = blocks_of(SHAPES)
    keys, runs = zip(*runs_of(stacks, cuts, ranks), strict=True)
    result = gathering.buckets(keys, runs)
    for rank in range(ranks):
        brought = [block for bucket in result for block in bucket.blocks[rank]]
        assert brought == list(itertools.chain(*(run[rank] for run in runs)))
    for bucket in result:
        lengths = [
            sum((b.rows.stop - b.rows.start) * (b.cols.stop - b.cols.start) for b in own)
            for own in bucket.blocks
        ]
        assert lengths == bucket.lengths
        assert bucket.bytes() == max(lengths) * ranks * 4  # as all_gather leaves it, in float32
        assert bucket.bytes() <= limit or max(map(len, bucket.blocks)) == 1
    assert len(result) == 1 or limit < 10**9


@pytest.mark.parametrize(("shape", "rows"), [((10, 3), 10), ((3, 4), 3), ((1, 6, 5), 6)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_rows_are_cut_as_torch_chunk_cuts(shape, rows, ranks):
    parts = list(torch.empty(shape).chunk(ranks))
    lengths = [part.numel() * rows // torch.Size(shape).numel() for part in parts]
    lengths += [0] * (ranks - len(parts))
    assert row_bounds(shape, rows, ranks) == [0, *itertools.accumulate(lengths)]


@pytest.mark.parametrize("most", [1, 100, 150, 300, 10**9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_element_of_every_block_travels_once_and_both_ends_agree(ranks, most):
    cuts, stacks = blocks_of(SHAPES)
    bounds = [row_bounds(s, c.matrix[0], ranks) for s, c in zip(SHAPES, cuts, strict=True)]
    for key, runs in runs_of(stacks, cuts, ranks):
        own = [chunks(key, runs, bounds, rank, most) for rank in range(ranks)]
        assert len({len(one) for one in own}) == 1
        arrived = Counter()
        for together in zip(*own, strict=True):
            for owner, holder in itertools.product(range(ranks), repeat=2):
                sent = together[holder].sends[owner]
                assert sent == together[owner].receives[holder]
                for piece in sent:
                    block = together[owner].blocks[piece.place]
                    low = bounds[block.parameter][holder]
                    there = range(low + piece.there.start, low + piece.there.stop)
                    here = range(block.rows.start + piece.here.start,
                                 block.rows.start + piece.here.stop)  # fmt: skip
                    assert there == here
                    assert piece.cols == block.cols
                    arrived.update((block.parameter, block.index, row) for row in here)
        assert set(arrived.values()) == {1}
        assert len(arrived) == sum(len(run) for run in runs) * key.m
        sizes = [
            sum(p.numel() for pieces in way for p in pieces)
            for one in own for chunk in one for way in (chunk.sends, chunk.receives)
        ]  # fmt: skip
        assert max(sizes) <= most or max(len(c.blocks) for one in own for c in one) == 1


def test_pieces_of_rows_that_a_rank_does_not_have_are_none():
    _, stacks = blocks_of([(8, 8)])
    (blocks,) = stacks.values()
    assert pieces(blocks, [[0, 8, 8]], 1) == []


class Work:
    """A collective of one rank, that is over when waited for."""

    def __init__(self, events, everyone, own):
        self.events, self.everyone, self.own = events, everyone, own
        events.append("started")

    def wait(self):
        self.everyone.copy_(self.own)
        self.events.append("ended")


def test_collectives_run_while_the_next_stacks_are_worked_on(monkeypatch):
    """Each starts when its stack is done, the last ends after everything; two at most are open."""
    events = []
    monkeypatch.setattr(gathering, "GATHER_BYTES", 1)
    monkeypatch.setattr(
        gathering, "all_gather", lambda everyone, own, group: Work(events, everyone, own)
    )
    shapes = [(4, 4), (8, 4), (6, 4), (8, 2)]
    cuts, stacks = blocks_of(shapes)
    keys, runs = zip(*runs_of(stacks, cuts, 1), strict=True)
    weights = [torch.ones(shape) for shape in shapes]
    gather = gathering.Gather(
        gathering.buckets(keys, runs), weights, team.Team(None, rank=0, size=1, sharded=False)
    )
    for number, key in enumerate(keys):
        events.append(f"stack {number}")
        gather.ready(key)
    events.append("moments")
    gather.finish()
    assert events == [
        "stack 0", "started", "stack 1", "started", "stack 2", "ended", "started",
        "stack 3", "ended", "started", "moments", "ended", "ended",
    ]  # fmt: skip
