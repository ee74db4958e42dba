"""power_iteration by the Triton kernels, in the interpreter, on CPU tensors: the laws of the op."""

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import test_power_iteration as laws
import torch
from interpreted import form  # noqa: F401

from shampoo_kernels import power_iteration
from shampoo_kernels.kernels import power_iteration as kernels
from shampoo_kernels.ops import power_iteration as op

pytestmark = [
    pytest.mark.usefixtures("form"),
    pytest.mark.parametrize("form", ["pointer"], indirect=True),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of NaN
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(
        op, "choose_for", lambda op, x: "triton" if x.dtype == torch.float32 else "reference"
    )


@pytest.mark.parametrize("n", [4, 16, 64])
def test_condition_numbers(n):
    """Log-uniform spectra of condition 10 to 1e10; slower decay, wider tolerance."""
    A = torch.stack([laws.spectrum(torch.logspace(0, -k, n), k) for k in (1, 2, 4, 7, 10)]).float()
    estimate = power_iteration(A)
    laws.assert_close_below(estimate, A, 0.03)
    laws.assert_close_below(estimate[2:], A[2:], 0.005)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_families(n):
    laws.test_families(n)


@pytest.mark.parametrize("vectors", [1, 16, 17, 33])
def test_numbers_of_vectors(vectors):
    """As the reference, which more vectors than the kernels take go to: that many, no more."""
    A = torch.stack([laws.spectrum(1 / torch.arange(1.0, 81), k) for k in range(2)]).float()
    estimate = power_iteration(A, 3, vectors)
    expected = op.power_iteration_ref(A.double(), 3, vectors)
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-4, atol=0)


def test_columns_that_repeat_become_zero():
    W = torch.zeros(2, 40, 16)
    W[0, :, :3] = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    W[0, :, 3] = W[0, :, :3] @ torch.tensor([1.0, -2.0, 0.5])
    V = torch.full_like(W, torch.nan)
    kernels._orthonormalize(W, V)
    torch.testing.assert_close(V[0, :, :3].mT @ V[0, :, :3], torch.eye(3))
    assert (V[0, :, 3:] == 0).all()
    assert (V[1] == 0).all()


test_largest_floats = laws.test_largest_floats
test_bad_blocks_touch_no_other = laws.test_bad_blocks_touch_no_other
test_sixteen_vectors_beat_one = laws.test_sixteen_vectors_beat_one
test_strides = laws.test_strides


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    laws.test_scales(scale)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0), (2, 3, 4, 4), (5, 5)])
def test_shapes(shape):
    laws.test_shapes(shape)
