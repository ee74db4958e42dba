"""What has to hold of the CUDA C++ kernels on a GPU; gpu_checks.py runs these too, by name.

python bench/gpu_checks_native.py     a few small cases of each alone, for compute-sanitizer
"""

import functools
import math
import sys
from collections.abc import Callable

import torch
from gpu_checks_pieces import check_moments, check_pack_finite
from gpu_matrices import without_waiting

from shampoo_kernels import (
    eigenvalue_bound,
    inverse_root,
    native,
    orthogonal_iteration,
    power_iteration,
    use_backend,
)
from shampoo_kernels.ops import roots, small
from shampoo_kernels.ops.pack import Pieces

DEVICE = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not() -> str | None:
    """Why there is nothing to check here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if native.lib is None:
        return f"no native kernels: {native.why_not}"
    if not native.lib.build_facts()["cuda_archs"]:
        return f"CUDA C++ is not built: {native.facts['cuda_why_not']}"
    return None


def spectra(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Condition 1 to 1e6, low rank and a spike, (5, n, n)."""
    generator = torch.Generator(DEVICE).manual_seed(n)
    X = torch.randn(5, n, n, generator=generator, device=DEVICE, dtype=torch.float64)
    Q = torch.linalg.qr(X).Q
    values = [torch.logspace(0, -k, n, device=DEVICE).double() for k in (0, 3, 6)]
    values.append(torch.where(torch.arange(n, device=DEVICE) < 3, 1.0, 0.0).double())
    values.append(torch.where(torch.arange(n, device=DEVICE) < 1, 1.0, 1e-5).double())
    A = (Q * torch.stack(values)[:, None, :]) @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


def small_root(
    A: torch.Tensor, p: int, ridge: float, tensor_cores: bool, previous: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inverse_root_small_ in a form of choice."""
    root, residual = torch.full_like(A, math.nan), A.new_full(A.shape[:1], math.nan)
    status = torch.full(A.shape[:1], -1, dtype=torch.int8, device=DEVICE)
    steps = roots.steps_with_reach(ridge, p, A.dtype)
    torch.ops.shampoo_kernels_native.inverse_root_small_(
        A, p, ridge, steps, tensor_cores, None, previous, root, residual, status
    )
    return root, residual, status


def check_small_root(n: int, dtype: torch.dtype, tensor_cores: bool) -> None:
    """Against float64 eigh, in multiples of unit * kappa / p; bad blocks, neighbours, strides."""
    ridge = 1e-6 if dtype == torch.float32 else 1e-8
    needed = native.lib.inverse_root_small_bytes(n, dtype == torch.float64, tensor_cores)
    if needed + small._STATIC > small._limit(torch.device(DEVICE)):
        print(f"  n = {n} does not fit this GPU's shared memory")
        return
    A = spectra(n, dtype)
    values, vectors = torch.linalg.eigh(A.double())
    for p in (1, 2, 3, 4):
        root, residual, status = small_root(A.tril(), p, ridge, tensor_cores)
        shifted = values.clamp(min=0) + ridge * eigenvalue_bound(A).double()[:, None]
        exact = (vectors * shifted.pow(-1 / p)[:, None, :]) @ vectors.mT
        error = (root.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        kappa = shifted.amax(1) / shifted.amin(1)
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-22 if tensor_cores else 2.0**-24
        assert status.tolist() == [0] * 5, (p, status)
        assert (residual < 0.05).all()
        assert torch.equal(root, root.mT)
        assert (error <= (8 + 4 * kappa / p) * unit * 8).all(), (n, p, error)
    bad = A.clone()
    bad[0], bad[1, n - 1, 0], bad[2] = 0, math.nan, -A[2]
    previous = torch.randn(5, n, n, device=DEVICE, dtype=dtype).mT
    root, _, status = small_root(bad, 2, ridge, tensor_cores, previous)
    assert status.tolist()[:3] == [2, 2, 2]
    assert torch.equal(root[:3], previous[:3])
    again, _, _ = small_root(A, 2, ridge, tensor_cores)
    assert torch.equal(root[3:], again[3:])
    wide = torch.full((5, n, 2 * n + 1), math.nan, device=DEVICE, dtype=dtype)
    wide[:, :, 1::2] = A
    assert torch.equal(small_root(wide[:, :, 1::2], 2, ridge, tensor_cores)[0], again)


def check_large_stack() -> None:
    """One launch, 5000 matrices: the same bits as one by one."""
    A = spectra(32, torch.float32).repeat(1000, 1, 1)
    root = small_root(A, 2, 1e-6, False)[0]
    assert torch.equal(root, small_root(A[:5], 2, 1e-6, False)[0].repeat(1000, 1, 1))


def check_bound_and_power(n: int, dtype: torch.dtype) -> None:
    A = spectra(n, dtype)
    exact = torch.linalg.eigvalsh(A.double()).abs().amax(1)
    with use_backend("native"):
        bound, found = eigenvalue_bound(A).double(), power_iteration(A, 10).double()
    assert (bound >= exact).all()
    eps = torch.finfo(dtype).eps
    assert (found <= exact * (1 + 8 * n * eps)).all()
    with use_backend("reference"):
        expected = power_iteration(A, 10).double()
    assert (1 - found / exact <= 1.05 * (1 - expected / exact) + 1e-5).all()


def check_basis(n: int, dtype: torch.dtype) -> None:
    A = spectra(n, dtype)
    Q = torch.linalg.qr(torch.randn_like(A)).Q
    with use_backend("native"):
        eigenvalues, new = orthogonal_iteration(A, Q, 2)
    unit = torch.finfo(dtype).eps
    eye = torch.eye(n, dtype=dtype, device=DEVICE)
    assert ((new.mT @ new - eye).abs().amax((1, 2)) <= 10 * unit * n**0.5).all()
    rayleigh = (new.mT.double() @ A.double() @ new.double()).diagonal(dim1=1, dim2=2)
    assert ((eigenvalues - rayleigh).abs() <= 16 * unit * n**0.5).all()


def check_pack() -> None:
    """Every dtype and stride, thousands of pieces, zero factors, and the same as the reference."""
    data, stacks = [], []
    for k in range(2000):
        m, n = 1 + k % 37, 4 * (1 + k % 53) + (k % 3 == 0)
        x = torch.randn(n, m + 2, device=DEVICE).to(FLOATS[k % 4])
        data.append(x.mT[1 : m + 1] if k % 5 == 0 else x[:, :m].contiguous()[:, : max(1, m - 1)])
        stacks.append(torch.empty(1, *data[-1].shape, device=DEVICE, dtype=torch.float32))
    pieces, packed = Pieces(data, stacks), [stack[0] for stack in stacks]
    with use_backend("native"):
        pieces.pack_()
        assert all(torch.equal(p, x.float()) for x, p in zip(data, packed, strict=True))
        decay = torch.rand(len(data), device=DEVICE, dtype=pieces.factor_dtype)
        step = torch.randn(len(data), device=DEVICE, dtype=pieces.factor_dtype)
        decay[::7], step[::7] = 1, 0
        before = [x.to(torch.float64, copy=True) for x in data]
        pieces.apply_(decay, step)
    for d, s, x, old, p in zip(decay, step, data, before, packed, strict=True):
        wanted, eps = d * old + s * p.double(), torch.finfo(x.dtype).eps
        size = (d * old).abs() + (s * p.double()).abs()
        assert ((x.double() - wanted).abs() <= eps * wanted.abs() + 2.0**-21 * size + 1e-7).all()


def check_graph() -> None:
    """Every kernel under the synchronisation check, captured, and replayed to the same bits; the
    graph keeps tables of its own, and a replay packs what is there by then."""
    A, W = spectra(64, torch.float32), torch.randn(5, 64, 64, device=DEVICE)
    Q = torch.linalg.qr(torch.randn_like(A)).Q
    half, stack = W.bfloat16(), torch.empty_like(W)
    decay, step = torch.ones(5, device=DEVICE), torch.full((5,), -0.1, device=DEVICE)

    def everything() -> list[torch.Tensor]:
        pieces = Pieces(list(half.unbind()), [stack])
        pieces.pack_()
        packed = stack.clone()
        root = inverse_root(A, 2, method="newton").root
        torch.bmm(root, W, out=stack)
        pieces.apply_(decay, step * 0)
        return [packed, root, stack, eigenvalue_bound(A), power_iteration(A),
                *orthogonal_iteration(A, Q)]  # fmt: skip

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with use_backend("native"), torch.cuda.stream(stream):
        everything()
        expected = without_waiting(everything)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = everything()
        half.neg_()
        graph.replay()
        torch.cuda.synchronize()
    expected[0].neg_()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


SINGLE, DOUBLE = torch.float32, torch.float64
SMALL: dict[str, Callable[[], None]] = {
    **{
        f"native root n={n} {str(dtype)[6:]}{' tensor cores' * form}": functools.partial(
            check_small_root, n, dtype, form
        )
        for n in (1, 17, 36, 72)
        for dtype, form in ((SINGLE, False), (SINGLE, True), (DOUBLE, False))
    },
    "native bound, power n=33": functools.partial(check_bound_and_power, 33, SINGLE),
    "native basis n=33": functools.partial(check_basis, 33, SINGLE),
    "native pack_finite, 20 stacks": functools.partial(check_pack_finite, 20),
    "native moments, 20 stacks": functools.partial(check_moments, 20, SINGLE),
}
LARGE: dict[str, Callable[[], None]] = {
    **{
        f"native root n={n} float32{' tensor cores' * form}": functools.partial(
            check_small_root, n, SINGLE, form
        )
        for n in (32, 64, 88, 96, 128)
        for form in (False, True)
    },
    "native root n=96 float64": functools.partial(check_small_root, 96, DOUBLE, False),
    "native root, large stack": check_large_stack,
    **{
        f"native bound, power n={n} {str(dtype)[6:]}": functools.partial(
            check_bound_and_power, n, dtype
        )
        for n in (1, 300, 1024)
        for dtype in (SINGLE, DOUBLE)
    },
    "native basis n=128": functools.partial(check_basis, 128, SINGLE),
    "native basis n=96 float64": functools.partial(check_basis, 96, DOUBLE),
    "native pack": check_pack,
    "native pack_finite": functools.partial(check_pack_finite, 1000),
    "native moments": functools.partial(check_moments, 1000, SINGLE),
    "native moments float64": functools.partial(check_moments, 100, DOUBLE),
    "native graphs": check_graph,
}


def main() -> int:
    if reason := why_not():
        print(f"nothing was checked: {reason}", file=sys.stderr)
        return 1
    for name, check in SMALL.items():
        check()
        torch.cuda.synchronize()
        print(f"passed  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
