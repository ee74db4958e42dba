"""torch.optim.Muon with `orthogonalize` in it.

Its steps are taken in bfloat16, so that "agrees" cannot mean equal: the law is that every update
and every run is as close to the same polynomial in float64 as torch's own; in float32, closer by
what its rounding is finer than bfloat16's.
"""

import contextlib
import functools
import importlib.metadata

import pytest
import torch
from peers import MODELS, distance, need, run
from torch.optim import _muon as peer

from shampoo_kernels import native
from shampoo_kernels.integrations import muon as integration
from shampoo_kernels.integrations._patching import UnsupportedPeer

need(integration.INTEGRATION)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EXACT = functools.partial(integration.enable, precision="highest")
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
    with EXACT():
        ours = step(grad, coefficients, steps, 1e-7)
    assert ours.dtype == grad.dtype
    error = (ours.double() - truth).norm() / truth.norm()
    # The polynomial multiplies small singular values, and their errors, by 3.4 a step at most.
    assert error <= 2.0**-24 * 8 * 3.4445**steps
    assert error <= max(1e-2 * (theirs.double() - truth).norm() / truth.norm(), 2.0**-22)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (2.0, -1.5, 0.5)], ids=["own", "other"])
def test_in_bfloat16_is_as_close_to_the_formula(shape, steps, coefficients):
    """On average: fewer of the same roundings, but another draw; 16 of them tell a tenth."""
    squares = {"ours": 0.0, "theirs": 0.0}
    for seed in range(16):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        truth = formula(grad, coefficients, steps, 1e-7)
        for which, within in (("ours", integration.enable), ("theirs", contextlib.nullcontext)):
            with within():
                found = step(grad, coefficients, steps, 1e-7)
            squares[which] += float((found.double() - truth).norm() / truth.norm()) ** 2
    assert 0 < squares["ours"] <= 1.1**2 * squares["theirs"]


def test_bfloat16_is_for_cpus_that_multiply_it():
    grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    with integration.enable():
        found = step(grad, COEFFICIENTS, 5, 1e-7)
    with EXACT():
        exact = step(grad, COEFFICIENTS, 5, 1e-7)
    assert torch.equal(found, exact) != native.multiplies_bfloat16()
    with pytest.raises(ValueError, match="precision must be 'medium' or 'highest', got 'high'"):
        integration.enable(precision="high")


@pytest.mark.parametrize("name", MODELS)
def test_runs_in_bfloat16_as_close_to_the_formula(name, monkeypatch):
    theirs, _ = run(optimizer, name, torch.float32)
    ours, _ = run(optimizer, name, torch.float32, within=integration.enable)
    monkeypatch.setattr(
        peer, "_zeropower_via_newtonschulz", lambda grad, *rest: formula(grad, *rest).to(grad.dtype)
    )
    truth, _ = run(optimizer, name, torch.float32)
    assert distance(ours, theirs, name) > 0
    assert distance(ours, truth, name) <= 1.1 * distance(theirs, truth, name)


@pytest.mark.parametrize("name", MODELS)
def test_runs_closer_to_the_formula(name, monkeypatch):
    theirs, _ = run(optimizer, name, torch.float32)
    ours, _ = run(optimizer, name, torch.float32, within=EXACT)
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


@pytest.mark.parametrize("enable", [integration.enable, EXACT])
def test_zero_gradient_and_what_takes_torchs_way(enable):
    generator = torch.Generator().manual_seed(0)
    zero, grad, tiny = (torch.zeros(20, 30), 1e-3 * torch.ones(20, 30),
                        torch.randn(16, 16, generator=generator))  # fmt: skip
    others = ((grad, 1.0), (grad.to("meta"), 1e-7))
    theirs = [step(x, COEFFICIENTS, 5, eps) for x, eps in (*others, (tiny, 1e-7))]
    with enable():
        assert torch.equal(step(zero, COEFFICIENTS, 5, 1e-7), zero)
        ours = [step(x, COEFFICIENTS, 5, eps) for x, eps in (*others, (tiny, 1e-7))]
        with pytest.raises(ValueError, match="less than 100"):
            step(grad, COEFFICIENTS, 100, 1e-7)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].dtype == theirs[1].dtype == torch.bfloat16
    assert torch.equal(ours[2], theirs[2].to(ours[2].dtype)) == (enable is integration.enable)


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "3.11.0"])
def test_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UnsupportedPeer, match=rf"tested with torch 2\.11 or .*, got {version}"):
        integration.enable()
