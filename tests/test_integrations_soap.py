"""SOAP by its authors: on these kernels it does what it does alone."""

import contextlib

import pytest
import torch
from checkouts import checkout
from peers import MODELS, check_agreement, run, structure

checkout("soap")
peer = pytest.importorskip("soap")

from shampoo_kernels.integrations import soap as ours  # noqa: E402
from shampoo_kernels.integrations._patching import UnsupportedPeer  # noqa: E402

UNIT = 2.0**-24


def maker(**options):
    # At the default eps, 1e-8, Adam in the null space of a statistic makes steps of rounding
    # errors, and one unit in the last place changes the parameters by a tenth.
    options = {"lr": 3e-3, "eps": 1e-2, "precondition_frequency": 3} | options
    return lambda parameters: peer.SOAP(parameters, **options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge_dims": True, "max_precond_dim": 64},
        {"max_precond_dim": 20},
        {"precondition_1d": True},
        {"normalize_grads": True, "correct_bias": False, "shampoo_beta": 0.8},
        {"merge_dims": True, "max_precond_dim": 64, "data_format": "channels_last"},
    ],
    ids=str,
)
def test_parameters_agree(model, options):
    """In float32: the peer decomposes in float32 whatever it is given."""
    check_agreement(ours.INTEGRATION, maker(**options), model, torch.float32)


@pytest.mark.parametrize("dims", [(7, 12), (12, 7), (4, 3, 5), (6, 4, 3, 3)])
@pytest.mark.parametrize("merge_dims", [False, True])
def test_statistics_are_as_close_to_the_truth_as_the_peers(dims, merge_dims):
    def statistics(enabled, dtype):
        generator = torch.Generator().manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the peer's statistics take it
        try:
            parameter = torch.zeros(dims, dtype=dtype, requires_grad=True)
            optimizer = peer.SOAP([parameter], merge_dims=merge_dims, max_precond_dim=20)
            integration = ours.enable() if enabled else None
            for _ in range(4):
                grad = torch.randn(dims, generator=generator, dtype=torch.float64)
                parameter.grad = grad.float().to(dtype)
                optimizer.step()
            if integration:
                integration.disable()
        finally:
            torch.set_default_dtype(before)
        return [s for s in optimizer.state[parameter]["GG"] if len(s)]

    exact, alone = statistics(False, torch.float64), statistics(False, torch.float32)
    found, double = statistics(True, torch.float32), statistics(True, torch.float64)
    for x, theirs, wide, truth in zip(found, alone, double, exact, strict=True):
        assert torch.equal(x, x.mT)
        errors = [float((y.double() - truth).norm() / truth.norm()) for y in (x, theirs)]
        assert errors[0] <= max(errors[1], 4 * UNIT)
        assert float((wide - truth).norm() / truth.norm()) < 1e-14


@pytest.mark.parametrize("without", [None, 0, 1])
def test_projections_agree(without):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    bases = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
             for n in (6, 9)]  # fmt: skip
    state = {"Q": [[] if k == without else Q for k, Q in enumerate(bases)]}
    optimizer = peer.SOAP([torch.zeros(6, 9, requires_grad=True)])
    alone = [f(x, state) for f in (optimizer.project, optimizer.project_back)]
    with ours.enable():
        found = [f(x, state) for f in (optimizer.project, optimizer.project_back)]
        again = optimizer.project_back(found[0], state)
    for given, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-13)


def test_the_state_is_the_peers():
    optimizers = [
        run(maker(), "mlp", torch.float32, within=w)[1]
        for w in (contextlib.nullcontext, ours.enable)
    ]
    states = [o.state_dict() for o in optimizers]
    assert structure(states[0]) == structure(states[1])
    fresh = maker()(optimizers[1].param_groups[0]["params"])
    fresh.load_state_dict(states[1])  # and it goes on alone
    fresh.step()


def test_bfloat16_is_the_peers_to_refuse():
    def outcome():
        parameter = torch.zeros(4, 6, dtype=torch.bfloat16, requires_grad=True)
        optimizer = peer.SOAP([parameter])
        try:
            for _ in range(3):
                parameter.grad = torch.ones_like(parameter)
                optimizer.step()
        except Exception as error:
            return type(error).__name__
        return None

    alone = outcome()
    with ours.enable():
        assert outcome() == alone


def test_switched_off_nothing_is_left():
    before = dict(vars(peer.SOAP))
    with ours.enable(), ours.enable():
        assert dict(vars(peer.SOAP)) != before
    assert dict(vars(peer.SOAP)) == before


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(peer.SOAP, "project", lambda self, grad: grad)
    with pytest.raises(UnsupportedPeer, match="must take"):
        ours.enable()
    monkeypatch.delattr(peer.SOAP, "project")
    with pytest.raises(UnsupportedPeer, match="there is no"):
        ours.enable()
