"""orthogonalize: the polar factor against the SVD, Muon's steps against theirs."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from shampoo_kernels import native, orthogonalize, use_backend

MUON = (3.4445, -4.7750, 2.0315)


@functools.cache
def frame(m, k, seed=0):
    generator = torch.Generator().manual_seed(1000 * m + seed)
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q


def with_values(values, m, n, seed=0):
    """(m, n) float64 with these min(m, n) singular values, and its polar factor."""
    k = min(m, n)
    U, V = frame(m, k, seed), frame(n, k, seed + 1)
    return U * values.double() @ V.mT, U @ V.mT


def polar(G):
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


def spectral(X):
    return torch.linalg.svdvals(X)[..., 0]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (7, 1), (5, 5), (24, 60), (60, 24), (96, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_factor(m, n, dtype):
    """Rounding G by u moves its polar factor by u*κ, so the error model is u*(c + 4κ).

    c is what the first steps leave of large singular values that the cushion lets fall to about a
    tenth, five times over at worst.
    """
    u = torch.finfo(dtype).eps
    top = 6 if dtype == torch.float32 else 11
    for k in range(top):
        G, _ = with_values(torch.logspace(0, -k, min(m, n), dtype=torch.float64), m, n, k)
        G = G.to(dtype)
        X = orthogonalize(G)
        assert X.dtype == dtype
        kappa = 10.0**k if min(m, n) > 1 else 1.0
        assert spectral(X.double() - polar(G)) <= u * (100 + 4 * kappa), k
        S = X.double() @ X.double().mT if m <= n else X.double().mT @ X.double()
        assert (S - torch.eye(min(m, n), dtype=torch.float64)).abs().max() <= 40 * u, k


def test_many_draws_stay_bounded():
    """Schedules without headroom diverge on about one draw in a few here."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((300, 8, 16), (40, 33, 66)):
        G = torch.randn(*shape, generator=generator)
        G *= torch.logspace(0, -4, shape[-1])
        X = orthogonalize(G)
        assert (torch.linalg.svdvals(X.double()) - 1).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-30, 30),
)
def test_laws(m, n, seed, exponent):
    """Of the transpose, of the negative, and of a multiple."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64).float()
    X = orthogonalize(G)
    # Singular values at the level of rounding are not resolved: compare what is.
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=2e-4)
    if torch.linalg.cond(G.double()) < 100:
        close(orthogonalize(G.T), X.T)
        close(orthogonalize(-G), -X)
        close(orthogonalize(G * 10.0**exponent), X)
    assert spectral(X) <= 1 + 1e-5


def test_rank_deficient():
    G, _ = with_values(torch.ones(4), 4, 4)
    wide = torch.zeros(6, 9)
    wide[1:5, 2:6] = G.float()
    X = orthogonalize(wide)
    torch.testing.assert_close(X[1:5, 2:6].double(), polar(G), rtol=0, atol=2e-5)
    X[1:5, 2:6] = 0
    assert (X == 0).all()  # zero rows and columns: nothing is made up there
    vector = torch.linspace(-1, 1, 8, dtype=torch.float64)
    rank_one = torch.outer(vector, vector[:5]).float()
    values = torch.linalg.svdvals(orthogonalize(rank_one).double())
    assert abs(values[0] - 1) < 1e-5
    assert values[1:].max() <= 1 + 1e-5


def recurrence(values, coefficients):
    s = values.double()
    for a, b, c in coefficients:
        s = s * (a + b * s**2 + c * s**4)
    return s


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coefficients", [
    [MUON] * 5, [(1.5, -0.5, 0.0)] * 3, [(2.0, -1.5, 0.5), (1.875, -1.25, 0.375)],
])  # fmt: skip
def test_coefficients_act_on_singular_values(m, n, dtype, coefficients):
    """U S Vᵀ -> U f(S / ‖S‖) Vᵀ."""
    values = torch.logspace(0, -3, min(m, n), dtype=torch.float64)
    G, _ = with_values(values, m, n)
    expected, _ = with_values(recurrence(values / values.norm(), coefficients), m, n)
    u = torch.finfo(dtype).eps
    X = orthogonalize(G.to(dtype), coefficients=coefficients).double()
    # Each step may raise a rounding error by its largest gain, a: 3.4445 in five steps, 485.
    torch.testing.assert_close(X, expected, rtol=0, atol=2000 * u)


def test_one_triple_is_repeated():
    G = with_values(torch.linspace(1, 2, 6), 6, 9)[0]
    assert torch.equal(
        orthogonalize(G, coefficients=MUON), orthogonalize(G, coefficients=[MUON] * 5)
    )
    assert torch.equal(
        orthogonalize(G, coefficients=MUON, steps=3), orthogonalize(G, coefficients=[MUON] * 3)
    )


@pytest.mark.parametrize(("m", "n"), [(16, 40), (40, 16), (32, 32)])
def test_is_what_torch_muon_does(m, n):
    """torch works in bfloat16: 5 steps of 3 rounded products, u = 2^-8: at most about 15 u."""
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
    theirs = _zeropower_via_newtonschulz(G, MUON, 5, 1e-7).double()
    ours = orthogonalize(G, coefficients=MUON).double()
    assert (ours - theirs).norm() / ours.norm() < 15 * 2**-8
    assert (ours - orthogonalize(G, coefficients=MUON, steps=4)).norm() / ours.norm() > 30 * 2**-8


@pytest.fixture
def _narrow():
    """Products of bfloat16 by pairs, emulated where the CPU has none."""
    if native.lib is None:
        pytest.skip(native.why_not)
    before = native.lib.isa()
    if not native.multiplies_bfloat16():
        native.lib.set_isa("avx512-generic")
    yield
    native.lib.set_isa(before)


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize(("m", "n"), [(1, 9), (17, 17), (16, 40), (40, 16), (96, 33)])
def test_muon_in_bfloat16(m, n):
    """Three operands a step are rounded, by 2^-9 at most, in five steps."""
    generator = torch.Generator().manual_seed(m)
    G = torch.randn(4, m, n, generator=generator)
    exact = orthogonalize(G.double(), coefficients=MUON)
    medium = functools.partial(orthogonalize, coefficients=MUON, precision="medium")
    error = (medium(G).double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (error <= 15 * 2**-9).all()
    assert (error >= 2**-13).all()  # it is bfloat16
    assert torch.equal(medium(G[1]), medium(G)[1])
    assert torch.equal(medium(-G), -medium(G))
    assert torch.equal(medium(4 * G), medium(G))
    G[1], G[2, 0, 0] = 0, torch.nan
    found = medium(G)
    assert torch.equal(found[[0, 3]], medium(G[[0, 3]]))
    assert (found[1] == 0).all()
    assert found[2].isnan().all()


@pytest.mark.usefixtures("_narrow")
def test_bfloat16_is_for_muon_in_float32():
    G = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    for x, coefficients in ((G, None), (G.double(), MUON)):
        by_precision = [orthogonalize(x, coefficients=coefficients, precision=p)
                        for p in ("medium", "highest")]  # fmt: skip
        assert torch.equal(*by_precision)
    with use_backend("reference"):
        by_reference = [orthogonalize(G, coefficients=MUON, precision=p)
                        for p in ("medium", "highest")]  # fmt: skip
    assert torch.equal(*by_reference)


def test_muon_guard():
    """Norms below 1e-7 are divided by 1e-7: noise stays small. The polar factor has no guard."""
    G = torch.eye(3) * 1e-12
    a = MUON[0] ** 5
    X = orthogonalize(G, coefficients=MUON)
    torch.testing.assert_close(X, torch.eye(3) * 1e-5 * a, rtol=1e-4, atol=0)
    torch.testing.assert_close(orthogonalize(G), torch.eye(3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype):
    G = with_values(torch.linspace(1, 2, 8), 8, 20)[0].to(dtype)
    X = orthogonalize(G)
    assert X.dtype == dtype
    assert torch.equal(X, orthogonalize(G.float()).to(dtype))


@pytest.mark.parametrize("coefficients", [None, MUON])
@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5)])
def test_bad_blocks_touch_no_other(coefficients, m, n):
    G = torch.randn(6, m, n, generator=torch.Generator().manual_seed(0))
    good = orthogonalize(G, coefficients=coefficients)
    G[1, 2, 3], G[2, 0, 0], G[3, 4, 4], G[4] = torch.nan, torch.inf, -torch.inf, 0
    X = orthogonalize(G, coefficients=coefficients)
    assert torch.equal(X[[0, 5]], good[[0, 5]])
    assert X[1:4].isnan().all()
    assert (X[4] == 0).all()


@pytest.mark.parametrize("coefficients", [None, MUON])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e37])
def test_scales(coefficients, scale):
    G = with_values(torch.linspace(1, 2, 8), 8, 20)[0].float()
    expected = orthogonalize(G, coefficients=coefficients)
    X = orthogonalize(G * scale, coefficients=coefficients)
    if coefficients is None or scale > 1:
        torch.testing.assert_close(X, expected, rtol=0, atol=5e-4)
    assert X.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0), (2, 2, 3, 4), (3, 4)])
@pytest.mark.parametrize("coefficients", [None, MUON])
def test_shapes(shape, coefficients):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X = orthogonalize(G, coefficients=coefficients)
    assert X.shape == G.shape
    if coefficients is None and G.numel():
        torch.testing.assert_close(X @ X.mT, torch.eye(3).expand(*shape[:-2], 3, 3))


def test_strides_and_arguments():
    G = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.full((3, 17, 11), torch.nan)
    view = wide[:, 1:17:2, 0:10:2].mT
    view.copy_(G)
    copy = wide.clone()
    torch.testing.assert_close(orthogonalize(view), orthogonalize(G), rtol=0, atol=2e-5)
    assert torch.equal(wide.nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize(("G", "options", "error", "words"), [
    (torch.ones(3), {}, ValueError, r"G must be \(\*, m, n\), got \(3,\)"),
    (torch.ones(3, 4).int(), {}, TypeError, "G must be float64 or float32"),
    (torch.ones(3, 4).requires_grad_(), {}, ValueError, "G requires grad"),
    (torch.ones(3, 4), {"steps": 5}, ValueError, "steps must come with one triple"),
    (torch.ones(3, 4), {"steps": 2, "coefficients": [MUON]}, ValueError, "steps must come with"),
    (torch.ones(3, 4), {"steps": 0, "coefficients": MUON}, ValueError, "steps must be at least 1"),
    (torch.ones(3, 4), {"steps": 1.0, "coefficients": MUON}, TypeError, "steps must be an int"),
    (torch.ones(3, 4), {"coefficients": (1.0, 2.0)}, ValueError, r"coefficients must be \(a, b, c"),
    (torch.ones(3, 4), {"coefficients": []}, ValueError, "coefficients must be"),
    (torch.ones(3, 4), {"coefficients": [(1.0, 2.0)]}, ValueError, "coefficients must be"),
    (torch.ones(3, 4), {"precision": "low"}, ValueError, "precision must be"),
])  # fmt: skip
def test_errors(G, options, error, words):
    with pytest.raises(error, match=words):
        orthogonalize(G, **options)
