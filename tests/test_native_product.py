"""The native product and the Newton roots made of it, on every instruction set that runs here."""

import math

import pytest
import torch
from test_native_gram import DTYPES, LAYOUTS, NAN, integers, isa, mirrored, ops, poisoned, random

from shampoo_kernels.ops import roots

__all__ = ["isa"]  # the fixture, used by all tests here

# (m, k, n): below, at and above the tiles; more than one piece; more than one chunk.
SHAPES = [(1, 1, 1), (1, 5, 40), (3, 2, 17), (14, 7, 32), (15, 33, 31), (40, 3, 1), (33, 16, 65)]
LARGE = [(300, 40, 20), (20, 40, 300), (31, 900, 17), (260, 400, 250)]


def multiply(A, B, base=None, identity=0.0, beta=0.0, alpha=1.0, symmetric=False, out=None):
    if out is None:
        out = torch.full((A.shape[0], A.shape[1], B.shape[2]), NAN)
    ops.product_(out, A, B, base, identity, beta, alpha, symmetric)
    return out


def eye(m, n):
    return torch.eye(max(m, n), dtype=torch.float64)[:m, :n]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "slab contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_integers_is_exact(dtype, layout):
    for m, k, n in SHAPES + LARGE:
        A, B = (LAYOUTS[layout](integers(2, *s).to(dtype)) for s in ((m, k), (k, n)))
        C = integers(2, m, n, seed=1)
        want = A.double() @ B.double()
        assert torch.equal(multiply(A, B).double(), want), (m, k, n)
        got = multiply(A, B, C.float(), identity=3.0, beta=0.5, alpha=-2.0)
        assert torch.equal(got.double(), 3 * eye(m, n) + 0.5 * C - 2 * want), (m, k, n)
        out = C.float()
        multiply(A, B, beta=1.0, out=out)  # base is out
        assert torch.equal(out.double(), C + want), (m, k, n)


@pytest.mark.parametrize("n", [1, 5, 14, 33, 130, 300])
def test_symmetric_product_reads_and_computes_one_triangle(n):
    A = integers(2, n, 7).float()
    C = integers(2, n, n, seed=1)
    want = 3 * eye(n, n) + 0.5 * mirrored(C) + 2 * A.double() @ A.double().mT
    base = poisoned(C).float()
    got = multiply(A, A.mT, base, identity=3.0, beta=0.5, alpha=2.0, symmetric=True)
    assert torch.equal(got.double(), want)
    multiply(A, A.mT, identity=3.0, beta=0.5, alpha=2.0, symmetric=True, out=base)
    assert torch.equal(base.double(), want)


@pytest.mark.parametrize("symmetric", [False, True])
def test_product_zero_factors_do_not_read(symmetric):
    A, C = integers(2, 20, 20).float(), mirrored(integers(2, 20, 20, seed=1)).float()
    poison = torch.full_like(A, NAN)
    got = multiply(poison, poison, C, identity=1.0, beta=2.0, alpha=0.0, symmetric=symmetric)
    assert torch.equal(got, torch.eye(20) + 2 * C)
    got = multiply(A, A.mT, poison, symmetric=symmetric)
    assert torch.equal(got.double(), A.double() @ A.double().mT)
    got = multiply(A[:, :, :0], A[:, :0], C, beta=2.0, symmetric=symmetric)
    assert torch.equal(got, 2 * C)


@pytest.mark.parametrize(("blocks", "m", "n"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_product_empty(blocks, m, n):
    A, B = torch.zeros(blocks, m, 4), torch.zeros(blocks, 4, n)
    assert multiply(A, B).shape == (blocks, m, n)


def test_product_leaves_what_surrounds_it():
    A, B = integers(3, 20, 9).float(), integers(3, 9, 33).float()
    whole = torch.full((3, 24, 41), NAN)
    multiply(A, B, out=whole[:, 2:22, 3:36])
    assert torch.equal(whole[:, 2:22, 3:36].double(), A.double() @ B.double())
    whole[:, 2:22, 3:36] = NAN
    assert whole.isnan().all()


def same_bits(function, *stacks):
    """function(*stacks), the same however the blocks are put together and however many threads."""
    threads, count = torch.get_num_threads(), len(stacks[0])
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(function(*stacks))
            results.append(
                torch.cat([function(*(s[b : b + 1] for s in stacks)) for b in range(count)])
            )
            results.append(function(*(s.flip(0) for s in stacks)).flip(0))
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(result, results[0]) for result in results), results[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_product_bits_do_not_depend_on_company_or_threads(symmetric):
    A = random(3, 300, 530).float()
    B = A.mT if symmetric else random(3, 530, 270, seed=1).float()
    same, first = same_bits(lambda A, B: multiply(A, B, symmetric=symmetric), A, B)
    assert same
    A[1] = NAN
    assert torch.equal(multiply(A, B, symmetric=symmetric)[0], first[0])


@pytest.mark.parametrize(
    ("out", "left", "right", "base", "symmetric", "message"),
    [
        ((2, 4, 5), (2, 4, 3), (2, 2, 5), None, False, "dimension 1"),
        ((2, 4, 5), (2, 4, 3), (2, 3, 4), None, False, "dimension 2"),
        ((2, 4, 5), (3, 4, 3), (2, 3, 5), None, False, "dimension 0"),
        ((2, 4, 5), (2, 4, 3), (2, 3, 5), (2, 5, 5), False, "base"),
        ((2, 4, 5), (2, 4, 3), (2, 3, 5), None, True, "square"),
    ],
)
def test_product_refuses_what_would_leave_its_memory(out, left, right, base, symmetric, message):
    base = None if base is None else torch.zeros(base)
    with pytest.raises(RuntimeError, match=message):
        multiply(torch.zeros(left), torch.zeros(right), base, symmetric=symmetric,
                 out=torch.zeros(out))  # fmt: skip


def newton(A, p=2, ridge=1e-6, previous=None, root=None, scale=None):
    steps = roots.native_steps(ridge, p)
    root = torch.full(A.shape, NAN) if root is None else root
    residual, status = A.new_full(A.shape[:1], NAN), torch.zeros(len(A), dtype=torch.int8)
    ops.inverse_root_newton_(A, p, ridge, steps, scale, previous, root, residual, status)
    return root, residual, status


def with_condition(n, kappa, seed=0):
    Q = torch.linalg.qr(random(n, n, seed=seed)).Q
    return mirrored((Q * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ Q.mT)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 2, 15, 33, 130])
def test_newton_error(p, n):
    """The backward error is a few u sqrt(n) |A|, which the root magnifies by kappa/p."""
    u, kappa = 2.0**-24, 1e3
    for scale in (1e-30, 1.0, 1e30):
        A = (scale * torch.stack([with_condition(n, kappa, b) for b in range(3)])).float()
        root, residual, status = newton(poisoned(A), p)
        assert torch.equal(root, root.mT)
        assert status.tolist() == [0, 0, 0]
        assert (residual < 0.05).all()
        unit = A.double() / scale
        lambdas, V = torch.linalg.eigh(unit)
        lambdas = lambdas + 1e-6 * ops.eigenvalue_bound(unit)[:, None]
        want = (V * lambdas.pow(-1 / p)[:, None, :]) @ V.mT
        error = torch.linalg.matrix_norm(root.double() * scale ** (1 / p) - want, 2)
        bound = 8 * math.sqrt(n) * u * kappa / p * torch.linalg.matrix_norm(want, 2)
        assert (error <= bound).all()


def test_newton_of_a_block_without_a_root():
    eye = torch.eye(5)
    nan, inf, indefinite = eye.clone(), eye.clone(), eye.clone()
    nan[3, 1], inf[4, 4], indefinite[2, 2] = NAN, math.inf, -0.5
    A = torch.stack([torch.zeros(5, 5), nan, inf, -eye, indefinite, 4 * eye])
    root, residual, status = newton(A)
    assert status.tolist() == [3, 3, 3, 3, 3, 0]
    assert residual[:5].min() > 0.05
    assert torch.equal(root[:4], eye.expand(4, 5, 5))
    bound = ops.eigenvalue_bound(A[4:5])
    torch.testing.assert_close(root[4], eye * bound ** (-1 / 2))
    torch.testing.assert_close(root[5], eye / 2, rtol=2e-6, atol=0)
    previous = random(6, 5, 5).float()
    previous[1, 0, 4] = NAN
    before = previous.clone()
    got, _, status = newton(A, previous=previous, root=previous)
    assert status.tolist() == [2, 3, 2, 2, 2, 0]
    assert torch.equal(got[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    assert torch.equal(got[[1, 5]], root[[1, 5]])


@pytest.mark.parametrize("n", [37, 210])  # one thread a block; from 200 all threads share a block
def test_newton_bits_do_not_depend_on_company_or_threads(n):
    A = torch.stack([with_condition(n, 1e4, b) for b in range(3)]).float()
    same, first = same_bits(lambda A: newton(A)[0], A)
    assert same
    assert torch.equal(newton(A.mT.contiguous().mT)[0], first)
    A[1] = NAN
    assert torch.equal(newton(A)[0][[0, 2]], first[[0, 2]])
