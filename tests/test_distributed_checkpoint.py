"""Checkpoints by torch.distributed.checkpoint: written by some ranks, read by another number."""

import io
import itertools
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from shampoo_kernels import Shampoo

pytestmark = ranks.pytestmark

OPTIONS = {"lr": 0.01, "block_size": 8, "refresh_every": 3}
BATCH = 12
KINDS = ("replicas", "shards", "alone")


def make(kind):
    """(model, optimizer): on all ranks of the default group, or of one process."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.LayerNorm(21), nn.Linear(21, 4)).double()
    group = None
    if kind == "shards":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif kind == "replicas":
        net, group = DistributedDataParallel(net), dist.group.WORLD
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return net, Shampoo(groups, process_group=group, **OPTIONS)


def train(net, optimizer, first, last, kind):
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(last, BATCH, 12, generator=generator, dtype=torch.float64)
    part = slice(None)
    if kind != "alone":
        size = BATCH // dist.get_world_size()
        part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    for batch in data[first:]:
        optimizer.zero_grad()
        net(batch[part]).square().mean().backward()
        optimizer.step()


def weights(net):
    return [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
            for p in net.parameters()]  # fmt: skip


def write(rank, kind, folder):
    net, optimizer = make(kind)
    train(net, optimizer, 0, 7, kind)
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def resume(rank, kind, folder):
    net, optimizer = make(kind)
    model, state = get_state_dict(net, optimizer)
    both = {"model": model, "optimizer": state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(
        net, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
    )  # fmt: skip
    train(net, optimizer, 7, 14, kind)
    return weights(net)


@pytest.fixture(scope="module")
def uninterrupted():
    net, optimizer = make("alone")
    train(net, optimizer, 0, 14, "alone")
    return weights(net)


@pytest.mark.parametrize("writer", KINDS[:2])
def test_what_four_ranks_wrote_goes_on_with_two_and_with_one(writer, tmp_path, uninterrupted):
    folder = str(tmp_path / "checkpoint")
    ranks.run(4, write, writer, folder)
    for world, reader in ((2, "replicas"), (2, "shards"), (1, "alone")):
        for result in ranks.run(world, resume, reader, folder):
            for ours, theirs in zip(result, uninterrupted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_what_one_process_wrote_goes_on_with_three(tmp_path, uninterrupted):
    folder = str(tmp_path / "checkpoint")
    ranks.run(1, write, "alone", folder)
    for reader in KINDS[:2]:
        for result in ranks.run(3, resume, reader, folder):
            for ours, theirs in zip(result, uninterrupted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def own_state_dicts(rank, kind):
    """state_dict() and load_state_dict() on the same ranks, by a file per rank."""
    net, optimizer = make(kind)
    train(net, optimizer, 0, 7, kind)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=kind == "replicas")
    assert all(group["process_group"] is None for group in saved["param_groups"])
    other, resumed = make(kind)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved)
    train(net, optimizer, 7, 12, kind)
    train(other, resumed, 7, 12, kind)
    apart = max(
        (a - b).abs().max().item() for a, b in zip(weights(net), weights(other), strict=True)
    )
    return apart, saved if kind != "shards" else None


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_state_dict_of_its_own_resumes_every_rank(kind):
    assert all(apart <= 1e-9 for apart, _ in ranks.run(3, own_state_dicts, kind))


def from_the_whole(rank, saved):
    """A state dict of one process: every rank takes its own blocks and drops the others."""
    net, optimizer = make("replicas")
    optimizer.load_state_dict(saved)
    train(net, optimizer, 7, 8, "replicas")
    return [name for state in optimizer.state.values() for name in state]


def test_state_dicts_of_other_numbers_of_ranks():
    net, optimizer = make("alone")
    train(net, optimizer, 0, 7, "alone")
    saved = optimizer.state_dict()
    names = [name for state in saved["state"].values() for name in state]
    blocks = [name for name in names if name.startswith(("left", "right"))]
    found = ranks.run(2, from_the_whole, saved)
    assert all(len(names) > len(own) for own in found)
    kept = [name for name in itertools.chain(*found) if name.startswith(("left", "right"))]
    assert sorted(kept) == sorted(blocks)
    parts = [part for _, part in ranks.run(2, own_state_dicts, "replicas")]
    for part in parts:
        with pytest.raises(ValueError, match=r"must be a floating tensor .*, got absent"):
            optimizer.load_state_dict(part)


def with_blocks_of_another_rank(rank):
    net, optimizer = make("replicas")
    train(net, optimizer, 0, 2, "replicas")
    everyone = [None, None]
    dist.all_gather_object(everyone, optimizer.state_dict())
    optimizer.load_state_dict(everyone[1 - rank])
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint"):
        train(net, optimizer, 2, 3, "replicas")


def test_the_state_dict_of_another_rank_is_refused_with_a_hint():
    ranks.run(2, with_blocks_of_another_rank, seconds=60)


def warned_of(call):
    """Its result, and how often it was warned that this is not the whole state."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    ours = [str(one.message) for one in caught if str(one.message).startswith("Shampoo: ")]
    assert all("torch.distributed.checkpoint.save" in message for message in ours)
    return result, len(ours)


def parts_taken_for_the_whole(rank, kind):
    """{what is done: how many warnings}."""
    net, optimizer = make(kind)
    _, unstarted = warned_of(optimizer.state_dict)
    train(net, optimizer, 0, 5, kind)
    saved, found = {}, {"before a step": unstarted}
    saved["own"], found["saved, each its own"] = warned_of(optimizer.state_dict)
    _, found["saved by the checkpoint"] = warned_of(lambda: get_state_dict(net, optimizer))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved["full"] = get_optimizer_state_dict(net, optimizer, options=full)
    other, resumed = make(kind)
    _, found["loaded, each its own"] = warned_of(lambda: resumed.load_state_dict(saved["own"]))
    other, resumed = make(kind)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    _, found["loaded, that of rank 0"] = warned_of(
        lambda: set_optimizer_state_dict(other, resumed, saved["full"], options=full)
    )
    return found


@pytest.mark.parametrize("kind", KINDS[:2])
def test_who_saves_or_loads_a_part_of_the_state_is_told(kind):
    """Rank 0 when it saves what might be all there will be, the others when theirs is not there."""
    first, *rest = ranks.run(2, parts_taken_for_the_whole, kind, seconds=60)
    told = dict.fromkeys(first, 0)
    assert first == {**told, "saved, each its own": 1}
    assert rest == [{**told, "loaded, that of rank 0": 1}]
