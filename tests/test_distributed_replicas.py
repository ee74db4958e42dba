"""Many processes that hold the same parameters, as under DistributedDataParallel."""

import copy
import math

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import gradients, parameters, train

from shampoo_kernels import Shampoo

pytestmark = ranks.pytestmark

SHAPES = [(8, 6), (5,), (8, 6), (4, 3, 2, 2), (6, 8), (20, 6), (20, 6), (1, 9), (), (16, 16)]
OPTIONS = {"lr": 0.01, "block_size": 8, "refresh_every": 3}


def trained(process_group, dtype=torch.float64, nudge=False, bad=None, **options):
    """(parameters after 20 steps, the state) on the same gradients everywhere.

    `nudge` changes every gradient by one unit in the last place; `bad` is (parameter, gradient)
    that takes the place of the one in step 5.
    """
    own = parameters(*SHAPES, dtype=dtype)
    optimizer = Shampoo(own, process_group=process_group, **OPTIONS, **options)
    pairs = []
    for i, p in enumerate(own):
        grads = list(gradients(p.shape, 20, dtype, seed=i))
        if nudge:
            grads = [torch.nextafter(g, torch.full_like(g, math.inf)) for g in grads]
        if bad and bad[0] == i:
            grads[5] = bad[1]
        pairs.append((p, grads))
    train(optimizer, pairs)
    return [p.detach() for p in own], [optimizer.state[p] for p in own]


def statistics(states):
    """Bytes of statistics and roots."""
    return sum(
        value.numel() * value.itemsize
        for state in states for name, value in state.items() if name.startswith(("left", "right"))
    )  # fmt: skip


def divergence(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def in_all_ways(rank):
    world = dist.group.WORLD
    bad = torch.zeros(20, 6)
    bad[13, 2] = math.nan
    channels_last = parameters((4, 6, 3, 3), (7, 8))
    channels_last[0].data = channels_last[0].data.to(memory_format=torch.channels_last)
    optimizer = Shampoo(channels_last, block_size=5, process_group=world)
    train(optimizer, [(p, gradients(p.shape, 4, torch.float32)) for p in channels_last])
    return {
        "float64": trained(world)[0],
        "float32": trained(world, torch.float32),
        "bfloat16": trained(world, torch.bfloat16)[0],
        "nan": trained(world, torch.float32, bad=(5, bad if rank == 0 else bad.nan_to_num()))[0],
        "nan everywhere": trained(world, torch.float32, bad=(5, bad))[0],
        "channels_last": [p.detach() for p in channels_last],
    }


@pytest.fixture(scope="module", params=[2, 3, 4])
def results(request):
    return ranks.run(request.param, in_all_ways)


def test_twenty_steps_agree_with_one_process(results):
    alone = trained(None)[0]
    for result in results:
        assert divergence(result["float64"], alone) <= 1e-9


def test_twenty_steps_in_float32_agree_with_one_process(results):
    alone = trained(None, torch.float32)[0]
    tolerance = 5 * divergence(trained(None, torch.float32, nudge=True)[0], alone)
    for result in results:
        assert divergence(result["float32"][0], alone) <= tolerance


@pytest.mark.parametrize("run", ["float64", "bfloat16", "nan", "nan everywhere", "channels_last"])
def test_replicas_are_equal_to_the_bit(results, run):
    for result in results[1:]:
        assert all(map(torch.equal, result[run], results[0][run]))
    assert all(p.isfinite().all() for p in results[0][run])


def test_parameters_that_are_no_matrix_in_memory_are_gathered_too(results):
    alone = parameters((4, 6, 3, 3), (7, 8))
    train(
        Shampoo(alone, block_size=5), [(p, gradients(p.shape, 4, torch.float32)) for p in alone]
    )  # fmt: skip
    for p, q in zip(results[0]["channels_last"], alone, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-4, atol=1e-5)


def test_a_block_that_is_not_finite_stands_still_alone(results):
    """The same on every rank, it is the run of one process with that gradient."""
    bad = torch.zeros(20, 6)
    bad[13, 2] = math.nan
    alone = trained(None, torch.float32, bad=(5, bad))[0]
    nudged = trained(None, torch.float32, bad=(5, bad), nudge=True)[0]
    for result in results:
        assert divergence(result["nan everywhere"], alone) <= 5 * divergence(alone, nudged)


def test_statistics_and_roots_are_with_their_owner_alone(results):
    """Together they are those of one process, none twice, and no rank has much more than its part:

    here at most one block of the largest stack, in bytes.
    """
    whole = statistics(trained(None, torch.float32)[1])
    own = [statistics(result["float32"][1]) for result in results]
    assert sum(own) == whole
    assert max(own) <= whole / len(results) + 4 * 8 * 8 * 4
    for states in zip(*(result["float32"][1] for result in results), strict=True):
        names = [name for state in states for name in state if name.startswith(("left", "right"))]
        assert len(names) == len(set(names))
        assert all({"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states)


def test_moments_are_the_same_everywhere_up_to_rounding(results):
    for states in zip(*(result["float32"][1] for result in results), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            for state in states[1:]:
                torch.testing.assert_close(state[name], states[0][name], rtol=1e-6, atol=1e-7)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(12, 20), nn.Linear(20, 4), nn.Linear(3, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batches(steps):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, 12, 12, generator=generator, dtype=torch.float64)


def data_parallel(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(Net().double(), find_unused_parameters=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "block_size": 8}, {"params": rest, "precondition": False}]
    optimizer = Shampoo(groups, lr=0.01, process_group=dist.group.WORLD)
    part = 12 // dist.get_world_size()
    for batch in batches(10):
        optimizer.zero_grad()
        model(batch[rank * part : (rank + 1) * part]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_distributed_data_parallel_with_an_unused_layer():
    torch.manual_seed(0)
    model = Net().double()
    optimizer = Shampoo(model.parameters(), lr=0.01, block_size=8)
    for batch in batches(10):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    for world in (2, 3):
        results = ranks.run(world, data_parallel)
        for result in results:
            assert divergence(result, [p.detach() for p in model.parameters()]) <= 1e-9
            assert all(map(torch.equal, result, results[0]))


def a_missing_gradient(rank):
    """Rank 1 has none for W in every other step, from the first on."""
    W, V = parameters((16, 16), (16, 16))
    optimizer = Shampoo([W, V], process_group=dist.group.WORLD, **OPTIONS)
    grads = gradients((16, 16), 6, torch.float32)
    own = [None if rank == 1 and step % 2 == 0 else g for step, g in enumerate(grads)]
    train(optimizer, [(W, own), (V, grads)])
    return [W.detach(), V.detach()]


def test_a_gradient_that_one_rank_lacks_leaves_the_replicas_equal():
    results = ranks.run(2, a_missing_gradient, seconds=60)
    assert all(map(torch.equal, *results))
    alone = parameters((16, 16), (16, 16))
    optimizer = Shampoo(alone, **OPTIONS)
    train(optimizer, [(p, gradients((16, 16), 6, torch.float32)) for p in alone])
    torch.testing.assert_close(results[0][1], alone[1].detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0][0], parameters((16, 16))[0])


DIFFERENT = {
    "shapes": lambda rank: [{"params": parameters((8, 4 + rank))}],
    "options": lambda rank: [{"params": parameters((8, 4)), "block_size": 8 - rank}],
    "dtypes": lambda rank: [
        {"params": parameters((8, 4), dtype=(torch.float32, torch.float64)[rank])}
    ],
    "parameters to train": lambda rank: [{"params": parameters(*[(8, 4)] * (1 + rank))}],
    "param groups": lambda rank: [{"params": [p]} for p in parameters(*[(8, 4)] * (1 + rank))],
}


def with_different_groups(rank):
    messages = {}
    for name, groups in DIFFERENT.items():
        optimizer = Shampoo(groups(rank), process_group=dist.group.WORLD)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        try:
            optimizer.step()
        except RuntimeError as error:
            messages[name] = str(error)
        after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        assert all(map(torch.equal, before, after))
    return messages


def test_groups_that_differ_between_ranks_are_refused_on_every_rank():
    for messages in ranks.run(2, with_different_groups, seconds=60):
        for name in DIFFERENT:
            assert "rank 1 has" in messages[name]
            assert name in messages[name].split("rank 1 has")[1]


def subgroups(rank):
    """Two pairs that each share the work among themselves, as nodes of a cluster would."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.raises(ValueError, match="process_group must be None or a "):
        Shampoo(parameters((8, 6)), process_group=pairs[1 - rank // 2])
    weights, states = trained(pairs[rank // 2])
    return weights, statistics(states)


def test_subgroups_share_the_work_among_themselves():
    results = ranks.run(4, subgroups)
    alone, states = trained(None)
    for weights, _ in results:
        assert divergence(weights, alone) <= 1e-9
        assert all(map(torch.equal, weights, results[0][0]))
    assert results[0][1] + results[1][1] == results[2][1] + results[3][1] == statistics(states)


def a_group_that_comes_late(rank):
    W, V = parameters((16, 16), (16, 16), dtype=torch.float64)
    optimizer = Shampoo([W], process_group=dist.group.WORLD, **OPTIONS)
    grads = gradients((16, 16), 8)
    train(optimizer, [(W, grads[:4])])
    owned = [name for name in optimizer.state[W] if name.startswith("left.")]
    optimizer.add_param_group({"params": [V]})
    train(optimizer, [(W, grads[4:]), (V, grads[4:])])
    assert owned == [name for name in optimizer.state[W] if name.startswith("left.")]
    return [W.detach(), V.detach()]


def test_a_group_that_comes_late_moves_no_state():
    W, V = parameters((16, 16), (16, 16), dtype=torch.float64)
    optimizer = Shampoo([W], **OPTIONS)
    grads = gradients((16, 16), 8)
    train(optimizer, [(W, grads[:4])])
    optimizer.add_param_group({"params": [V]})
    train(optimizer, [(W, grads[4:]), (V, grads[4:])])
    for result in ranks.run(3, a_group_that_comes_late):
        assert divergence(result, [W.detach(), V.detach()]) <= 1e-9


def state_of_one_rank_replaced(rank):
    """As recipes do that offload it; the other ranks see nothing of it, and are asked nothing."""
    own = parameters((16, 16), (5,))
    optimizer = Shampoo(own, process_group=dist.group.WORLD, **OPTIONS)
    pairs = [(p, gradients(p.shape, 3, torch.float32)) for p in own]
    train(optimizer, pairs)
    if rank == 1:
        for state in optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items()})
    train(optimizer, pairs)
    return [p.detach() for p in own]


def test_state_that_one_rank_replaces_keeps_no_other_waiting():
    alone = parameters((16, 16), (5,))
    train(Shampoo(alone, **OPTIONS), [(p, gradients(p.shape, 3, torch.float32) * 2) for p in alone])
    results = ranks.run(2, state_of_one_rank_replaced, seconds=60)
    assert all(map(torch.equal, *results))
    for a, b in zip(results[0], alone, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


def one_that_leaves(rank):
    """Rank 1 raises before it sends anything, and its process ends."""
    own = parameters((16, 16))
    optimizer = Shampoo(own, process_group=dist.group.WORLD, **OPTIONS)
    train(optimizer, [(own[0], gradients((16, 16), 2, torch.float32))])
    if rank == 1:
        own[0].grad = torch.ones(16, 16).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        return
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert "imed out" not in str(raised.value)


def test_nobody_waits_for_a_rank_that_has_left():
    ranks.run(2, one_that_leaves, seconds=60)


def copied(rank):
    """A copy works alone: process groups cannot be copied. With the group again it goes on."""
    own = parameters((16, 16), dtype=torch.float64)
    optimizer = Shampoo(own, process_group=dist.group.WORLD, **OPTIONS)
    grads = gradients((16, 16), 6)
    train(optimizer, [(own[0], grads[:3])])
    net, twin = copy.deepcopy((own, optimizer))
    with pytest.raises(ValueError, match="got absent"):
        train(twin, [(net[0], grads[3:4])])
    twin.param_groups[0]["process_group"] = dist.group.WORLD
    train(twin, [(net[0], grads[3:])])
    train(optimizer, [(own[0], grads[3:])])
    return (net[0] - own[0]).abs().max().item()


def test_a_copy_goes_on_when_it_is_given_the_process_group_again():
    assert max(ranks.run(2, copied)) <= 1e-9
