"""What has to hold of roots, bounds and power iteration by Triton on a GPU; gpu_checks.py runs
these, by name."""

import functools
import math
from collections.abc import Callable

import gpu_matrices
import torch
from gpu_matrices import draw, poisoned, relative, spectrum, truth

from shampoo_kernels import eigenvalue_bound, inverse_root, power_iteration, use_backend

SIZES, BOUND_SIZES = (33, 128, 260), (1, 33, 512, 1100)
WORKSPACE = (512, 160)  # n, blocks


ROOTS = [(m, p, w) for m in ("newton", "product") for p in (1, 2, 4) for w in ("highest", "high")]


def check_root(method: str, p: int, precision: str) -> None:
    """Random spectra, low rank, NaN, both sides of the switch between kinds of operands; the error
    within a multiple of unit * sqrt(kappa) for products of 16 bits, unit * kappa in float32."""
    for n in SIZES:
        for ridge in (1e-4, 1e-6):
            if (method, precision) == ("newton", "high") and ridge < 1e-4:
                continue
            G = draw(1, n, 16)
            A = torch.cat([spectrum(n, 1 / ridge), G @ G.mT, poisoned(1, n, n)])
            result = inverse_root(A.tril(), p, ridge=ridge, method=method, precision=precision)
            assert result.status.tolist() == [0, 0, 0, 3], (n, ridge, result)
            assert result.root.isfinite().all()
            assert torch.equal(result.root, result.root.mT)
            error = relative(result.root[:3], truth(A[:3], p, ridge)).max().item()
            low = precision == "high" and ridge == 1e-4
            most = 32 * 2.0**-11 * ridge**-0.5 / p if low else 32 * 2.0**-24 * ridge**-1 / p
            assert error <= max(most, 1e-5), (n, ridge, error, most)


def check_tiny_and_huge() -> None:
    """Scales whose inverse is no float32: powers of two change nothing but the root's own power."""
    A = spectrum(40, 100.0)
    one = inverse_root(A, 2, ridge=1e-3, method="newton").root
    for exponent in (-130, -126, -60, 60, 126):
        scaled = (A.double() * 2.0**exponent).float()
        for method in ("newton", "product"):
            result = inverse_root(scaled, 2, ridge=1e-3, method=method)
            assert result.status.tolist() == [0, 0], (exponent, method)
            error = relative(result.root, one.double() * 2.0 ** (-exponent / 2)).max()
            assert error < 1e-4, (exponent, method, error)


def bounded(n: int) -> torch.Tensor:
    """Flat, nearly flat, spiked, zero-row, rank-one and indefinite blocks, float64."""
    Q = torch.linalg.qr(draw(n, n).double()).Q
    ramp = torch.arange(1, n + 1, device=gpu_matrices.DEVICE, dtype=torch.float64)
    spectra = (torch.ones_like(ramp), 1 + 1e-6 * ramp / n, torch.where(ramp == n, 1.0, 1e-4),
               ramp / n, torch.where(ramp == 1, 1.0, 0.0), ramp / n - 0.5)  # fmt: skip
    A = torch.stack([(Q * values) @ Q.mT for values in spectra])
    A[3, ::3], A[3, :, ::3] = 0, 0
    return (A + A.mT) / 2


def check_bound() -> None:
    """Strict at every scale, as the reference to the last place; NaN, Inf and zero blocks."""
    for n in BOUND_SIZES:
        exact = bounded(n)
        for scale in (1e-30, 1.0, 1e30):
            A = (exact * scale).float()
            bound = eigenvalue_bound(A + poisoned(n, n).triu(1))
            largest = torch.linalg.eigvalsh(A.double())[:, -1]
            slack = 1e-14 * n * A.double().norm(dim=(1, 2))  # of float64's eigvalsh
            assert (bound.double() >= largest - slack).all(), (n, scale)
            with use_backend("reference"):
                expected = eigenvalue_bound(A)
            torch.testing.assert_close(bound, expected, rtol=2.0**-22, atol=0)
            assert torch.equal(eigenvalue_bound(A[2:3]), bound[2:3])
        A[0, n - 1, 0], A[1, n // 2, n // 2], A[2] = math.nan, math.inf, 0
        found = eigenvalue_bound(A)
        assert found[0].isnan(), n
        assert found[1] == math.inf, n
        assert found[2] == 0, n
        assert torch.equal(found[3:], bound[3:]), n


def check_power_iteration() -> None:
    """From below, close, alone: as the laws of tests/test_power_iteration.py."""
    for n in SIZES:
        A = torch.cat([spectrum(n, 1e2, 1), spectrum(n, 1e6, 1), poisoned(1, n, n)])
        estimate = power_iteration(A)
        truth = torch.linalg.eigvalsh(A[:2].double()).abs().amax(-1)
        assert (estimate[:2].double() <= truth * (1 + 4 * 2.0**-23 * n**0.5)).all(), n
        assert (estimate[:2].double() >= 0.97 * truth).all(), n
        assert estimate[2].isnan(), n
        assert torch.equal(power_iteration(A[:1], 10, 1), power_iteration(A, 10, 1)[:1]), n
        assert (power_iteration(1e30 * A[:2]) / 1e30 - estimate[:2]).abs().max() < 1e-4, n


def check_workspace() -> None:
    """A refresh of a large stack needs at most four stacks beside its result."""
    n, blocks = WORKSPACE
    A = spectrum(n, 1e3, blocks=1).repeat(blocks, 1, 1)
    for method, precision in (("newton", "highest"), ("product", "high")):
        inverse_root(A[:1], 2, ridge=1e-3, method=method, precision=precision)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inverse_root(A, 2, ridge=1e-3, method=method, precision=precision)
        extra = (torch.cuda.max_memory_allocated() - before) / A.nbytes - 1
        print(f"  {method}, {precision}: {extra:.2f} stacks beside the result")
        assert extra <= 4


SMALL: dict[str, Callable[[], None]] = {
    "bound": check_bound,
    "power iteration": check_power_iteration,
    "tiny and huge": check_tiny_and_huge,
    **{
        f"root {method} p={p} {word}": functools.partial(check_root, method, p, word)
        for method, p, word in ROOTS
    },
}
LARGE: dict[str, Callable[[], None]] = {"workspace": check_workspace}
