"""kronecker_power_step against the dense rearrangement, and the laws of the iteration."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_kernels import kronecker_power_step, use_backend
from shampoo_kernels.native import lib

SCHEMES = ["simultaneous", "alternating"]


@pytest.fixture(params=["reference", *(["native"] if lib else [])], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    # Correlated entries: a Kronecker structure plus something that is none.
    G = torch.randn(*shape, generator=generator, dtype=torch.float64)
    ramp = torch.logspace(0, -1, shape[-2], dtype=torch.float64)[:, None]
    return (G * ramp + 0.5 * G.roll(1, -1)).to(dtype)


def eyes(grads, dtype=None):
    *batch, _, m, n = grads.shape
    return tuple(torch.eye(k, dtype=dtype or grads.dtype).expand(*batch, k, k) for k in (m, n))


def dense(grads):
    """H = E[g gᵀ], g = vec(G) column-major."""
    g = grads.mT.reshape(grads.shape[0], -1)
    return g.T @ g / grads.shape[0]


def rearranged(H, m, n):
    """Ĥ[m*i' + i, n*j' + j] = H[m*j + i, m*j' + i'] (Van Loan and Pitsianis)."""
    R = torch.empty(m * m, n * n, dtype=H.dtype)
    for i, i2, j, j2 in itertools.product(range(m), range(m), range(n), range(n)):
        R[m * i2 + i, n * j2 + j] = H[m * j + i, m * j2 + i2]
    return R


def vec(X):
    return X.T.reshape(-1)


def cosine(H, left, right):
    K = torch.kron(right, left)
    return ((H * K).sum() / (H.norm() * K.norm())).item()


@pytest.mark.parametrize(("m", "n"), [(4, 5), (1, 6), (6, 1), (7, 3)])
def test_one_step_is_the_rearranged_product(m, n):
    grads = draw(40, m, n)
    left, right = draw(m, m, seed=1), draw(n, n, seed=2)
    left, right = left + left.T, right + right.T
    R = rearranged(dense(grads), m, n)
    new_left, new_right = kronecker_power_step(grads, left, right)
    torch.testing.assert_close(vec(new_left), R @ vec(right) / right.square().sum())
    torch.testing.assert_close(vec(new_right), R.T @ vec(left) / left.square().sum())
    second = kronecker_power_step(grads, left, right, scheme="alternating")
    torch.testing.assert_close(second[0], new_left)
    torch.testing.assert_close(vec(second[1]), R.T @ vec(new_left) / new_left.square().sum())


def test_rearrangement_helper():
    left, right = draw(3, 3, seed=1), draw(4, 4, seed=2)
    expected = torch.outer(vec(left), vec(right))
    torch.testing.assert_close(rearranged(torch.kron(right, left), 3, 4), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identities_give_shampoo_statistics(dtype):
    """L/n and R/m; 16-bit gradients are exact, so only float32 sums and roundings remain."""
    grads = draw(2, 6, 8, 5, dtype=dtype)
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = kronecker_power_step(grads, *eyes(grads, factor_dtype))
    G = grads.double()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {
        "rtol": 0, "atol": 1e-6 * G.square().sum((-2, -1)).mean().item()}  # fmt: skip
    assert left.dtype == factor_dtype
    torch.testing.assert_close(left.double(), (G @ G.mT).mean(1) / 5, **tolerance)
    torch.testing.assert_close(right.double(), (G.mT @ G).mean(1) / 8, **tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_converges_to_the_best_kronecker_product(scheme):
    m, n = 4, 5
    grads = draw(40, m, n)
    R = rearranged(dense(grads), m, n)
    U, S, Vh = torch.linalg.svd(R)
    left, right = eyes(grads)
    for _ in range(60):
        left, right = kronecker_power_step(grads, left, right, scheme=scheme)
    assert cosine(dense(grads), left, right) == pytest.approx((S[0] / S.norm()).item(), rel=1e-12)
    best = S[0] * torch.outer(U[:, 0], Vh[0])
    if scheme == "alternating":  # a least-squares optimum: the scale is right as well
        torch.testing.assert_close(torch.outer(vec(left), vec(right)), best)
    torch.testing.assert_close(
        torch.outer(vec(left / left.norm()), vec(right / right.norm())), best / S[0]
    )


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 5), n=st.integers(1, 5), samples=st.integers(1, 9), seed=st.integers(0, 10**6)
)
def test_alternating_steps_never_lose(m, n, samples, seed):
    grads = draw(samples, m, n, seed=seed)
    H, (left, right), last = dense(grads), eyes(grads), torch.inf
    for _ in range(4):
        left, right = kronecker_power_step(grads, left, right, scheme="alternating")
        error = (H - torch.kron(right, left)).norm()
        assert error <= last * (1 + 1e-10) + 1e-12
        last = error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_kronecker_product_is_recovered(scheme):
    """Samples with E[g gᵀ] = B ⊗ A exactly: G = X E_ij Y for all i, j: L ⊗ R / tr L = H."""
    m, n = 3, 4
    X, Y = draw(m, m, seed=1), draw(n, n, seed=2)  # square roots of A = X Xᵀ and B = Yᵀ Y
    unit = torch.eye(m * n, dtype=torch.float64).view(m * n, m, n) * (m * n) ** 0.5
    grads = X @ unit @ Y
    H = torch.kron(Y.T @ Y, X @ X.T)
    torch.testing.assert_close(dense(grads), H)
    left, right = kronecker_power_step(grads, *eyes(grads), scheme=scheme)
    assert cosine(H, left, right) == pytest.approx(1.0, abs=1e-12)
    L, R = kronecker_power_step(grads, *eyes(grads))
    L, R = L * n, R * m
    torch.testing.assert_close(torch.kron(R, L) / L.trace(), H)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exactly_symmetric_and_unchanged_arguments(scheme):
    grads, (left, right) = draw(3, 6, 33, 17, dtype=torch.float32), (None, None)
    left, right = (x.clone() for x in eyes(grads))
    copies = grads.clone(), left.clone(), right.clone()
    for _ in range(2):
        left, right = kronecker_power_step(grads, left, right, scheme=scheme)
        assert torch.equal(left, left.mT)
        assert torch.equal(right, right.mT)
    assert torch.equal(grads, copies[0])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_no_square_leaves_the_range(scale):
    """‖R‖² is no float32 here; homogeneity: the step is linear in G², and scales as 1/R."""
    grads = draw(6, 8, 5, dtype=torch.float32)
    left, right = eyes(grads)
    expected = kronecker_power_step(grads, left, right)
    new = kronecker_power_step(grads, left * scale, right * scale)
    for got, want in zip(new, expected, strict=True):
        torch.testing.assert_close(got * scale, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_blocks_touch_no_other(dtype):
    grads = draw(7, 4, 6, 5, dtype=dtype)
    left, right = (x.clone() for x in eyes(grads))
    good = kronecker_power_step(grads, left, right)
    grads[1, 2, 3, 4], grads[2, 0, 0, 0] = torch.nan, torch.inf
    left[3], right[4] = 0, 0
    left[5, 0, 0], right[5, 0, 0] = torch.nan, torch.inf
    new_left, new_right = kronecker_power_step(grads, left, right)
    for k in (0, 6):
        assert torch.equal(new_left[k], good[0][k])
        assert torch.equal(new_right[k], good[1][k])
    assert not new_left[1].isfinite().all()
    assert not new_right[2].isfinite().all()
    assert (new_right[3] == 0).all()  # of a zero left
    assert torch.equal(new_left[3], good[0][3])
    assert (new_left[4] == 0).all()
    assert not new_left[5].isfinite().any()
    assert not new_right[5].isfinite().any()


def test_strides():
    grads = draw(2, 3, 6, 5, dtype=torch.float32)
    wide = torch.full((2, 3, 11, 13), torch.nan)
    wide[:, :, :10:2, 1:13:2] = grads.mT
    left, right = eyes(grads)
    expected = kronecker_power_step(grads, left, right)
    got = kronecker_power_step(wide[:, :, :10:2, 1:13:2].mT, left, right)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "shape", [(3, 4, 5), (2, 2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]
)
def test_shapes(shape):
    grads = draw(*shape) if 0 not in shape else torch.zeros(shape, dtype=torch.float64)
    left, right = kronecker_power_step(grads, *eyes(grads))
    *batch, samples, m, n = shape
    assert left.shape == (*batch, m, m)
    assert right.shape == (*batch, n, n)
    if samples and m and n:
        torch.testing.assert_close(left, (grads @ grads.mT).mean(-3) / n)
    else:
        assert (left == 0).all()
        assert (right == 0).all()


G, L, R = torch.ones(2, 4, 5), torch.eye(4), torch.eye(5)


@pytest.mark.parametrize(("grads", "left", "right", "options", "error", "words"), [
    (G[0], L, R, {}, ValueError, r"grads must be \(\*, N, m, n\), got \(4, 5\)"),
    (G, R, R, {}, ValueError, r"left must be \(4, 4\) for grads \(2, 4, 5\), got \(5, 5\)"),
    (G, L, L, {}, ValueError, r"right must be \(5, 5\) for grads \(2, 4, 5\), got \(4, 4\)"),
    (G, L, R, {"scheme": "both"}, ValueError, 'scheme must be "simultaneous" or "alternating"'),
    (G, L, R, {"precision": "low"}, ValueError, "precision must be"),
    (G.int(), L, R, {}, TypeError, "grads must be float64 or float32 or bfloat16 or float16"),
    (G, L.half(), R.half(), {}, TypeError, "left must be float64 or float32"),
    (G, L, R.double(), {}, TypeError, "right must be float32"),
    (G.double(), L, R, {}, TypeError, "float64 grads need float64 factors"),
    (G.clone().requires_grad_(), L, R, {}, ValueError, "grads requires grad"),
    (None, L, R, {}, TypeError, "grads must be a tensor"),
])  # fmt: skip
def test_errors(grads, left, right, options, error, words):
    with pytest.raises(error, match=words):
        kronecker_power_step(grads, left, right, **options)
