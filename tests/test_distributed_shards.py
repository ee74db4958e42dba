"""Many processes that hold some rows of every parameter: DTensors, as fully_shard makes them."""

import math

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import stacks

pytestmark = ranks.pytestmark

# more ranks than rows; rows that no number of ranks divides; one row; no factor
SHAPES = [(8, 6), (5,), (8, 6), (4, 3, 2, 2), (6, 8), (21, 6), (2, 20), (1, 9), (1,), (1, 6, 5)]
OPTIONS = {"lr": 0.01, "block_size": 8, "refresh_every": 3}
STEPS = 20
BAD = 5  # the step with a gradient that is not finite


def bad_gradients(dtype):
    """(parameter, gradient): NaN in one row of a matrix, in one element of a vector."""
    matrix, vector = torch.ones(21, 6, dtype=dtype), torch.ones(5, dtype=dtype)
    matrix[13, 2] = vector[4] = math.nan
    return {5: matrix, 1: vector}


def series(dtype, nudge=False, bad=False):
    """The gradients of every parameter."""
    result = []
    for i, shape in enumerate(SHAPES):
        grads = list(gradients(shape, STEPS, dtype, seed=i))
        if nudge:
            grads = [torch.nextafter(g, torch.full_like(g, math.inf)) for g in grads]
        if bad and i in bad_gradients(dtype):
            grads[BAD] = bad_gradients(dtype)[i]
        result.append(grads)
    return result


def alone(dtype=torch.float64, **changes):
    own = parameters(*SHAPES, dtype=dtype)
    optimizer = Shampoo(own, **OPTIONS)
    train(optimizer, list(zip(own, series(dtype, **changes), strict=True)))
    return [p.detach() for p in own], [optimizer.state[p] for p in own]


def sharded(tensors, mesh, placements=None):
    from torch.distributed.tensor import Shard, distribute_tensor

    return [distribute_tensor(t, mesh, placements or [Shard(0)]) for t in tensors]


def mesh_of(*sizes, names=None):
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def trained(mesh, dtype=torch.float64, placements=None, **changes):
    """(parameters, states), the parameters whole."""
    values = [p.detach() for p in parameters(*SHAPES, dtype=dtype)]
    own = [nn.Parameter(p) for p in sharded(values, mesh, placements)]
    optimizer = Shampoo(own, **OPTIONS)
    pairs = [
        (p, sharded(grads, mesh, placements))
        for p, grads in zip(own, series(dtype, **changes), strict=True)
    ]
    train(optimizer, pairs)
    return [p.detach().full_tensor() for p in own], [optimizer.state[p] for p in own]


class Largest(TorchDispatchMode):
    """The largest memory that a call inside returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and not func.is_view
            and func._schema.is_mutable is False
        ):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def of_a_step(mesh):
    """The largest tensor that a step of 24 equal blocks makes."""
    own = [nn.Parameter(p) for p in sharded([torch.ones(16, 8)] * 12, mesh)]
    optimizer = Shampoo(own, **OPTIONS)
    pairs = [(p, sharded(gradients((16, 8), 2, torch.float32), mesh)) for p in own]
    train(optimizer, pairs)
    with Largest() as largest:
        optimizer.step()
    return largest.bytes


def with_missing_gradients(rank, mesh):
    """(weights before and after a step in which rank 1 lacks two gradients, owners of a matrix)."""
    own = [nn.Parameter(p) for p in sharded([p.detach() for p in parameters(*SHAPES)], mesh)]
    optimizer = Shampoo(own, **OPTIONS)
    grads = [sharded(gradients(p.shape, 3, torch.float32), mesh) for p in own]
    train(optimizer, [(p, g[:2]) for p, g in zip(own, grads, strict=True)])
    before = [p.detach().full_tensor().clone() for p in own]
    missing = (5, 1) if rank == 1 else ()
    train(optimizer, [
        (p, [None if i in missing else g[2]])
        for i, (p, g) in enumerate(zip(own, grads, strict=True))
    ])  # fmt: skip
    return before, [p.detach().full_tensor() for p in own], optimizer._shares[0].owners[own[5]]


def gradients_are_left_as_they_were(mesh):
    """Of a vector that is not finite in the last row."""
    (vector,) = (nn.Parameter(p) for p in sharded([torch.ones(5)], mesh))
    for bad in (math.nan, math.inf):
        vector.grad = sharded([torch.tensor([-0.0, 1, 2, 3, bad])], mesh)[0]
        before = vector.grad.to_local().clone()
        Shampoo([vector]).step()
        assert torch.equal(before.view(torch.int32), vector.grad.to_local().view(torch.int32))


def of_many_dtypes(mesh):
    """Vectors of one group: which of them move with gradients of 1e25, and then with 1."""
    dtypes = (torch.float64, torch.bfloat16, torch.float32)
    own = [nn.Parameter(*sharded([torch.ones(5, dtype=dtype)], mesh)) for dtype in dtypes]
    optimizer = Shampoo(own, lr=0.1)
    moved = []
    for size in (1e25, 1.0):
        before = [p.detach().full_tensor().clone() for p in own]
        train(optimizer, [(p, sharded([torch.full((5,), size, dtype=p.dtype)], mesh))
                          for p in own])  # fmt: skip
        moved.append([not torch.equal(p.detach().full_tensor(), b)
                      for p, b in zip(own, before, strict=True)])  # fmt: skip
    return moved


def in_all_ways(rank, world):
    mesh = mesh_of(world)
    whole, usual = of_a_step(mesh), stacks.PART_BYTES
    stacks.PART_BYTES = 4 * (2 * 8 * 8 * 4)  # two blocks, with everything that travels
    small, parts = of_a_step(mesh), trained(mesh)[0]
    stacks.PART_BYTES = usual
    weights, states = trained(mesh)
    gradients_are_left_as_they_were(mesh)
    return {
        "float64": weights,
        "moments": [[s[n].full_tensor() for n in ("exp_avg", "exp_avg_sq")] for s in states],
        "held": [s["exp_avg"].to_local().numel() for s in states],
        "blocks": [{n: v for n, v in s.items() if "." in n} for s in states],
        "parts": parts,
        "largest": (whole, small),
        "float32": trained(mesh, torch.float32)[0],
        "bfloat16": trained(mesh, torch.bfloat16)[0],
        "bad": trained(mesh, torch.float32, bad=True)[0],
        "missing": with_missing_gradients(rank, mesh),
        "dtypes": of_many_dtypes(mesh),
    }


@pytest.fixture(scope="module", params=[2, 3, 4])
def results(request):
    return ranks.run(request.param, in_all_ways, request.param)


def divergence(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_twenty_steps_agree_with_one_process(results):
    weights, states = alone()
    for result in results:
        assert divergence(result["float64"], weights) <= 1e-9
        for state, (exp_avg, exp_avg_sq) in zip(states, result["moments"], strict=True):
            torch.testing.assert_close(state["exp_avg"], exp_avg, rtol=0, atol=1e-9)
            torch.testing.assert_close(state["exp_avg_sq"], exp_avg_sq, rtol=0, atol=1e-9)


def test_twenty_steps_in_float32_agree_with_one_process(results):
    weights = alone(torch.float32)[0]
    tolerance = 5 * divergence(alone(torch.float32, nudge=True)[0], weights)
    for result in results:
        assert divergence(result["float32"], weights) <= tolerance


def test_twenty_steps_in_bfloat16_agree_with_one_process(results):
    """A block of bfloat16 gradients meets the same kernels, so that they agree like float32."""
    weights = alone(torch.bfloat16)[0]
    tolerance = 5 * divergence(alone(torch.bfloat16, nudge=True)[0], weights)
    for result in results:
        assert divergence(result["bfloat16"], weights) <= tolerance


def test_small_chunks_train_alike_and_need_little_memory(results):
    weights = alone()[0]
    for result in results:
        assert divergence(result["parts"], weights) <= 1e-9
        whole, small = result["largest"]
        one_of_every_owner = len(results) * 4 * 8 * 8 * 4
        assert small <= max(4 * (2 * 8 * 8 * 4), one_of_every_owner) < whole


def test_blocks_that_are_not_finite_on_one_rank_stand_still_on_all(results):
    """Of the matrix that block alone, of the vector all rows, as in one process."""
    weights = alone(torch.float32, bad=True)[0]
    tolerance = 5 * divergence(alone(torch.float32, nudge=True, bad=True)[0], weights)
    for result in results:
        assert divergence(result["bad"], weights) <= tolerance


def test_what_is_finite_is_so_in_the_dtype_of_its_state(results):
    """The square of 1e25 is so in float64, not in float32, the dtype for bfloat16 too."""
    for result in results:
        assert result["dtypes"] == [[True, False, False], [True, True, True]]


def test_every_state_of_a_block_is_with_one_rank_and_all_is_there(results):
    """But the counts of blocks without factors, which every rank has and has alike."""
    for number, (state, shape) in enumerate(zip(alone()[1], SHAPES, strict=True)):
        own = [result["blocks"][number] for result in results]
        names = [name for one in own for name in one]
        if any(name.startswith("left") for name in state):
            assert sorted(names) == sorted(name for name in state if "." in name)
        else:
            assert names == ["block_step.0"] * len(results)
        for one in own:
            for name, value in one.items():
                torch.testing.assert_close(value, state[name], rtol=0, atol=1e-9)
        assert sum(result["held"][number] for result in results) == math.prod(shape)


def test_a_block_stands_still_when_a_rank_with_rows_of_it_or_its_owner_has_no_gradient(results):
    """In the matrix (21, 6) that rank 1 misses, in rows of 7; everything else moves."""
    before, after, owner = results[0]["missing"]
    part = -(-21 // len(results))
    for block in range(3):
        rows = slice(7 * block, 7 * block + 7)
        theirs = range(max(rows.start, part), min(rows.stop, 2 * part))
        still = bool(theirs) or owner[block] == 1
        assert torch.equal(before[5][rows], after[5][rows]) == still
    assert any(torch.equal(before[5][r : r + 7], after[5][r : r + 7]) for r in (0, 7, 14))
    for number in range(len(SHAPES)):
        if number not in (5, 1):
            assert not torch.equal(before[number], after[number])
    assert torch.equal(before[1], after[1])
    for result in results[1:]:
        assert all(map(torch.equal, result["missing"][1], after))


def hybrid(rank):
    from torch.distributed.tensor import Replicate, Shard

    placements = [Replicate(), Shard(0)]
    return trained(mesh_of(2, 2, names=("copy", "cut")), placements=placements)[0]


def test_copies_of_the_shards_are_trained_alike():
    for result in ranks.run(4, hybrid):
        assert divergence(result, alone()[0]) <= 1e-9


def model(dtype=torch.float64):
    torch.manual_seed(0)
    parts = [nn.Linear(12, 21), nn.Tanh(), nn.LayerNorm(21), nn.Linear(21, 4, bias=False)]
    return nn.Sequential(*parts).to(dtype)


def batches(steps):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, 12, 12, generator=generator, dtype=torch.float64)


def fully_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    net, mesh = model(), mesh_of(world)
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = Shampoo(net.parameters(), **OPTIONS)
    part = 12 // world
    for batch in batches(10):
        optimizer.zero_grad()
        net(batch[rank * part : (rank + 1) * part]).square().mean().backward()
        optimizer.step()
    return [p.detach().full_tensor() for p in net.parameters()]


def test_fully_shard():
    net = model()
    optimizer = Shampoo(net.parameters(), **OPTIONS)
    for batch in batches(10):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    for world in (2, 3):
        for result in ranks.run(world, fully_sharded, world):
            assert divergence(result, [p.detach() for p in net.parameters()]) <= 1e-9


def what_is_refused(rank):
    from torch.distributed.tensor import Replicate, Shard

    mesh, messages = mesh_of(2), {}
    rows = nn.Parameter(*sharded([torch.ones(8, 6)], mesh))
    columns = nn.Parameter(*sharded([torch.ones(8, 6)], mesh, [Shard(1)]))
    copies = nn.Parameter(*sharded([torch.ones(8, 6)], mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(8, 6))
    for name, own, options in (
        ("columns", [columns], {}),
        ("copies", [copies], {}),
        ("mixed", [rows, plain], {}),
        ("placements", [rows, columns], {}),
        ("process_group", [rows], {"process_group": dist.group.WORLD}),
    ):
        optimizer = Shampoo(own, **options)
        for p in own:
            p.grad = torch.ones_like(p)
        try:
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def test_what_is_not_supported_is_refused_with_words():
    for messages in ranks.run(2, what_is_refused, seconds=60):
        assert "must be Shard(0) on one dimension" in messages["columns"]
        assert "must be Shard(0) on one dimension" in messages["copies"]
        assert "must share one mesh" in messages["mixed"]
        assert "must share one mesh" in messages["placements"]
        assert "process_group must be None for DTensor" in messages["process_group"]
