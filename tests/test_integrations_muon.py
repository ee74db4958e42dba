"""torch.optim.Muon with `orthogonalize` in it.

Its steps are taken in bfloat16, so that "agrees" cannot mean equal: the law is that every update
and every run is closer to the same polynomial in float64 than torch's own, by what float32 rounding
is finer than bfloat16's.
"""

import pytest
import torch
from peers import MODELS, distance, need, run
from torch.optim import _muon as peer

from shampoo_kernels.integrations import muon as integration

need(integration.INTEGRATION)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(1, 1), (1, 7), (16, 16), (40, 24), (24, 40), (96, 200)]


def formula(grad, coefficients, steps, eps):
    """U p(S) Vᵀ in float64, p the polynomial of all steps."""
    U, S, Vh = torch.linalg.svd(grad.double(), full_matrices=False)
    S = S / S.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        S = a * S + b * S**3 + c * S**5
    return (U * S) @ Vh


def optimizer(parameters):
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.02)


def step(*arguments):
    return peer._zeropower_via_newtonschulz(*arguments)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (2.0, -1.5, 0.5)], ids=["own", "other"])
def test_is_closer_to_the_formula(shape, steps, coefficients):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    truth = formula(grad, coefficients, steps, 1e-7)
    theirs = step(grad, coefficients, steps, 1e-7)
    with integration.enable():
        ours = step(grad, coefficients, steps, 1e-7)
    assert ours.dtype == grad.dtype
    error = (ours.double() - truth).norm() / truth.norm()
    # The polynomial multiplies small singular values, and their errors, by 3.4 a step at most.
    assert error <= 2.0**-24 * 8 * 3.4445**steps
    assert error <= max(1e-2 * (theirs.double() - truth).norm() / truth.norm(), 2.0**-22)


@pytest.mark.parametrize("name", MODELS)
def test_runs_closer_to_the_formula(name, monkeypatch):
    theirs, _ = run(optimizer, name, torch.float32)
    ours, _ = run(optimizer, name, torch.float32, within=integration.enable)
    monkeypatch.setattr(
        peer, "_zeropower_via_newtonschulz", lambda grad, *rest: formula(grad, *rest).to(grad.dtype)
    )
    truth, _ = run(optimizer, name, torch.float32)
    assert distance(ours, truth, name) <= 0.02 * distance(theirs, truth, name)


@pytest.mark.parametrize("name", MODELS)
def test_float64_runs_the_formula(name, monkeypatch):
    ours, _ = run(optimizer, name, torch.float64, within=integration.enable)
    monkeypatch.setattr(peer, "_zeropower_via_newtonschulz", formula)
    truth, _ = run(optimizer, name, torch.float64)
    assert distance(ours, truth, name) <= 1e-9


def test_state_is_the_peers():
    _, theirs = run(optimizer, "mlp", torch.float32, steps=range(3))
    _, ours = run(optimizer, "mlp", torch.float32, steps=range(3), within=integration.enable)
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys() == {"momentum_buffer"}
        assert ours["state"][key]["momentum_buffer"].dtype == state["momentum_buffer"].dtype


def test_zero_gradient_and_another_eps():
    zero, grad = torch.zeros(4, 6), 1e-3 * torch.ones(4, 6)
    theirs = step(grad, COEFFICIENTS, 5, 1.0)
    with integration.enable():
        assert torch.equal(step(zero, COEFFICIENTS, 5, 1e-7), zero)
        assert torch.equal(step(grad, COEFFICIENTS, 5, 1.0), theirs)
