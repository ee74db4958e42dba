"""The native preconditioning: the bits of its two products, on every instruction set that runs
here, whatever the threads and the stack; norms in float64."""

import pytest
import torch
from test_native_gram import NAN, isa, ops, random

__all__ = ["isa"]  # the fixture, used by all tests here

# Below and above the size from which all threads share a block; odd ones.
SHAPES = [(1, 1, 1), (3, 5, 40), (2, 33, 16), (3, 150, 190), (1, 301, 257)]


def multiply(A, B):
    out = torch.full((A.shape[0], A.shape[1], B.shape[2]), NAN)
    ops.product_(out, A, B, None, 0.0, 0.0, 1.0, False)
    return out


def precondition(grad, left, right):
    out = torch.full(grad.shape, NAN)
    return out, ops.precondition_(out, grad, left, right)


def on_threads(count, call):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_products(shape, sides, dtype):
    batch, m, n = shape
    grad = random(batch, n, m).to(dtype).mT
    left = random(batch, m, m, seed=1).float() if sides != "right" else None
    right = random(n, n, seed=2).bfloat16().expand(batch, n, n) if sides != "left" else None
    want = grad if left is None else multiply(left, grad)
    want = want if right is None else multiply(want, right)
    out, norms = precondition(grad, left, right)
    assert torch.equal(out, want)
    exact = out.double().square().sum((1, 2))
    assert ((norms.double() - exact).abs() <= 2.0**-23 * exact).all()
    for threads in (1, 3):
        again = on_threads(threads, lambda: precondition(grad, left, right))
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], norms)
    alone = precondition(grad[-1:], *(x if x is None else x[-1:] for x in (left, right)))
    assert torch.equal(alone[0], out[-1:])
    assert torch.equal(alone[1], norms[-1:])


def test_what_surrounds_it_stays():
    grad, left, right = random(2, 20, 33), random(2, 20, 20, seed=1), random(2, 33, 33, seed=2)
    whole = torch.full((2, 24, 41), NAN)
    norms = ops.precondition_(whole[:, 2:22, 3:36], *(x.float() for x in (grad, left, right)))
    assert torch.equal(norms, precondition(*(x.float() for x in (grad, left, right)))[1])
    whole[:, 2:22, 3:36] = NAN
    assert whole.isnan().all()


def test_squares_beyond_float32_are_summed():
    tiny = torch.full((1, 4, 3), 1e-25)
    assert precondition(tiny, torch.eye(4)[None], None)[1].item() == 0  # 12e-50, rounded
    column = torch.full((1, 1024, 1), 3e-22)  # whose squares are subnormal in float32
    _, norms = precondition(column, None, torch.ones(1, 1, 1))
    torch.testing.assert_close(norms.double(), column.double().square().sum()[None])
    large = torch.full((1, 2, 2), 1e19)
    assert precondition(large, torch.eye(2)[None], None)[1].item() == torch.inf


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape):
    batch, m, n = shape
    out, norms = precondition(torch.ones(shape), torch.ones(batch, m, m), torch.ones(batch, n, n))
    assert out.shape == shape
    assert torch.equal(norms, torch.zeros(batch))


def test_wrong_shapes_are_refused():
    out, A, B = torch.zeros(2, 3, 4), torch.ones(2, 3, 3), torch.ones(2, 4, 4)
    grad = out.clone()
    for args in (
        (out, grad, B, B), (out, grad, None, A), (out, grad, None, None), (out, A, A, None),
        (out[:1], grad, A, B), (out.double(), grad, A, None), (out.mT, grad.mT, B, None),
        (out, grad.double(), A, None), (out[:1].expand(2, 3, 4), grad, A, None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="precondition_: "):
            ops.precondition_(*args)
