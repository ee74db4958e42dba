"""The restated baselines are what they say: they converge where the formulas do, and fail where
the published ones are known to."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import cases
import restated
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error_of(root, p, condition, dtype=torch.float64, ridge=1e-8):
    matrices = cases.Damped(3, 20, condition, ridge)
    return matrices.error(root(matrices.A.to(dtype), p, matrices.shift.to(dtype)), p)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_coupled_newton_converges(p, condition):
    assert error_of(restated.coupled_newton, p, condition) < 1e-5  # where max |M - I| <= 1e-6


@pytest.mark.parametrize("p", [1, 2, 3.5, 4])
def test_eigh_root_is_exact_in_float64(p):
    assert error_of(restated.eigh_root, p, 1e4) < 1e-10


def test_a_block_that_stopped_does_not_move():
    A = torch.stack([torch.eye(6), cases.spectrum(1, 6, 1e4)[0]]).double()
    shift = torch.zeros(2, 1, 1, dtype=torch.float64)
    both = restated.coupled_newton(A, 2, shift)
    alone = restated.coupled_newton(A[:1], 2, shift[:1])
    torch.testing.assert_close(both[:1], alone, rtol=1e-12, atol=1e-12)


def test_okls_is_the_published_schedule():
    steps = restated.minimax_steps(8.5e-4, 10)
    assert steps[0] == pytest.approx((5.1825036, -5.1780985), abs=1e-6)
    assert steps[-1] == pytest.approx((1.5, -0.5), abs=1e-4)


def test_okls_takes_27_products_and_converges_to_its_floor():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.bmm.default
            return func(*args, **(kwargs or {}))

    matrices = cases.Damped(2, 16, 1e2, 1e-8)
    A, shift = matrices.A.double(), matrices.shift.double()
    bound = restated.plain_bound(A)
    with Products() as products:
        root = restated.okls(A, shift)
    assert bound.isfinite().all()
    assert products.count - 1 == 27  # the bound takes one, a matrix times a vector
    assert matrices.error(root, 2) < 1e-3


@pytest.mark.parametrize("p", [2, 4])
def test_newton_db_converges_in_25_steps_and_not_in_10(p):
    def root(steps):
        return lambda A, p, shift: restated.newton_db(A, p, shift, steps)

    assert error_of(root(25), p, 1e4) < 1e-4
    assert error_of(root(10), p, 1e4) > 0.1
    assert error_of(root(10), p, 1e2) < 1e-4


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [(cases.resnet50(), 25_557_032), (cases.vit_b(), 86_567_656), (cases.GPT2, 124_439_808),
     (cases.LLAMA_LAYER, 60_821_504)],
)  # fmt: skip
def test_models_have_as_many_parameters_as_published(shapes, parameters):
    assert cases.count(shapes) == parameters


def test_spectrum_has_its_condition():
    values = torch.linalg.eigvalsh(cases.spectrum(2, 12, 1e3).double())
    assert (values[:, -1] / values[:, 0]).tolist() == pytest.approx([1e3] * 2, rel=1e-3)
