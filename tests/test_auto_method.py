"""inverse_root with method="auto": which method it is, and that no block is left to chance."""

import math

import matrices
import pytest
import torch
from root_law import relative

from shampoo_kernels import RootStatus, eigenvalue_bound, inverse_root
from shampoo_kernels.ops.roots import auto_method


@pytest.mark.parametrize(
    ("expected", "device", "isa", "n", "p", "precision", "ridge", "floor"),
    [
        ("newton", "cpu", "avx512", 512, 2.0, "highest", 1e-6, 1e-6),
        ("eigh", "cpu", "avx512", 513, 2.0, "highest", 1e-6, 1e-6),
        ("newton", "cpu", "avx512", 1024, 2.0, "highest", 1e-5, 1e-5),
        ("newton", "cpu", "avx2", 128, 4.0, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", "avx2", 129, 4.0, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", "portable", 8, 2.0, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", None, 8, 2.0, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", "avx512", 8, 5.0, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", "avx512", 8, 1.5, "highest", 1e-4, 1e-4),
        ("eigh", "cpu", "avx512", 8, 2.0, "highest", 1e-7, 1e-7),
        ("eigh", "cpu", "avx512", 8, 2.0, "highest", 0.0, 1e-6),
        ("newton", "cuda", None, 1024, 2.0, "highest", 1e-6, 1e-6),
        ("newton", "cuda", None, 1024, 2.0, "high", 1e-6, 1e-6),
        ("product", "cuda", None, 1024, 2.0, "high", 1e-4, 1e-4),
        ("newton", "cuda", None, 1024, 3.0, "high", 1e-4, 1e-4),
        ("newton", "cuda", None, 1024, 4.0, "medium", 1e-4, 1e-4),
        ("product", "cuda", None, 1024, 4.0, "medium", 1e-3, 1e-3),
        ("eigh", "cuda", None, 1024, 1.5, "highest", 1e-6, 1e-6),
    ],
)
def test_auto_is_a_pure_function(expected, device, isa, n, p, precision, ridge, floor):
    assert auto_method(device, isa, n, p, precision, ridge, floor) == expected


@pytest.mark.parametrize("n", [5, 40])
def test_auto_leaves_no_block_to_chance(n):
    """On a CPU: what the iteration does not converge on, eigh takes."""
    A = matrices.condition(n, 1e3).float()
    A = torch.stack([A, A - 0.9e-4 * eigenvalue_bound(A) * torch.eye(n), A * math.nan])
    auto, eigh = (inverse_root(A, 2, ridge=1e-4, method=method) for method in ("auto", "eigh"))
    assert auto.status.tolist() == eigh.status.tolist() == [0, 0, RootStatus.FAILED]
    assert relative(auto.root, eigh.root.double()).nan_to_num(0).max() < 1e-2
