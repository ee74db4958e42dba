"""Which matrices the CUDA C++ kernels take, and in which form: those whose state fits the shared
memory of a thread block. Everything else goes to the other kernels.

Inverse roots keep three square matrices there, 196 KB at n = 128 in float32 (tensor cores: 198).
So all of n <= 128, in float64 n <= 96, fit where a thread block may have 227 KB (sm_90, sm_100);
on an A100 (sm_80, 163 KB) n <= 112, in float64 81, and on sm_86 and sm_89 (99 KB) n <= 80 and 64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels import native

MOST_N = 128  # of inverse_root_small_ and orthogonal_iteration_
POWER_MOST_N, POWER_VECTORS = 1024, 16  # of power_iteration on a GPU
_STATIC = 2304  # bytes at most of what they declare beside what they ask for; power: twice that


class Form(NamedTuple):
    """How float32 inverse roots up to `most_n` multiply: on tensor cores (tf32x3) or by FFMA."""

    most_n: int
    tensor_cores: bool
    measured: bool


# Not measured on any GPU. By counting, on an H100 the tensor cores take 0.7 of the time of FFMA at
# n = 128 and more than it below n = 48, where their 16 x 16 tiles are mostly padding.
FORMS = (Form(48, False, False), Form(MOST_N, True, False))


def tensor_cores(n: int, dtype: torch.dtype) -> bool:
    form = next((form for form in FORMS if n <= form.most_n), FORMS[-1])
    return dtype == torch.float32 and form.tensor_cores


def takes_root(A: Tensor) -> bool:
    """Does inverse_root_small_ take this stack on the GPU it is on?"""
    n, wide = A.shape[-1], A.dtype == torch.float64
    if native.lib is None or not _serves(A, MOST_N):
        return False
    needed = native.lib.inverse_root_small_bytes(n, wide, tensor_cores(n, A.dtype))
    return needed + _STATIC <= _limit(A.device)


def takes_basis(A: Tensor) -> bool:
    """Does orthogonal_iteration_ take this stack on the GPU it is on?"""
    if native.lib is None or not _serves(A, MOST_N):
        return False
    needed = native.lib.orthogonal_iteration_bytes(A.shape[-1], A.dtype == torch.float64)
    return needed + _STATIC <= _limit(A.device)


def takes_power(A: Tensor, vectors: int) -> bool:
    """Does power_iteration take this stack on the GPU it is on?"""
    n = A.shape[-1]
    if not _serves(A, POWER_MOST_N) or min(vectors, n) > POWER_VECTORS:
        return False
    return n * POWER_VECTORS * A.element_size() + 2 * _STATIC <= _limit(A.device)


def _serves(A: Tensor, most_n: int) -> bool:
    return A.is_cuda and A.numel() > 0 and A.shape[-1] <= most_n


def _limit(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 48 << 10)
