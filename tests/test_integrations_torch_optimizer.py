"""torch_optimizer's Shampoo with these kernels in it."""

import contextlib

import pytest
import torch
from peers import (
    CASES,
    check_agreement,
    check_state,
    error,
    matrices,
    need,
    rounding,
    true_root,
)

from shampoo_kernels.integrations import torch_optimizer as integration

need(integration.INTEGRATION)
import torch_optimizer as peer  # noqa: E402
from torch_optimizer import shampoo  # noqa: E402


def optimizer(parameters):
    return peer.Shampoo(parameters, lr=1e-3, update_freq=3)  # with its 0.1 the GPT diverges


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_agrees_with_the_peer(name, dtype):
    check_agreement(integration.INTEGRATION, optimizer, name, dtype)


def test_state():
    check_state(integration.INTEGRATION, optimizer, "mlp")


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 16, 100])
def test_root(n, p):
    A = matrices(n, torch.float64)[:5]  # up to 1e6
    truth, kappa = true_root(A, p)
    with integration.enable():
        ours = torch.stack([shampoo._matrix_power(a, -1 / p) for a in A])
    assert (error(ours, truth) <= 4 * rounding(ours, kappa, p)).all()


def test_other_powers_take_the_peers_way():
    A = matrices(8, torch.float64)[2]
    with integration.enable():
        torch.testing.assert_close(shampoo._matrix_power(A, 2.0), A @ A)


def test_nan_raises_as_in_the_peer():
    """Before the parameter is touched."""
    for within in (contextlib.nullcontext, integration.enable):
        p = torch.nn.Parameter(torch.ones(4, 6))
        made = optimizer([p])
        p.grad = torch.full((4, 6), torch.nan)
        with within(), pytest.raises(torch.linalg.LinAlgError):
            made.step()
        assert torch.equal(p, torch.ones(4, 6))
