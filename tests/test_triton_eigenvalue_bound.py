"""eigenvalue_bound by the Triton kernels, in the interpreter, on CPU tensors: the laws of the op,
for blocks of one program and for blocks cut into strips."""

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import test_eigenvalue_bound as laws
import torch

from shampoo_kernels import eigenvalue_bound
from shampoo_kernels.kernels import eigenvalue_bound as kernels
from shampoo_kernels.ops import eigenvalue_bound as op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and overflow


@pytest.fixture(params=["one program", "strips"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(
        op, "choose_for", lambda op, x: "triton" if x.dtype == torch.float32 else "reference"
    )
    if request.param == "strips":
        monkeypatch.setattr(kernels, "_ONE_PROGRAM", 0)
    return request.param


@pytest.mark.parametrize("n", [1, 2, 3, 16, 33, 130])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_strict_and_tight(n, scale):
    laws.test_strict_and_tight(n, torch.float32, scale)


@pytest.mark.parametrize("n", [1, 5, 33, 70])
def test_agrees_with_the_reference(n):
    """Both sum in float64 and round up once: the last place at the most."""
    A = torch.stack(list(laws.families(n).values())).float()
    expected = op.bound_ref(A)
    torch.testing.assert_close(eigenvalue_bound(A), expected, rtol=2.0**-23, atol=0)


def test_rows_longer_than_a_chunk_of_the_last_kernel(backend):
    n = 600
    A = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    A[1] = 0
    A[1, 599, 599] = 3.0  # all of it beyond the first chunk
    assert backend == "strips" or n > kernels._ONE_PROGRAM
    torch.testing.assert_close(eigenvalue_bound(A), op.bound_ref(A), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
def test_nearly_flat(spread):
    """Where the textbook formulas fall below the eigenvalue in float32."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 8, 32):
        Q, _ = torch.linalg.qr(torch.randn(20, n, n, generator=generator, dtype=torch.float64))
        values = 1 + spread * torch.rand(20, n, generator=generator, dtype=torch.float64)
        A = Q * values[:, None] @ Q.mT
        A = ((A + A.mT) / 2).float()
        assert (eigenvalue_bound(A).double() >= laws.largest(A)).all()


def test_the_same_in_every_run():
    A = torch.stack(list(laws.families(33).values())).float()
    first = eigenvalue_bound(A)
    assert torch.equal(eigenvalue_bound(A), first)
    assert torch.equal(eigenvalue_bound(A.flip(0)), first.flip(0))
    assert torch.equal(eigenvalue_bound(A[3:5]), first[3:5])


def test_64_bit_offsets():
    """Blocks and rows more than 2^31 elements apart, of which a page or two is touched."""
    far = 2**31 + 8
    storage = torch.empty(far + 40000 * 80000, dtype=torch.float32)  # address space, not memory
    A = storage.as_strided((2, 33, 33), (far, 80000 * 1000, 1))
    A.copy_(torch.stack([torch.eye(33), 2 * torch.eye(33)]))
    torch.testing.assert_close(eigenvalue_bound(A), torch.tensor([1.01, 2.02]))


test_reads_the_lower_triangle_only = laws.test_reads_the_lower_triangle_only
test_bad_blocks_touch_no_other = laws.test_bad_blocks_touch_no_other
test_subnormal_and_huge = laws.test_subnormal_and_huge
test_strides = laws.test_strides


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0), (2, 3, 4, 4), (5, 5)])
def test_shapes(shape):
    laws.test_shapes(shape)
