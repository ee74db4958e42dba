"""HeavyBall's SOAP and KL-Shampoo families with these kernels in them."""

import contextlib
import functools

import pytest
import torch
from peers import CASES, DTYPES, check_agreement, check_state, need

from shampoo_kernels.integrations import heavyball as integration

need(integration.INTEGRATION)
import heavyball as peer  # noqa: E402

OPTIMIZERS = ("SOAP", "KLSOAP", "KLShampoo")
HEAVY = ("HeavySOAP", "HeavyKLSOAP", "HeavyKLShampoo")


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(peer.utils, "compile_mode", None)


def make(name, parameters):
    kept = str(parameters[0].dtype).removeprefix("torch.")
    # Below the eps of 1e-8 that KLSOAP begins with its own runs part by a quarter in float64 when
    # a gradient moves by one unit in the last place.
    options = {"eps": 1e-4} if "KLSOAP" in name else {}
    return getattr(peer, name)(parameters, precondition_frequency=2, storage_dtype=kept, **options)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_agrees_with_the_peer(optimizer, name, dtype):
    warm = 6 if "SOAP" in optimizer and dtype == torch.float32 else 0
    make_it = functools.partial(make, optimizer)
    check_agreement(integration.INTEGRATION, make_it, name, dtype, warm)


@pytest.mark.parametrize("optimizer", HEAVY)
def test_heavy_agrees_with_the_peer(optimizer):
    make_it = functools.partial(make, optimizer)
    check_agreement(integration.INTEGRATION, make_it, "mlp", torch.float64)


@pytest.mark.parametrize("optimizer", ["SOAP", "KLShampoo"])
def test_state(optimizer):
    check_state(integration.INTEGRATION, functools.partial(make, optimizer), "mlp")


def stacks(dtype=torch.float64, batch=3, m=5, n=8):
    """(grad, GG, Q) as HeavyBall keeps them: slabs of several parameters."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    grad = draw(batch, m, n)
    GG = [x @ x.mT for x in (draw(batch, m, 2 * m), draw(batch, n, 2 * n))]
    Q = [torch.linalg.eigh(x + 0.1 * torch.eye(x.shape[-1])).eigenvectors for x in GG]
    Q[0] = torch.linalg.qr(draw(batch, m, m)).Q  # of another matrix, as between two QR steps
    return grad.to(dtype), [x.to(dtype) for x in GG], [x.to(dtype) for x in Q]


def calls(function, *arguments):
    """What the peer and what ours make of it: the result, or the arguments if there is none."""
    ends = []
    for on in (False, True):
        copies = [
            [None if x is None else x.clone() for x in a] if isinstance(a, list) else a
            for a in arguments
        ]
        if on:
            with integration.enable():
                result = getattr(peer.utils, function)(*copies)
        else:
            result = getattr(peer.utils, function)(*copies)
        ends.append(copies if result is None else result)
    return ends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize("beta", [0, 0.9, torch.tensor(0.9)])
def test_statistics(dtype, missing, beta):
    grad, GG, Q = stacks(dtype)
    if missing is not None:
        GG[missing] = Q[missing] = None
    for function, arguments in (
        ("update_ggt", (grad, GG, 100, False, beta)),
        ("update_ggt_kl", (grad, GG, Q, 100, False, beta, 1e-8)),
        ("project", (grad, Q, False)),
        ("project", (grad, Q, True)),
    ):
        theirs, ours = calls(function, *arguments)
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=20 * torch.finfo(dtype).eps,
            atol=1e-5 if dtype == torch.float32 else 1e-13,
        )


@pytest.mark.parametrize("heavy", [False, True])
def test_kl_leaves_out_or_clamps_what_is_below_eps(heavy):
    """Eigenvalues below eps weigh 1/eps, or nothing at all if heavy."""
    grad, GG, Q = stacks()
    Q = [torch.linalg.eigh(x).eigenvectors for x in GG]
    eps = float(torch.linalg.eigvalsh(GG[1]).median())
    assert float(torch.linalg.eigvalsh(GG[1]).min()) < eps
    ends = []
    for on in (False, True):
        copies = [x.clone() for x in GG]
        if on:
            with integration.enable():
                peer.utils.update_ggt_kl(grad, copies, Q, 100, False, 0.5, eps, heavy=heavy)
        else:
            peer.utils.update_ggt_kl(grad, copies, Q, 100, False, 0.5, eps, heavy=heavy)
        ends.append(copies)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


def test_statistics_are_exactly_symmetric():
    grad, GG, _ = stacks(torch.float32, m=33, n=47)
    with integration.enable():
        peer.utils.update_ggt(grad, GG, 100, False, 0.9)
    assert all(torch.equal(x, x.mT) for x in GG)


def test_a_bad_gradient_touches_its_own_slab():
    grad, GG, Q = stacks(torch.float32)
    good, kept = grad.clone(), [x.clone() for x in GG]
    grad[1, 2, 3] = torch.nan
    with integration.enable():
        peer.utils.update_ggt_kl(good, kept, Q, 100, False, 0.9, 1e-8)
        peer.utils.update_ggt_kl(grad, GG, Q, 100, False, 0.9, 1e-8)
    for x, y in zip(GG, kept, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
        assert x[1].isnan().any()


@pytest.mark.parametrize("ndim", [2, 4])
def test_other_ranks_take_the_peers_way(ndim):
    grad, GG, Q = stacks(torch.float32)
    if ndim == 2:
        grad, GG, Q = grad[:, 0], [GG[1]], [Q[1]]
    else:
        grad, GG, Q = torch.stack([grad] * 5, dim=1), [GG[0], *GG], [Q[0], *Q]
    for function, arguments in (
        ("update_ggt", (grad, GG, 100, True, 0.9)),
        ("project", (grad, Q, False)),
    ):
        theirs, ours = calls(function, *arguments)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_without_factors(optimizer):
    """One number as a matrix, a row, a vector; and bfloat16."""
    ends = []
    for within in (contextlib.nullcontext, integration.enable):
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 1), (1, 7), (7,))
        parameters = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        parameters.append(torch.nn.Parameter(torch.ones(5, 6, dtype=torch.bfloat16)))
        torch.manual_seed(0)  # bfloat16 is rounded at random
        made = getattr(peer, optimizer)(parameters, precondition_frequency=2)
        with within():
            for _ in range(4):
                for p in parameters:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                made.step()
        ends.append([p.detach().float() for p in parameters])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(ends[1][:-1], ends[0][:-1], rtol=0, atol=1e-5)
