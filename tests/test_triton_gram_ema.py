"""gram_ema_ and kronecker_power_step by the Triton kernels, in the interpreter, on CPU tensors."""

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import test_gram_ema as laws
import torch
from alive import Alive
from interpreted import form  # noqa: F401

from shampoo_kernels import kronecker_power_step, ops  # noqa: F401
from shampoo_kernels.kernels import gram_ema as kernels
from shampoo_kernels.kernels import product as product_module
from shampoo_kernels.kernels import table
from shampoo_kernels.ops import gram_ema
from shampoo_kernels.ops import kronecker_power_step as power_step

# Asked for descriptors, tensors that cannot have them (odd sizes, odd strides) take pointers.
pytestmark = [
    pytest.mark.usefixtures("form", "triton_everywhere"),
    pytest.mark.parametrize("form", ["descriptor"], indirect=True),
]


@pytest.fixture
def triton_everywhere(monkeypatch):
    for module in (gram_ema, power_step):
        monkeypatch.setattr(module, "choose_for", lambda op, x: "triton")


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (9, 1), (17, 40), (64, 48), (70, 33)])
@pytest.mark.parametrize("dtype", laws.FLOATS[1:])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values(sizes, dtype, side):
    laws.test_values(*sizes, dtype, side)


test_integers_are_exact = laws.test_integers_are_exact
test_16_bit_products_are_not_rounded = laws.test_16_bit_products_are_not_rounded
test_reads_the_lower_triangle_only_and_writes_both = (
    laws.test_reads_the_lower_triangle_only_and_writes_both
)
test_zero_factors_do_not_read = laws.test_zero_factors_do_not_read
test_tensor_factors = laws.test_tensor_factors
test_per_block_zeros_and_bad_blocks_touch_no_other = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)(laws.test_per_block_zeros_and_bad_blocks_touch_no_other)
test_batch_dimensions_and_empty = laws.test_batch_dimensions_and_empty
test_empty_sum_mirrors_the_decayed_stat = laws.test_empty_sum_mirrors_the_decayed_stat


@pytest.mark.parametrize("side", ["left", "right"])
def test_strides(side):
    laws.test_strides(side, torch.bfloat16)


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_over_k(monkeypatch, splits, side, weighted):
    monkeypatch.setattr(table, "splits", lambda *_: splits)
    m, n = (70, 96) if side == "left" else (96, 70)
    grad, old = laws.draw(2, m, n), laws.symmetric(2, 70, 70, seed=1)
    weight = laws.symmetric(2, 96, 96, seed=2) if weighted else None
    beta, alpha = torch.tensor([0.9, 0.0]), 0.3
    old[1] = torch.nan
    stat = old.tril()
    gram_ema.gram_ema_(stat, grad, beta, alpha, side=side, weight=weight)
    old[1] = 0
    laws.assert_right(stat, old, grad, beta, alpha, side, weight)
    grad.fill_(torch.nan)
    again = stat.clone()
    gram_ema.gram_ema_(again, grad, 0.5, 0.0, side=side, weight=weight)
    assert torch.equal(again, 0.5 * stat)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0.0, torch.tensor([0.0]), torch.tensor([0.5, 0.0])], ids=str)
def test_a_zero_alpha_reads_nothing(monkeypatch, splits, weighted, alpha):
    """In no product: their factor of A @ B is 0 for that block, and then neither is read."""
    factors, multiply = [], kernels.product

    def product(*operands, c=1.0, **options):
        factors.append(torch.as_tensor(c).reshape(-1)[-1].item())
        multiply(*operands, c=c, **options)

    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(table, "splits", lambda *_: splits)
    weight = laws.symmetric(2, 96, 96) if weighted else None
    old = laws.symmetric(2, 40, 40, seed=1)
    stat = gram_ema.gram_ema_(old.clone(), laws.draw(2, 40, 96), 0.5, alpha, side="left",
                              weight=weight)  # fmt: skip
    assert factors == [0.0] * (1 + weighted)
    assert torch.equal(stat[1], 0.5 * old[1])


@pytest.mark.parametrize("splits", [1, 4])
def test_the_same_in_every_run(monkeypatch, splits):
    monkeypatch.setattr(table, "splits", lambda *_: splits)
    grad = laws.draw(2, 40, 96)
    runs = [gram_ema.gram_ema_(torch.zeros(2, 40, 40), grad, 0.0, 0.3, side="left")
            for _ in range(2)]  # fmt: skip
    assert torch.equal(*runs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_sides_without_a_copy(monkeypatch, side, dtype):
    """One launch, on the memory of stat and grad, and no other tensor."""
    launches = []
    monkeypatch.setattr(product_module, "run", lambda kernel, launch, on: launches.append(launch))
    grad = laws.draw(2, 32, 48, dtype=dtype)
    n = 32 if side == "left" else 48
    stat = torch.zeros(2, n, n)
    with Alive() as alive:
        gram_ema.gram_ema_(stat, grad, 0.5, 1.0, side=side)
    assert alive.peak == 0
    (launch,) = launches
    A, B, C, D, *rest = launch.arguments
    assert {x.base.data_ptr() for x in (A, B)} == {grad.data_ptr()}
    assert {x.base.data_ptr() for x in (C, D)} == {stat.data_ptr()}
    assert rest[:2] == [None, None]


@pytest.mark.parametrize("transposed", [False, True])
def test_kronecker_power_step(transposed):
    """Sums over samples, whose gradients are concatenated along k."""
    grads = laws.draw(2, 3, 20, 33)
    grads = grads.mT.contiguous().mT if transposed else grads
    left, right = laws.symmetric(2, 20, 20, seed=1), laws.symmetric(2, 33, 33, seed=2)
    new = kronecker_power_step(grads, left, right)
    G, L, R = grads.double(), left.double()[:, None], right.double()[:, None]
    expected = (
        (G @ R @ G.mT).mean(1) / R[:, 0].square().sum((1, 2))[:, None, None],
        (G.mT @ L @ G).mean(1) / L[:, 0].square().sum((1, 2))[:, None, None],
    )
    for result, exact in zip(new, expected, strict=True):
        assert torch.equal(result, result.mT)
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)
