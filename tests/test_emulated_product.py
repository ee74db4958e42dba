"""The products of small matrices in shared memory, in emulation: every n that a kernel takes them
for has its every element computed by some thread, once. On integers, which are exact in tf32."""

import emulation
import numpy as np
import pytest
import torch

pytestmark = emulation.needs_compiler
FLOAT32, FLOAT64 = torch.float32, torch.float64
TENSOR_CORES = 0


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("product"), "product")


def check(program, dtype, form, n, in_place):
    generator = torch.Generator().manual_seed(n)
    A = torch.randint(-3, 4, (n, n), generator=generator).to(dtype)
    A = A.tril() + A.tril(-1).mT
    factors = torch.tensor([5, -2, 3], dtype=dtype)
    data = emulation.raw(factors, A)
    result = emulation.start(program, dtype, (form, n, in_place), data)
    assert result.returncode == 0, (n, result.stderr.decode())
    size = n * n * dtype.itemsize
    D = torch.frombuffer(bytearray(result.stdout[:size]), dtype=dtype).view(n, n)
    eye = torch.eye(n, dtype=dtype)
    assert torch.equal(D, 5 * eye - 2 * A + 3 * (A @ A)), n
    largest, squares = np.frombuffer(result.stdout[size:]).reshape(-1, 2).T
    away = (D - eye).double()
    assert largest.max() == away.abs().max(), n
    torch.testing.assert_close(float(squares.sum()), away.square().sum().item(), rtol=1e-5, atol=0)


FORMS = {
    "float32, tiles of 4": (FLOAT32, 4, range(1, 65)),
    "float32, tiles of 8": (FLOAT32, 8, range(65, 129)),
    "float64": (FLOAT64, 4, range(1, 97)),
    "tensor cores": (FLOAT32, TENSOR_CORES, (*range(1, 34), 47, 48, 49, 64, 65, 95, 113, 128)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_element_at_every_size(program, form):
    """In place at every other size: the operands are read before anything is written."""
    dtype, tile, sizes = FORMS[form]
    for n in sizes:
        check(program, dtype, tile, n, in_place=n % 2 == 1)
