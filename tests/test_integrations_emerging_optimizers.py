"""NVIDIA's Emerging-Optimizers: on these kernels it does what it does alone."""

import contextlib
import sys
import types
import typing
import warnings

import pytest
import torch
from checkouts import checkout
from peers import MODELS, check_agreement, structure
from peers import run as run_peer

checkout("emerging_optimizers")
pytest.importorskip("absl", reason="Emerging-Optimizers needs absl-py")
if sys.version_info < (3, 12):  # of the peer's 3.12 syntax only the registry cannot be read
    registry = types.ModuleType("emerging_optimizers.registry")
    registry.register_optimizer = lambda name: lambda cls: cls
    sys.modules["emerging_optimizers.registry"] = registry
    typing.override = lambda function: function

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of what the peer imports of it
    import emerging_optimizers as peer
    from emerging_optimizers import utils
    from emerging_optimizers.legacy_soap import matrix_root_inverse_utils as roots
    from emerging_optimizers.legacy_soap import rekls, soap
    from emerging_optimizers.shampoo import shampoo_base, soap_v3

from shampoo_kernels import eigenvalue_bound  # noqa: E402
from shampoo_kernels.integrations import emerging_optimizers as ours  # noqa: E402
from shampoo_kernels.integrations._patching import UnsupportedPeer  # noqa: E402

UNIT = 2.0**-24


# At the default, 1e-8, Adam in the null space of a factor makes steps of rounding errors, and one
# unit in the last place changes the parameters by a tenth.
EPS = 1e-2


def matrices(parameters):
    """What the peer's SOAP takes; the others stand still."""
    return [p for p in parameters if p.ndim == 2]


OPTIMIZERS = {
    "soap": lambda ps: soap.SOAP(matrices(ps), lr=3e-3, eps=EPS),
    "soap-kl": lambda ps: soap.SOAP(matrices(ps), lr=3e-3, eps=EPS, use_kl_shampoo=True),
    "rekls": lambda ps: rekls.REKLS(matrices(ps), lr=3e-3, eps=EPS),
    "kl-soap-v3": lambda ps: soap_v3.KlSoapV3(matrices(ps), lr=3e-3, eps=EPS),
    "rekls-v3": lambda ps: soap_v3.ReklsV3(matrices(ps), lr=3e-3, eps=EPS),
}


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch):
    """The peer compiles a clip of three lines; the tests have nothing to gain from that."""
    clip = soap._clip_update_rms_in_place
    monkeypatch.setattr(soap, "_clip_update_rms_in_place", getattr(clip, "__wrapped__", clip))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_agree(model, name):
    """In float32, which is what the peer computes in."""
    check_agreement(ours.INTEGRATION, OPTIMIZERS[name], model, torch.float32)


# The peer's own tests of what is replaced, restated: those of its optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 9), (6, 6)])
def test_bfloat16_parameters_agree(name, shape):
    """To two of their units in the last place, 2^-7 of a binade's lower end, after five steps."""
    ends = []
    for within in (contextlib.nullcontext, ours.enable):
        p = torch.nn.Parameter(random(*shape, dtype=torch.bfloat16))
        optimizer = OPTIMIZERS[name]([p])
        with within():
            for k in range(5):
                p.grad = random(*shape, seed=k + 1, dtype=torch.bfloat16)
                optimizer.step()
        ends.append(p.detach())
    assert not torch.equal(ends[1], random(*shape, dtype=torch.bfloat16))
    torch.testing.assert_close(*ends, rtol=2**-6, atol=2**-10)


@pytest.mark.parametrize("make", [
    lambda ps: soap.SOAP(ps, lr=1e-3), lambda ps: soap.SOAP(ps, lr=1e-3, use_kl_shampoo=True),
    lambda ps: rekls.REKLS(ps, lr=1e-3), lambda ps: soap_v3.KlSoapV3(ps, lr=1e-3),
    lambda ps: soap_v3.ReklsV3(ps, lr=1e-3), lambda ps: soap_v3.KlMSoap(ps, lr=1e-2),
], ids=["soap", "soap-kl", "rekls", "kl-soap-v3", "rekls-v3", "kl-m-soap"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_at_the_default_eps(make, dtype):
    """Where the null space is noise: parameters move and stay finite; what is no matrix raises."""
    p = torch.nn.Parameter(random(8, 5, dtype=dtype))
    optimizer = make([p])
    with ours.enable():
        for k in range(5):
            p.grad = random(8, 5, seed=k + 1, dtype=dtype)
            optimizer.step()
        assert p.isfinite().all()
        assert not torch.equal(p, random(8, 5, dtype=dtype))
        assert optimizer.state[p]["step"] == 5
        for shape in ((10,), (2, 3, 4)):
            wrong = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
            wrong.grad = torch.ones_like(wrong)
            with pytest.raises(TypeError, match="only supported for 2D"):
                make([wrong]).step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_streams_change_nothing(name):
    """Ten steps of ten parameters on eight streams are those on one, to the bit."""
    shapes = [(5, 3), (8, 4), (3, 7), (6, 6), (4, 5), (10, 3), (3, 9), (7, 4), (5, 5), (8, 6)]
    ends = []
    for streams in (None, [torch.cuda.Stream() for _ in range(8)]):
        parameters = [torch.nn.Parameter(random(*s, dtype=torch.bfloat16).cuda()) for s in shapes]
        optimizer = OPTIMIZERS[name](parameters)
        optimizer.stream_list = streams
        with ours.enable():
            for k in range(10):
                for i, p in enumerate(parameters):
                    p.grad = random(*p.shape, seed=100 * k + i, dtype=torch.bfloat16).cuda()
                optimizer.step()
        torch.cuda.synchronize()
        ends.append([p.detach() for p in parameters])
    assert all(map(torch.equal, *ends))


def test_the_state_is_the_peers():
    states = [run_peer(OPTIMIZERS["kl-soap-v3"], "mlp", torch.float32, within=within)[1]
              for within in (contextlib.nullcontext, ours.enable)]  # fmt: skip
    assert structure(states[0].state_dict()) == structure(states[1].state_dict())


# Accumulation


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def positive(n, seed):
    G = random(n, n, seed=seed)
    return (G @ G.mT).tril() + (G @ G.mT).tril(-1).mT  # products are symmetric to rounding alone


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (33, 5)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("kl", [None, (1e-8, -1.0), (3.0, -0.5)], ids=str)
def test_factors_are_as_close_to_the_truth_as_the_peers(shape, beta, kl):
    grad = random(*shape)
    start = [positive(n, n) for n in shape]
    eigen = [torch.linalg.eigh(positive(n, n + 1)) for n in shape]
    values, bases = ([x[i] for x in eigen] for i in (0, 1))
    rest = (bases, values, *kl) if kl else ()  # eps and exponent; of 3.0 some values are below
    name = "update_kronecker_factors_kl_shampoo" if kl else "update_kronecker_factors"

    def run(dtype):
        factors = [x.to(dtype).clone() for x in start]
        converted = [[x.to(dtype) for x in y] if isinstance(y, list) else y for y in rest]
        getattr(soap, name)(factors, grad.to(dtype), beta, *converted)
        return factors

    exact, alone = run(torch.float64), run(torch.float32)
    with ours.enable():
        found = run(torch.float32)
    for x, theirs, truth in zip(found, alone, exact, strict=True):
        assert torch.equal(x, x.mT)
        errors = [float((y.double() - truth).norm() / truth.norm()) for y in (x, theirs)]
        # KL: three roundings of the scale, one of Q times it and one of G times that, all squared.
        assert errors[0] <= max(errors[1], (10 if kl else 4) * UNIT)


def powers_of_two(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-4, -1, shape, generator=generator)


@pytest.mark.parametrize(("m", "n"), [(4, 5), (3, 3), (5, 4), (3, 10)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_factors_need_not_be_symmetric(m, n, beta):
    """Nor the bases orthogonal: in the peer's tests they are powers of two drawn at random."""
    start = [powers_of_two(k, k, seed=k) for k in (m, n)]
    bases = [powers_of_two(k, k, seed=k + 20) for k in (m, n)]
    values = [(Q * (A @ Q)).sum(0) for Q, A in zip(bases, start, strict=True)]
    G = powers_of_two(m, n, seed=40).double()
    weights = [Q.double() / k / v.double() @ Q.double().mT
               for Q, v, k in zip(bases, values, (m, n), strict=True)]  # fmt: skip
    kl = [G @ weights[1] @ G.mT, G.mT @ weights[0] @ G]
    for call, updates in (
        (lambda f: soap.update_kronecker_factors(f, G.float(), beta), [G @ G.mT, G.mT @ G]),
        (lambda f: soap.update_kronecker_factors_kl_shampoo(
            f, G.float(), beta, eigenbasis_list=bases, eigvals_list=values, eps=1e-8
        ), kl),
    ):  # fmt: skip
        factors = [A.clone() for A in start]
        with ours.enable():
            call(factors)
        for found, A, update in zip(factors, start, updates, strict=True):
            expected = beta * A.double() + (1 - beta) * update
            error = (found.double() - expected).norm() / expected.norm()
            assert error <= 10 * UNIT


def test_kl_is_for_matrices():
    with ours.enable(), pytest.raises(TypeError, match="only supported for 2D"):
        soap.update_kronecker_factors_kl_shampoo(
            [torch.eye(3)], random(3), 0.9, eps=1e-8,
            eigvals_list=[torch.ones(3)], eigenbasis_list=[torch.eye(3)],
        )  # fmt: skip


# mat_root_inv_via_scaled_cans: the contract of the peer's tests


def cans(x):
    with ours.enable():
        return roots.mat_root_inv_via_scaled_cans(x)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4)])
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_shape_dtype_and_precision_are_kept(shape, precision):
    before = torch.get_float32_matmul_precision()
    G = random(*shape)
    with utils.fp32_matmul_precision(precision):
        root = cans(G @ G.mT + 0.1 * torch.eye(4))
    assert (root.shape, root.dtype) == (shape, torch.float32)
    assert torch.equal(root, root.mT)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (2, 8, 8), (3, 16, 16)])
def test_toeplitz(shape):
    n = shape[-1]
    band = torch.diag(torch.full((n - 1,), 0.25), 1)
    A = (2 * torch.eye(n) + band + band.mT).expand(shape).clone()
    if len(shape) == 3:
        A *= torch.arange(1.0, 1 + shape[0])[:, None, None]
    X = cans(A)
    torch.testing.assert_close(X @ A @ X, torch.eye(n).expand(shape), atol=2e-6, rtol=0)
    inverse = torch.linalg.inv(X)
    torch.testing.assert_close(inverse @ inverse, A, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("condition", [1, 2, 3, 4, 5, 6, 6.5])
def test_roots_are_as_close_to_the_truth_as_the_peers(n, condition):
    A = []
    for seed in range(4):
        Q = torch.linalg.qr(random(n, n, seed=seed, dtype=torch.float64))[0]
        A.append(Q * torch.logspace(0, -condition, n, dtype=torch.float64) @ Q.mT)
    A = torch.stack(A).float()
    values, vectors = torch.linalg.eigh(A.double())
    truth = vectors * values.rsqrt()[:, None] @ vectors.mT
    errors = [((x.double() - truth).norm() / truth.norm()).item()
              for x in (cans(A), roots.mat_root_inv_via_scaled_cans(A))]  # fmt: skip
    assert errors[0] <= max(errors[1], 4 * UNIT * 10 ** (condition / 2) * n**0.5)


@pytest.mark.parametrize("batched", [False, True])
def test_what_does_not_converge_is_the_peers(batched):
    """Rank-deficient, zero and tiny blocks, and these alone."""
    G = random(8, 3)
    bad = [G @ G.mT, torch.zeros(8, 8), 1e-14 * torch.eye(8), torch.full((8, 8), torch.nan)]
    for block in bad:
        expected = roots.mat_root_inv_via_scaled_cans(block)
        found = cans(torch.stack([torch.eye(8) * 4, block]))[1] if batched else cans(block)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    good = positive(8, 4) + torch.eye(8)
    together = cans(torch.stack([good, *bad]))
    assert torch.equal(together[0], cans(good))


def test_what_it_refuses():
    with pytest.raises(TypeError, match="must be in float32"):
        cans(torch.eye(4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="square"):
        cans(torch.ones(4, 3))
    with utils.fp32_matmul_precision("medium"), pytest.raises(RuntimeError, match="`medium`"):
        cans(torch.eye(4))


# batched_tsyrk_ex


@pytest.mark.parametrize(("b", "n", "k"), [(2, 128, 128), (4, 64, 32), (2, 12, 9), (1, 1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.5), (0.25, 0.25)])
def test_syrk_of_integers_is_exact(b, n, k, transposed, alpha, beta):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-3, 4, (b, k, n) if transposed else (b, n, k), generator=generator)
    a = (a.mT if transposed else a).bfloat16()
    c = torch.randint(-3, 4, (b, n, n), generator=generator).bfloat16()
    c = c + c.mT
    expected = (alpha * a.double() @ a.double().mT + beta * c.double()).bfloat16()
    found = ours.batched_tsyrk_ex(a, c if beta else None, alpha, beta)
    assert torch.equal(found, expected)
    assert torch.equal(ours.batched_tsyrk_ex(a, c, alpha, beta, out=torch.empty_like(c)), found)
    marked = torch.full_like(c, 7)
    lower = ours.batched_tsyrk_ex(a, c, alpha, beta, skip_upper_triangle=True, out=marked)
    assert lower is marked
    assert torch.equal(marked, expected.tril() + torch.full_like(c, 7).triu(1))


def test_what_syrk_refuses():
    a = torch.ones(2, 16, 16, dtype=torch.bfloat16)
    small = torch.ones(2, 8, 8, dtype=torch.bfloat16)
    for arguments, error, words in (
        ({"a": a.float()}, TypeError, "must be bfloat16"),
        ({"a": a[0]}, TypeError, r"must be 3D \(B, N, K\)"),
        ({"a": a, "c": small, "beta": 1.0}, RuntimeError, r"c must be of shape \(B, N, N\)"),
        ({"a": a, "c": a.float(), "beta": 1.0}, RuntimeError, "got .*float32.*expected .*bfloat16"),
        ({"a": a, "out": small}, RuntimeError, "out must be same shape/device/dtype"),
        ({"a": a, "out": a.to("meta")}, RuntimeError, "got .*meta.*expected .*cpu"),
        ({"a": a, "beta": 1.0}, RuntimeError, "needs a c"),
    ):
        with pytest.raises(error, match=words):
            ours.batched_tsyrk_ex(**arguments)


def test_syrk_takes_strides_that_the_peers_refuses():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-3, 4, (2, 32, 32), generator=generator).bfloat16()
    a, c, out = wide[:, ::2, ::2], wide[:, 1::2, 1::2], torch.zeros_like(wide)[:, ::2, ::2]
    c = c + c.mT
    found = ours.batched_tsyrk_ex(a, c, 1.0, 1.0, out=out)
    assert found is out
    assert torch.equal(found, (a.double() @ a.double().mT + c.double()).bfloat16())


# The Shampoo protocol


@pytest.mark.parametrize("p", [2, 4])
def test_the_shampoo_preconditioner(p):
    wanted = {name for name in dir(shampoo_base.ShampooPreconditionerProtocol)
              if not name.startswith("_")}  # fmt: skip
    assert wanted <= set(dir(ours.ShampooPreconditioner))
    state = ours.ShampooPreconditioner.init_state((6, 9), torch.device("cpu"))
    L, R = (torch.zeros(n, n, dtype=torch.float64) for n in (6, 9))
    for k in range(4):
        grad, beta = random(6, 9, seed=k), 0.0 if k == 0 else 0.5
        preconditioner = ours.ShampooPreconditioner(state, p, ridge=1e-4)
        (preconditioner.step if k else preconditioner.init_step)(grad, beta)
        preconditioner.rebind_state(state)
        L = beta * L + (1 - beta) * grad.double() @ grad.double().mT
        R = beta * R + (1 - beta) * grad.double().mT @ grad.double()
    expected = grad.double()
    for A, left in ((L, True), (R, False)):
        values, vectors = torch.linalg.eigh(A)
        root = vectors * (values + 1e-4 * eigenvalue_bound(A)) ** (-1 / p) @ vectors.mT
        expected = root @ expected if left else expected @ root
    found = preconditioner.precondition(grad)
    assert (found.double() - expected).norm() / expected.norm() < 4 * UNIT * 1e2 * 9
    broken = ours.ShampooPreconditioner(state, p, ridge=1e-4)
    before = [root.clone() for root in broken.roots]
    broken.step(torch.full((6, 9), torch.nan), 0.5)
    assert all(map(torch.equal, broken.roots, before))
    with pytest.raises(KeyError, match="root_R"):
        preconditioner.rebind_state({"L": 0, "R": 0, "root_L": 0})
    with pytest.raises(ValueError, match=r"\(m, n\)"):
        ours.ShampooPreconditioner.init_state((3,), torch.device("cpu"))


def test_switched_off_nothing_is_left():
    before = [dict(vars(owner)) for owner in (roots, soap)]
    with ours.enable(), ours.enable():
        assert [dict(vars(owner)) for owner in (roots, soap)] != before
    assert [dict(vars(owner)) for owner in (roots, soap)] == before


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(peer, "__shortversion__", "0.6.0")
    with pytest.raises(UnsupportedPeer, match=r"tested with 0\.5\.0, got 0\.6\.0"):
        ours.enable()
    with ours.enable(any_version=True):
        pass
    monkeypatch.setattr(soap, "update_kronecker_factors", lambda factors, grad: None)
    with pytest.raises(UnsupportedPeer, match="must take"):
        ours.enable(any_version=True)
