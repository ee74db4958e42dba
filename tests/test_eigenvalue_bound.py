"""eigenvalue_bound: strict against float64 eigenvalues, tight, one block at a time."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_kernels import eigenvalue_bound, use_backend
from shampoo_kernels.native import lib
from shampoo_kernels.ops import eigenvalue_bound as module

BACKENDS = ["reference", *(["native"] if lib else [])]
SIZES = (1, 2, 3, 5, 16, 33, 64, 130)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def largest(A):
    return torch.linalg.eigvalsh(A.double().tril() + A.double().tril(-1).mT)[..., -1]


def spectrum(values, seed):
    """A symmetric float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = Q * values.double() @ Q.mT
    return (A + A.mT) / 2


@functools.cache
def families(n):
    ramp = torch.arange(1, n + 1, dtype=torch.float64)
    vector = torch.randn(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    zero_rows = spectrum(ramp, n)
    zero_rows[:: max(2, n // 3)] = 0
    zero_rows[:, :: max(2, n // 3)] = 0
    return {
        "identity": torch.eye(n, dtype=torch.float64),
        "flat": spectrum(torch.ones(n), n),
        "nearly flat": spectrum(1 + 1e-6 * ramp / n, n),
        "constant": torch.ones(n, n, dtype=torch.float64),
        "spiked": spectrum(torch.where(ramp == n, 1.0, 1e-4), n),
        "log": spectrum(torch.logspace(-6, 0, n), n),
        "power": spectrum(1 / ramp, n),
        "rank one": vector @ vector.mT,
        "rank one, scattered": torch.diag(torch.where(ramp == n // 2 + 1, 3.0, 0.0)),
        "zero rows": zero_rows,
        "hilbert": 1 / (ramp[:, None] + ramp - 1),
        "indefinite": spectrum(ramp - n / 2, n),
        "negative": -spectrum(ramp, n),
        "random signs": spectrum(ramp, n).sign(),
    }


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_strict_and_tight(n, dtype, scale):
    """At least the float64 eigenvalue, at most 1.02 times the least of the three bounds."""
    A = torch.stack([x * scale for x in families(n).values()]).to(dtype)
    bound = eigenvalue_bound(A)
    assert bound.dtype == dtype
    assert torch.isfinite(bound).all()
    # LAPACK's own error of the reference eigenvalue is of order n*u*norm.
    norm = A.double().norm(dim=(-2, -1))
    assert (bound.double() >= largest(A) - 4 * torch.finfo(torch.float64).eps * norm).all()

    X = A.double() / scale
    mean = X.diagonal(dim1=-2, dim2=-1).mean(-1)
    centred = X - mean[:, None, None] * torch.eye(n, dtype=torch.float64)
    r = X.abs().sum(-1)
    textbook = torch.stack([
        X.norm(dim=(-2, -1)),
        mean + centred.norm(dim=(-2, -1)) * ((n - 1) / n) ** 0.5,
        ((X.abs() @ r[..., None]).squeeze(-1) / r.where(r > 0, 1)).amax(-1),
    ]).amin(0) * scale  # fmt: skip
    slack = 1e-6 * norm if dtype == torch.float32 else 1e-12 * norm
    assert (bound.double() <= textbook + 0.02 * textbook.abs() + slack).all()


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5, 1e-3])
def test_nearly_flat(spread):
    """400 draws on which float32 textbook formulas fall below the eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 8, 32):
        Q, _ = torch.linalg.qr(torch.randn(100, n, n, generator=generator, dtype=torch.float64))
        values = 1 + spread * torch.randn(100, 1, n, generator=generator, dtype=torch.float64)
        A = (Q * values @ Q.mT).float()
        bound = eigenvalue_bound(A)
        assert (bound.double() >= largest(A)).all()
        assert (bound.double() <= 1.02 * largest(A) + 2 * n * spread + 1e-6).all()


def test_exact_values():
    diagonal = torch.diag(torch.tensor([3.0, 4.0]))  # Frobenius 5, Wolkowicz-Styan 4, Minc 4
    assert eigenvalue_bound(diagonal).item() == pytest.approx(4.04)
    negative = torch.tensor([[-2.0]])
    assert eigenvalue_bound(negative).item() == pytest.approx(-1.98)  # -2 + 0.01*2


def test_backends_agree(backend):
    for n in SIZES:
        A = torch.stack(list(families(n).values())).float()
        torch.testing.assert_close(
            eigenvalue_bound(A), module.bound_ref(A), rtol=4e-7, atol=1e-7 * n
        )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), exponent=st.integers(-37, 37))
def test_any_symmetric_matrix(n, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = (A * 10 ** (3 * torch.randn(n, 1, generator=generator, dtype=torch.float64))).tril()
    A = (A / A.abs().max() * 10.0**exponent).float()
    assert eigenvalue_bound(A).double() >= largest(A) * (1 - 1e-12)


def test_homogeneous_in_powers_of_two():
    A = torch.stack(list(families(33).values())).float()
    torch.testing.assert_close(
        eigenvalue_bound(A * 2.0**40), eigenvalue_bound(A) * 2.0**40, rtol=0, atol=0
    )


def test_reads_the_lower_triangle_only():
    A = torch.stack(list(families(17).values())).float()
    garbage = A.tril() + torch.full_like(A, torch.nan).triu(1)
    assert torch.equal(eigenvalue_bound(garbage), eigenvalue_bound(A))


def test_bad_blocks_touch_no_other():
    A = torch.stack([spectrum(torch.rand(9) + 0.1, seed) for seed in range(8)]).float()
    good = eigenvalue_bound(A)
    A[1, 4, 2] = torch.nan
    A[2, 3, 3] = torch.inf
    A[3, 8, 0] = -torch.inf
    A[4, 1, 1], A[4, 2, 2] = torch.inf, torch.nan
    A[5] = 0
    bound = eigenvalue_bound(A)
    assert torch.equal(bound[[0, 6, 7]], good[[0, 6, 7]])
    assert bound[1].isnan()
    assert bound[2] == torch.inf
    assert bound[3] == torch.inf
    assert bound[4].isnan()
    assert bound[5] == 0


def test_subnormal_and_huge():
    least = 2.0**-149
    A = torch.tensor([[[2 * least, 0.0], [least, 0.0]], [[3e38, 0.0], [3e38, 3e38]]])
    bound = eigenvalue_bound(A)
    assert bound[0].double() == 3 * least  # rounded up from 1.01*(1 + sqrt(2)) = 2.44
    assert bound[1] == torch.inf  # 6e38 is no float32


@pytest.mark.parametrize(
    "shape", [(0, 3, 3), (2, 0, 0), (0, 0), (2, 0, 3, 3), (2, 3, 4, 4), (5, 5)]
)
def test_shapes(shape):
    A = torch.ones(shape)
    bound = eigenvalue_bound(A)
    assert bound.shape == shape[:-2]
    if A.numel():
        assert (bound >= shape[-1]).all()
    else:
        assert (bound == 0).all()


def test_strides():
    A = torch.stack(list(families(12).values())).float()
    wide = torch.full((14, 30, 40), torch.nan)
    wide[:, 3:27:2, 5:17] = A
    assert torch.equal(eigenvalue_bound(wide[:, 3:27:2, 5:17]), eigenvalue_bound(A))
    torch.testing.assert_close(eigenvalue_bound(A.mT), eigenvalue_bound(A), rtol=1e-6, atol=1e-6)
    one = A[2]
    assert torch.equal(eigenvalue_bound(one.expand(3, 12, 12)), eigenvalue_bound(one).expand(3))


def test_pieces_do_not_matter(monkeypatch):
    """Chunks of blocks and strips of rows: the bounds of the whole to float64 rounding."""
    A = torch.stack(list(families(33).values()))
    whole = module.bound_ref(A)
    for chunk in (1, 33, 100, 33 * 33 * 3):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        torch.testing.assert_close(module.bound_ref(A), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("A", "error", "words"), [
    (torch.ones(3), ValueError, r"A must be \(\*, n, n\), got \(3,\)"),
    (torch.ones(3, 4), ValueError, r"A must be \(\*, n, n\), got \(3, 4\)"),
    (torch.ones(3, 3).half(), TypeError, r"A must be float64 or float32, got \(1, 3, 3\) float16"),
    (torch.ones(3, 3).int(), TypeError, "A must be float64 or float32"),
    (torch.ones(3, 3).requires_grad_(), ValueError, "A requires grad"),
    ([[1.0]], TypeError, "A must be a tensor, got list"),
])  # fmt: skip
def test_errors(A, error, words):
    with pytest.raises(error, match=words):
        eigenvalue_bound(A)
