"""precondition by the Triton kernels, in the interpreter, on CPU tensors: the laws of the op."""

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import test_precondition as laws
import torch
from interpreted import form  # noqa: F401

from shampoo_kernels.kernels import precondition as kernels
from shampoo_kernels.ops import precondition as op

# Asked for descriptors, tensors that cannot have them (odd sizes, odd strides) take pointers.
pytestmark = [
    pytest.mark.usefixtures("form"),
    pytest.mark.parametrize("form", ["descriptor"], indirect=True),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(
        op, "choose_for", lambda op, x: "reference" if x.dtype == torch.float64 else "triton"
    )


@pytest.mark.parametrize("sizes", [(1, 9), (64, 32), (33, 65)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(sizes, grad_dtype, factor_dtype):
    laws.test_values(*sizes, grad_dtype, factor_dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0), (2, 2, 3, 4), (3, 4)])
def test_shapes(shape):
    laws.test_shapes(shape)


test_left_and_right_are_not_confused = laws.test_left_and_right_are_not_confused
test_identities_change_nothing = laws.test_identities_change_nothing
test_strides = laws.test_strides
test_bad_blocks_touch_no_other = pytest.mark.filterwarnings("ignore::RuntimeWarning")(
    laws.test_bad_blocks_touch_no_other
)


def test_out():
    laws.test_out(torch.bfloat16)


def test_the_norm_is_the_same_in_every_run():
    """Partial sums per tile in a fixed order, where atomics would add in any."""
    grad, left = laws.draw(2, 70, 90), laws.draw(2, 70, 70, seed=1)
    out = torch.empty(2, 70, 90)
    first = kernels.precondition_(out, grad, left, None, "highest")
    assert all(
        torch.equal(kernels.precondition_(out, grad, left, None, "highest"), first)
        for _ in range(2)
    )
