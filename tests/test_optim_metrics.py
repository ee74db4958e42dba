"""Blocks that stood still are counted one by one, over stacks, groups, dtypes and resumes."""

import math

import pytest
import torch
from torch import nn
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo


def poisoned():
    """(parameters, their gradients in three steps, how many blocks stood still by then)."""
    own = [*parameters((8, 8), (8, 8), (5,)), *parameters((8, 4), dtype=torch.float64)]
    grads = [[g.clone() for g in gradients(p.shape, 3, p.dtype, i)] for i, p in enumerate(own)]
    grads[0][0][0, 0] = grads[0][0][7, 7] = math.nan  # two of its four blocks
    grads[0][2][0, 0] = math.inf
    grads[1][1].fill_(math.nan)  # all four
    grads[2][1][3] = math.inf  # the vector
    grads[3][2][5, 1] = math.nan  # one of two
    return own, grads, [2, 2 + 4 + 1, 2 + 4 + 1 + 1 + 1]


@pytest.mark.parametrize("options", [{}, SOAP, {"statistic": "kl"}], ids=str)
def test_every_block_that_stands_still_is_counted(options):
    own, grads, expected = poisoned()
    groups = [{"params": own[:1]}, {"params": own[1:], "lr": 0.1}]
    optimizer = Shampoo(groups, block_size=4, **options)
    for step, count in enumerate(expected):
        train(optimizer, [(p, g[step : step + 1]) for p, g in zip(own, grads, strict=True)])
        found = optimizer.metrics()
        assert all(value.dtype == torch.int64 and value.shape == () for value in found.values())
        assert found["skipped_gradients"] == count
        assert found["blocks"] == 4 + 4 + 2
    twin = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = Shampoo([{"params": twin[:1]}, {"params": twin[1:]}])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.metrics()["skipped_gradients"] == 0  # it has not looked yet
    train(resumed, [(p, g[1:2]) for p, g in zip(twin[2:3], grads[2:3], strict=True)])
    assert resumed.metrics()["skipped_gradients"] == expected[-1] + 1
    resumed.load_state_dict(optimizer.state_dict())
    assert not any(resumed.metrics().values())  # nor of what it had been doing
