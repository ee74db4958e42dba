"""Distributed Shampoo on several processes: with every distributed config of the peer's, each rank
ends with the kernels where it ends alone."""

import itertools
import math
from typing import NamedTuple
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from meta_shampoo import CORRECTED, FULL_RANK, KL, QR, lists, maker, peer, switched
from peers import STEPS, structure
from torch import nn
from torch.nn import functional as F

from shampoo_kernels.integrations import _distributed_shampoo_config as configs

pytestmark = ranks.pytestmark

CPU = torch.device("cpu")
EXACT = {"communication_dtype": torch.float64}


def mlp():
    """Vectors and matrices, of which the cut into two shards goes through blocks."""
    return nn.Sequential(
        nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 20)
    )


def equal():
    """Every parameter of one size, for the peer's ROUND_ROBIN, which gives every rank whole ones by
    an all-to-all: with others gloo says "ProcessGroupGloo::alltoall: invalid tensor size"."""
    sizes = (20, 40, 20, 40, 20)
    layers = (nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes))
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


def mesh_of(*shape):
    """The peer's hybrid variants allocate by these names, whatever a mesh calls its own."""
    names = ("replicate", "shard")[-len(shape) :]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def replicated(model, options):
    return model, peer.DDPDistributedConfig(**EXACT | options)


def flat_sharded(model, options, mesh=None):
    """By FSDP 1, which without device_id "needs a non-CPU accelerator device". (Its HYBRID_SHARD of
    one shard is NO_SHARD, which the peer refuses: "Input tensor is not flat".)"""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    strategy = ShardingStrategy.HYBRID_SHARD if mesh else ShardingStrategy.FULL_SHARD
    wrapped = FullyShardedDataParallel(
        model, device_mesh=mesh, sharding_strategy=strategy, use_orig_params=True, device_id=CPU
    )
    metadata = {"param_to_metadata": peer.compile_fsdp_parameter_metadata(wrapped)}
    if mesh is None:
        return wrapped, peer.FSDPDistributedConfig(**metadata, **options)
    return wrapped, peer.HSDPDistributedConfig(device_mesh=mesh, **metadata, **EXACT | options)


def flat_hybrid(model, options):
    return flat_sharded(model, options, mesh_of(2, 2))


def sharded(model, options):
    """By fully_shard."""
    from torch.distributed.fsdp import fully_shard

    config = peer.FullyShardDistributedConfig(**strategy(options))
    return fully_shard(model, mesh=mesh_of(2)), config


def hybrid(model, options):
    from distributed_shampoo.distributor.shampoo_dist_utils import (
        create_hybrid_shard_process_groups,
    )
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, 2)
    # The peer's lossless strategies make only their own rank's group, all under one name in the
    # store, by which gloo connects the wrong ones and waits for ever (NCCL connects later). Made
    # for all ranks beforehand they come from the peer's cache, as in its DEFAULT strategy.
    create_hybrid_shard_process_groups(mesh, 2)
    config = peer.HybridShardDistributedConfig(device_mesh=mesh, **EXACT, **strategy(options))
    return fully_shard(model, mesh=mesh), config


def strategy(options):
    name = options.get("param_assignment_strategy", "DEFAULT")
    return options | {"param_assignment_strategy": peer.FSDPParamAssignmentStrategy[name]}


class Run(NamedTuple):
    """What one rank has of a run."""

    start: torch.Tensor
    end: torch.Tensor
    state: object
    blocks: int
    calls: int  # of `inverse_root`
    single: int  # roots by the peer


def local(model):
    """All that this rank holds, as one vector."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in parts])


def train(enabled, wrap, model, options, optimizer, spoil=None, steps=STEPS):
    torch.manual_seed(0)
    wrapped, config = wrap(model().double(), options)
    generator = torch.Generator().manual_seed(1)
    counted = mock.patch.object(configs, "inverse_root", wraps=configs.inverse_root)
    single = mock.patch.object(lists, "matrix_inverse_root", wraps=lists.matrix_inverse_root)
    with switched(enabled), single as singles, counted as calls:
        made = maker(distributed_config=config, **optimizer)(wrapped.parameters())
        start = local(wrapped).clone()
        for step in range(steps):
            x = torch.randn(64, 20, generator=generator, dtype=torch.float64)
            y = torch.randint(20, (64,), generator=generator)
            made.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            if spoil is not None:
                spoil(step, wrapped)
            made.step()
        blocks = len(made._per_group_state_lists[0]["distributor"].local_blocked_params)
        return Run(
            start, local(wrapped), structure(made.state_dict()["state"]), blocks, calls.call_count,
            singles.call_count,
        )  # fmt: skip


def local_grad(p):
    return p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad


def both(rank, *args):
    """(how far apart relative to the way, states alike, (blocks, calls, single) off and on)."""
    off, on = (train(enabled, *args) for enabled in (False, True))
    assert torch.equal(off.start, on.start)
    moved = (off.end - off.start).norm()
    assert moved > 1e-4 * off.start.norm(), "nothing was trained"
    return float((on.end - off.end).norm() / moved), off.state == on.state, off[3:], on[3:]


def name(value):
    if callable(value):
        return value.__name__
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


ROUND_ROBIN, REPLICATE = ({"param_assignment_strategy": s} for s in ("ROUND_ROBIN", "REPLICATE"))
VARIANTS = [
    (1, replicated, mlp, {}),
    (2, replicated, mlp, {}),
    (2, replicated, mlp, {"communicate_params": True}),
    (2, replicated, mlp, {"num_trainers_per_group": 1}),
    (2, flat_sharded, mlp, {}),
    (2, sharded, mlp, {}),
    (2, sharded, mlp, REPLICATE),
    (2, sharded, equal, ROUND_ROBIN),
    (2, sharded, equal, ROUND_ROBIN | {"num_sub_groups": 2}),
    (4, flat_hybrid, mlp, {}),
    (4, hybrid, mlp, {}),
    (4, hybrid, mlp, REPLICATE),
    (4, hybrid, equal, ROUND_ROBIN),
]


@pytest.mark.parametrize(("world", "wrap", "model", "options"), VARIANTS, ids=name)
def test_every_rank_agrees(world, wrap, model, options):
    for apart, same_state, off, on in ranks.run(world, both, wrap, model, options, {}):
        assert apart <= 1e-9
        assert same_state
        (blocks, calls, single), (also, on_kernels, left) = off, on
        assert blocks == also > 0
        assert (calls, left) == (0, 0)
        assert single >= on_kernels > 0


@pytest.mark.parametrize(
    "optimizer",
    [{"kind": KL}, {"kind": CORRECTED, "config": QR} | FULL_RANK],
    ids=["kl", "corrected"],
)
@pytest.mark.parametrize("wrap", [replicated, sharded], ids=name)
def test_other_preconditioners_agree_on_every_rank(wrap, optimizer):
    for apart, same_state, *_ in ranks.run(2, both, wrap, mlp, {}, optimizer):
        assert apart <= 1e-9
        assert same_state


def first_row(step, model):
    """NaN in what rank 0 has of the first weight, the others are fine."""
    if step == 5 and dist.get_rank() == 0:
        local_grad(next(model.parameters()))[0, 0] = math.nan


def failure(rank, enabled):
    try:
        train(enabled, sharded, mlp, {}, {}, first_row, steps=6)
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enabled", [False, True], ids=["alone", "on kernels"])
def test_only_the_rank_with_a_bad_block_fails(enabled):
    assert ranks.run(2, failure, enabled) == ["PreconditionerValueError", None]
