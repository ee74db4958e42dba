"""precondition: left @ G @ right and its squared norm, every mix of dtypes and missing factors."""

import itertools

import pytest
import torch

from shampoo_kernels import precondition

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def truth(grad, left, right):
    """float64 from the rounded inputs, and the bound |L||G||R| that rounding is relative to."""
    X, size = grad.double(), grad.double().abs()
    if left is not None:
        X, size = left.double() @ X, left.double().abs() @ size
    if right is not None:
        X, size = X @ right.double(), size @ right.double().abs()
    return X, size


def assert_right(grad, left, right, got):
    result, squared = got
    expected, size = truth(grad, left, right)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    assert result.dtype == squared.dtype == dtype
    u = torch.finfo(dtype).eps
    terms = max(1, *grad.shape[-2:])
    assert ((result.double() - expected).abs() <= 2 * terms * u * size).all()
    torch.testing.assert_close(
        squared.double(), result.double().square().sum((-2, -1)), rtol=4 * u, atol=0
    )


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (8, 3), (33, 65)])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(m, n, grad_dtype, factor_dtype):
    grad = draw(3, m, n, dtype=grad_dtype)
    left, right = draw(3, m, m, seed=1, dtype=factor_dtype), draw(3, n, n, seed=2).to(factor_dtype)
    if factor_dtype == torch.float64:
        left, right = left.float().double(), right.float().double()  # float32 grad: read in float32
    for has_left, has_right in itertools.product((True, False), repeat=2):
        factors = (left if has_left else None, right if has_right else None)
        assert_right(grad, *factors, precondition(grad, *factors))


def test_left_and_right_are_not_confused():
    """Factors that are not symmetric tell L G R from Lᵀ G R, L G Rᵀ and R G L."""
    grad, left, right = draw(4, 4), draw(4, 4, seed=1), draw(4, 4, seed=2)
    result, _ = precondition(grad, left, right)
    torch.testing.assert_close(result, left @ grad @ right)
    assert not torch.allclose(result, left.T @ grad @ right)
    assert not torch.allclose(result, left @ grad @ right.T)


def test_identities_change_nothing():
    grad = draw(2, 5, 7)
    result, squared = precondition(grad, torch.eye(5).expand(2, 5, 5), None)
    assert torch.equal(result, grad)
    result, squared = precondition(grad, None, None)
    assert torch.equal(result, grad)
    assert result.data_ptr() != grad.data_ptr()
    torch.testing.assert_close(squared, grad.square().sum((-2, -1)))


def test_sum_of_a_million_squares():
    """One float32 sum over all of these would be off by 1e-5."""
    grad = draw(1024, 1024)
    squared = precondition(grad, None, None)[1].double()
    torch.testing.assert_close(squared, grad.double().square().sum(), rtol=2e-7, atol=0)


def test_rows_are_summed_in_float64():
    """4096 of weight 2^24 beside as many ones: a float32 sum of all squares drops some of those."""
    grad = torch.ones(4096, 64)
    grad[0] = 0
    grad[0, 0] = 4096
    assert precondition(grad, None, None)[1] == 2**24 + 4095 * 64
    column = torch.full((1024, 1), 3e-22)  # whose squares are subnormal in float32
    squared = precondition(column, None, None)[1].double()
    torch.testing.assert_close(squared, column.double().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("scale", "expected"), [(1e18, 12e36), (1e-18, 12e-36), (1e20, torch.inf)])
def test_range_of_the_norm(scale, expected):
    result, squared = precondition(torch.full((3, 4), scale), None, None)
    assert squared.item() == pytest.approx(expected, rel=1e-6)
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype):
    grad, left, right = draw(3, 6, 5, dtype=dtype), draw(3, 6, 6, seed=1), draw(3, 5, 5, seed=2)
    expected, _ = precondition(grad, left, right)
    for out in (torch.empty_like(expected), torch.full((3, 5, 6), torch.nan).mT.to(expected.dtype)):
        for factors in ((left, right), (left, None), (None, right), (None, None)):
            result, squared = precondition(grad, *factors, out=out)
            assert result is out
            assert_right(grad, *factors, (result, squared))


def test_strides():
    grad = draw(3, 6, 5)
    wide = torch.full((3, 11, 17), torch.nan)
    wide[:, 1::2, 2:17] = 0
    view = wide[:, 0:10:2, 5:17:2].mT
    view.copy_(grad)
    left, right = draw(6, 6, seed=1), draw(3, 5, 5, seed=2).mT
    torch.testing.assert_close(
        precondition(view, left.expand(3, 6, 6), right),
        precondition(grad, left.repeat(3, 1, 1), right.contiguous()),
    )


def test_bad_blocks_touch_no_other():
    grad, left, right = draw(6, 4, 5), draw(6, 4, 4, seed=1), draw(6, 5, 5, seed=2)
    good = precondition(grad, left, right)
    grad[1, 2, 3], left[2, 0, 0], right[3, 1, 1], grad[4] = torch.nan, torch.inf, torch.nan, 0
    result, squared = precondition(grad, left, right)
    for k in (0, 5):
        assert torch.equal(result[k], good[0][k])
        assert torch.equal(squared[k], good[1][k])
    assert not squared[1:4].isfinite().any()
    assert squared[4] == 0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0), (2, 2, 3, 4), (3, 4)])
def test_shapes(shape):
    *batch, m, n = shape
    left, right = torch.ones(*batch, m, m), torch.ones(*batch, n, n)
    result, squared = precondition(torch.ones(shape), left, right)
    torch.testing.assert_close(result, torch.full(shape, float(m * n)))
    torch.testing.assert_close(squared, torch.full(shape[:-2], float(m * n) ** 3))


G, L, R = torch.ones(2, 4, 5), torch.ones(2, 4, 4), torch.ones(2, 5, 5)


@pytest.mark.parametrize(("arguments", "options", "error", "words"), [
    ((G[0, 0], None, None), {}, ValueError, r"grad must be \(\*, m, n\), got \(5,\)"),
    ((G, R, None), {}, ValueError, r"left must be \(2, 4, 4\) for grad \(2, 4, 5\), got"),
    ((G, L, L), {}, ValueError, r"right must be \(2, 5, 5\) for grad \(2, 4, 5\)"),
    ((G, L[0], None), {}, ValueError, r"left must be \(2, 4, 4\)"),
    ((G, L.half(), None), {}, TypeError, "left must be float64 or float32 or bfloat16"),
    ((G.int(), None, None), {}, TypeError, "grad must be float64 or float32"),
    ((G, L, R), {"out": G.double()}, TypeError, "out must be float32"),
    ((G, L, R), {"out": R}, ValueError, r"out must be \(2, 4, 5\) as grad"),
    ((G, L, R), {"out": G}, ValueError, "out is written in place and must not overlap grad"),
    ((G, L, R), {"out": G[:1].expand(2, 4, 5)}, ValueError, "must not overlap itself"),
    ((G, L, R), {"precision": "best"}, ValueError, "precision must be"),
    ((G.clone().requires_grad_(), L, R), {}, ValueError, "grad requires grad"),
    ((None, L, R), {}, TypeError, "grad must be a tensor"),
])  # fmt: skip
def test_errors(arguments, options, error, words):
    with pytest.raises(error, match=words):
        precondition(*arguments, **options)
