"""Every variant of Shampoo over many processes ends where one process ends."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from training import gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import stacks
from shampoo_kernels.optim.distributed import gathering

pytestmark = ranks.pytestmark

SHAPES = [(8, 6), (5,), (8, 6), (4, 3, 2, 2), (6, 8), (21, 6), (2, 20), (1, 9)]
OPTIONS = {"lr": 0.01, "block_size": 8, "refresh_every": 3}
# A basis of the null space is what rounding makes of it: start when there is none any more.
SOAP = {"application": "soap", "graft": None, "start_step": 7}
VARIANTS = {
    "soap": SOAP,
    "soap by eigh, no factor on the right": {**SOAP, "basis_method": "eigh", "p": (2, None)},
    "kl": {"statistic": "kl"},
    "frobenius, level turns": {"statistic": "frobenius", "refresh": "level"},
    "sgd, least squares": {"graft": "sgd", "scale": "least_squares"},
    "coupled decay, adagrad, sums": {
        "weight_decay": 0.1, "decoupled_weight_decay": False, "graft": "adagrad",
        "shampoo_beta": 1.0,
    },
    "p = 3, clipped, together, nesterov": {
        "p": 3, "max_update_rms": 0.5, "refresh": "together", "nesterov": True,
    },
    "refreshed where the root no longer fits": {"refresh_tolerance": 0.1, "refresh_every": 1},
    "rmsprop, the scale of neither": {"graft": "rmsprop", "scale": None},
}  # fmt: skip


def trained(variant, wrap=lambda tensor: tensor, **options):
    own = [nn.Parameter(wrap(p.detach())) for p in parameters(*SHAPES, dtype=torch.float64)]
    optimizer = Shampoo(own, **{**OPTIONS, **VARIANTS[variant], **options})
    pairs = [
        (p, [wrap(g) for g in gradients(shape, 20, torch.float64, seed=i)])
        for i, (p, shape) in enumerate(zip(own, SHAPES, strict=True))
    ]
    train(optimizer, pairs)
    averages = [optimizer.state[p]["exp_avg"] for p in own]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*own, *averages)]
    return [t.detach() for t in whole]


def in_both_ways(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    gathering.GATHER_BYTES = 1 << 10  # so that new weights arrive while others are being made
    stacks.PART_BYTES = 1  # and blocks come and go one by one
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for variant in VARIANTS:
        found[variant, "replicas"] = trained(variant, process_group=dist.group.WORLD)
        found[variant, "shards"] = trained(
            variant, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])
        )
    return found


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return ranks.run(request.param, in_both_ways)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_weights_and_moments_agree_with_one_process(results, variant, kind):
    alone = trained(variant)
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(alone, parameters(*SHAPES, dtype=torch.float64), strict=False)
    )
    assert moved > 1e-2
    for result in results:
        for got, expected in zip(result[variant, kind], alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
