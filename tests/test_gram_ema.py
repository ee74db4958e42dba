"""gram_ema_: beta*stat + alpha*G W Gᵀ against float64, its triangle, its zeros, its bits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_kernels import gram_ema_, use_backend
from shampoo_kernels.native import lib

BACKENDS = ["reference", *(["native"] if lib else [])]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (8, 8), (17, 40), (33, 65), (64, 32), (130, 70)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def symmetric(*shape, seed=0, dtype=torch.float32):
    A = draw(*shape, seed=seed, dtype=torch.float64)
    return ((A + A.mT) / 2).to(dtype)


def side_of(grad, side):
    return grad if side == "left" else grad.mT


def assert_right(stat, old, grad, beta, alpha, side, weight=None):
    """Exactly symmetric; errors below (terms + 4) u (|beta S| + |alpha| |G| |W| |Gᵀ|)."""
    assert torch.equal(stat, stat.mT)
    G = side_of(grad, side).double()
    old = old.double().tril() + old.double().tril(-1).mT
    W = torch.eye(G.shape[-1], dtype=torch.float64) if weight is None else weight.double()
    beta, alpha = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1) for x in (beta, alpha))
    expected = beta * old + alpha * (G @ W @ G.mT)
    size = (beta * old).abs() + alpha.abs() * (G.abs() @ W.abs() @ G.abs().mT)
    terms = G.shape[-1] * (1 if weight is None else 2) + 4
    error = (stat.double() - expected).abs()
    assert (error <= terms * torch.finfo(stat.dtype).eps * size + 1e-40).all()


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_values(m, n, dtype, side):
    stat_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad = draw(3, m, n, dtype=dtype)
    kept, summed = (m, n) if side == "left" else (n, m)
    old = symmetric(3, kept, kept, seed=1, dtype=stat_dtype)
    stat = old.clone()
    assert gram_ema_(stat, grad, 0.9, 0.3, side=side) is stat
    assert_right(stat, old, grad, 0.9, 0.3, side)
    weight = symmetric(3, summed, summed, seed=2, dtype=stat_dtype)
    stat = old.clone()
    gram_ema_(stat, grad, 0.9, -0.3, side=side, weight=weight)
    assert_right(stat, old, grad, 0.9, -0.3, side, weight)


def test_integers_are_exact():
    """Small integers have exact products and sums in float32, in any order."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randint(-8, 9, (2, 40, 50), generator=generator)
    stat = torch.zeros(2, 40, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gram_ema_(stat, grad.to(dtype), 0.0, 1.0, side="left")
        assert torch.equal(stat, (grad @ grad.mT).float())


def test_16_bit_products_are_not_rounded():
    """1 + 2^-7 squared needs 15 bits: a product rounded to bfloat16 would lose 2^-14."""
    grad = torch.full((1, 1, 1), 1 + 2.0**-7, dtype=torch.bfloat16)
    stat = gram_ema_(torch.zeros(1, 1, 1), grad, 0.0, 1.0, side="left")
    assert stat.item() == (1 + 2.0**-7) ** 2


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 20), n=st.integers(0, 40), batch=st.integers(0, 3), seed=st.integers(0, 10**6),
    side=st.sampled_from(["left", "right"]), dtype=st.sampled_from(FLOATS[1:]),
    beta=st.floats(0, 1), alpha=st.floats(-2, 2),
)  # fmt: skip
def test_any_shape(m, n, batch, seed, side, dtype, beta, alpha):
    grad = draw(batch, m, n, seed=seed, dtype=dtype)
    kept = m if side == "left" else n
    old = symmetric(batch, kept, kept, seed=seed + 1)
    stat = gram_ema_(old.clone(), grad, beta, alpha, side=side)
    assert_right(stat, old, grad, beta, alpha, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reads_the_lower_triangle_only_and_writes_both(side):
    grad, old = draw(2, 12, 12), symmetric(2, 12, 12, seed=1)
    garbage = old.tril() + torch.full_like(old, torch.nan).triu(1)
    stat = gram_ema_(old.clone(), grad, 0.5, 1.0, side=side)
    assert torch.equal(gram_ema_(garbage, grad, 0.5, 1.0, side=side), stat)


def test_left_and_right_differ():
    grad = draw(1, 5, 5)
    left = gram_ema_(torch.zeros(1, 5, 5), grad, 0.0, 1.0, side="left")
    right = gram_ema_(torch.zeros(1, 5, 5), grad, 0.0, 1.0, side="right")
    torch.testing.assert_close(left, grad @ grad.mT)
    torch.testing.assert_close(right, grad.mT @ grad)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_zero_factors_do_not_read(weighted, as_tensor):
    """0 times NaN must not happen: beta = 0 hides stat, alpha = 0 hides grad and weight."""
    grad, old = draw(2, 6, 20), symmetric(2, 6, 6, seed=1)
    bad_grad, bad_stat = torch.full_like(grad, torch.nan), torch.full_like(old, torch.inf)
    weight = torch.eye(20).repeat(2, 1, 1) if weighted else None
    bad_weight = torch.full((2, 20, 20), torch.nan) if weighted else None

    def scalar(x):
        return torch.tensor(x) if as_tensor else x

    stat = gram_ema_(bad_stat, grad, scalar(0.0), scalar(2.0), side="left", weight=weight)
    assert_right(stat, torch.zeros_like(old), grad, 0.0, 2.0, "left")
    stat = gram_ema_(
        old.clone(), bad_grad, scalar(0.5), scalar(0.0), side="left", weight=bad_weight
    )
    assert torch.equal(stat, 0.5 * old)


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_tensor_factors(shape):
    grad, old = draw(4, 9, 30), symmetric(4, 9, 9, seed=1)
    beta, alpha = draw(4, seed=2).abs(), draw(4, seed=3)
    beta, alpha = ((x if shape == (4,) else x[0].reshape(shape)) for x in (beta, alpha))
    stat = gram_ema_(old.clone(), grad, beta, alpha, side="left")
    assert_right(stat, old, grad, beta, alpha, "left")
    mixed = gram_ema_(old.clone(), grad, 0.5, alpha, side="left")
    assert_right(mixed, old, grad, 0.5, alpha, "left")
    if shape == (4,):
        stat = gram_ema_(old.clone(), grad, beta.double(), 1, side="left")
        assert_right(stat, old, grad, beta, 1, "left")


def test_per_block_zeros_and_bad_blocks_touch_no_other():
    grad, old = draw(6, 9, 30), symmetric(6, 9, 9, seed=1)
    beta, alpha = torch.full((6,), 0.9), torch.full((6,), 0.1)
    good = gram_ema_(old.clone(), grad, beta, alpha, side="left")
    grad[1, 3, 4], old[2, 5, 1] = torch.nan, torch.inf
    grad[3], alpha[3] = torch.nan, 0
    old[4], beta[4] = torch.nan, 0
    stat = gram_ema_(old.clone(), grad, beta, alpha, side="left")
    assert torch.equal(stat[[0, 5]], good[[0, 5]])
    assert not stat[1].isfinite().all()
    assert not stat[2].isfinite().all()
    assert torch.equal(stat[3], beta[3] * old[3])
    assert stat[4].isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_strides(side, dtype):
    """Transposed, sliced, stepped and expanded gradients; padded, stepped and transposed stats."""
    m, n = 11, 19
    kept = m if side == "left" else n
    grad, old = draw(4, m, n, dtype=dtype), symmetric(4, kept, kept, seed=1)
    wide = torch.full((4, 2 * n, 3 * m), torch.nan, dtype=dtype)
    wide[:, ::2, ::3] = grad.mT
    padded = torch.full((8, kept + 3, kept + 5), 7.0)
    padded[::2, 1 : kept + 1, 2 : kept + 2] = old
    stepped = torch.full((4, 2 * kept, 2 * kept), 7.0)
    stepped[:, ::2, ::2] = old
    for view, stat in itertools.product(
        (grad, grad.mT.contiguous().mT, wide[:, ::2, ::3].mT),
        (padded[::2, 1 : kept + 1, 2 : kept + 2], stepped[:, ::2, ::2], old.clone().mT),
    ):
        stat.copy_(old)
        gram_ema_(stat, view, 0.5, 0.25, side=side)
        assert_right(stat, old, grad, 0.5, 0.25, side)
    outside = padded.clone()
    outside[::2, 1 : kept + 1, 2 : kept + 2] = 7.0
    assert (outside == 7.0).all()  # nothing beside the stat was written
    expanded = grad[:1].expand(4, m, n)
    stat = gram_ema_(old.clone(), expanded, 0.5, 0.25, side=side)
    assert_right(stat, old, expanded, 0.5, 0.25, side)


@pytest.mark.parametrize(
    "shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)]
)
def test_batch_dimensions_and_empty(shape):
    *batch, m, _ = shape
    old, grad = symmetric(*batch, m, m, seed=1), draw(*shape)
    stat = gram_ema_(old.clone(), grad, 0.5, 1.0, side="left")
    assert stat.shape == (*batch, m, m)
    torch.testing.assert_close(stat, 0.5 * old + grad @ grad.mT)


def test_empty_sum_mirrors_the_decayed_stat():
    old = symmetric(2, 5, 5) + torch.ones(5, 5).triu(1)
    stat = gram_ema_(old.clone(), torch.ones(2, 5, 0), 0.5, 1.0, side="left")
    assert torch.equal(stat, 0.5 * (old.tril() + old.tril(-1).mT))


def test_repeated_updates_are_an_average():
    """With alpha = 1 - beta and a constant gradient, the statistic tends to G Gᵀ."""
    grad, stat = draw(1, 6, 9), torch.zeros(1, 6, 6)
    for _ in range(60):
        gram_ema_(stat, grad, 0.5, 0.5, side="left")
    torch.testing.assert_close(stat, grad @ grad.mT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("m", "n"), [(70, 90), (9, 20), (300, 130)])
def test_bits_of_a_block_depend_on_it_alone(backend, weighted, m, n):
    """Garbage neighbours on every path; permutation, batch size and threads on the native one."""
    grad, old = draw(5, m, n), symmetric(5, m, m, seed=1)
    W = symmetric(5, n, n, seed=2) if weighted else None

    def update(old, grad, W):
        return gram_ema_(old.clone(), grad, 0.9, 0.1, side="left", weight=W)

    stat = update(old, grad, W)
    garbage, grad_garbage, W_garbage = old.clone(), grad.clone(), W.clone() if weighted else None
    garbage[[0, 2, 4]], grad_garbage[[0, 2]] = torch.inf, torch.nan
    if weighted:
        W_garbage[[0, 4]] = torch.nan
    with_garbage = update(garbage, grad_garbage, W_garbage)
    assert torch.equal(with_garbage[[1, 3]], stat[[1, 3]])
    if backend != "native":
        return
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = update(old[order], grad[order], W[order] if weighted else None)
    assert torch.equal(permuted, stat[order])
    assert torch.equal(update(old[2], grad[2], W[2] if weighted else None), stat[2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = update(old, grad, W)
        torch.set_num_threads(3)
        three = update(old, grad, W)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, stat)
    assert torch.equal(three, stat)


S, G, W = torch.zeros(2, 4, 4), torch.ones(2, 4, 5), torch.ones(2, 5, 5)


@pytest.mark.parametrize(("arguments", "options", "error", "words"), [
    ((S, W, 1, 1), {"side": "left"}, ValueError,
     r'stat must be \(2, 5, 5\) for grad \(2, 5, 5\) with side="left", got \(2, 4, 4\)'),
    ((S, G, 1, 1), {"side": "right"}, ValueError, r"stat must be \(2, 5, 5\)"),
    ((S[0], G, 1, 1), {"side": "left"}, ValueError, "must share their batch dimensions"),
    ((S[:1], G, 1, 1), {"side": "left"}, ValueError, "must share their batch dimensions"),
    ((S, G, 1, 1), {"side": "up"}, ValueError, 'side must be "left" or "right", got \'up\''),
    ((S, G, 1, 1), {"side": "left", "weight": S}, ValueError, r"weight must be \(2, 5, 5\)"),
    ((S, G, 1, 1), {"side": "left", "weight": W.double()}, TypeError, "weight must be float32"),
    ((S, G, 1, 1), {"side": "left", "precision": "x"}, ValueError, "precision must be"),
    ((S, G.double(), 1, 1), {"side": "left"}, TypeError, "a float64 grad needs a float64 stat"),
    ((S.half(), G, 1, 1), {"side": "left"}, TypeError, "stat must be float64 or float32"),
    ((S, G.int(), 1, 1), {"side": "left"}, TypeError, "grad must be float64 or"),
    ((S, G, "1", 1), {"side": "left"}, TypeError, "beta must be a number or a tensor, got str"),
    ((S, G, 1, None), {"side": "left"}, TypeError, "alpha must be a number or a tensor"),
    ((S, G, torch.ones(3), 1), {"side": "left"}, ValueError, "beta must have one element or 2"),
    ((S, G, 1, torch.ones(2, requires_grad=True)), {"side": "left"}, ValueError, "alpha requires"),
    ((S, S, 1, 1), {"side": "left"}, ValueError, "is written in place and must not overlap grad"),
    ((S[0].expand(2, 4, 4), G, 1, 1), {"side": "left"}, ValueError, "must not overlap itself"),
    ((S, None, 1, 1), {"side": "left"}, TypeError, "grad must be a tensor, got NoneType"),
    ((S.clone().requires_grad_(), G, 1, 1), {"side": "left"}, ValueError, "stat requires grad"),
])  # fmt: skip
def test_errors_change_nothing(arguments, options, error, words):
    before = S.clone()
    with pytest.raises(error, match=words):
        gram_ema_(*arguments, **options)
    assert torch.equal(S, before)


def test_stat_whose_batch_does_not_fold():
    stat = torch.zeros(2, 3, 4, 4).transpose(0, 1)
    with pytest.raises(ValueError, match="must fold into one view"):
        gram_ema_(stat, torch.ones(3, 2, 4, 5), 0.0, 1.0, side="left")


def test_parameters_are_fine_without_grad():
    weight = torch.nn.Parameter(torch.ones(4, 5))
    with torch.no_grad():
        stat = gram_ema_(torch.zeros(4, 4), weight, 0.0, 1.0, side="left")
    assert torch.equal(stat, torch.full((4, 4), 5.0))
