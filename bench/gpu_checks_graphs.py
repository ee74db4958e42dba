"""CUDA graphs, synchronisation and torch.library on a GPU; gpu_checks.py runs these, by name."""

import os
from collections.abc import Callable

import gpu_matrices
import torch
from gpu_matrices import BFLOAT16, draw, spectrum, without_waiting

from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    inverse_root,
    power_iteration,
    precondition,
)
from shampoo_kernels.kernels import graphs

BACKEND, COMPILER = "triton", "inductor"


def capture(function: Callable[[], list[torch.Tensor]], stream: torch.cuda.Stream) -> tuple:
    """(graph, what the function returned while it was captured)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        return graph, function()


def check_own_graphs() -> None:
    """SHAMPOO_KERNELS_GRAPHS=1: the bits of a refresh without graphs, for numbers that change."""
    previous = os.environ.pop("SHAMPOO_KERNELS_GRAPHS", None)
    try:
        for method, precision in (("newton", "highest"), ("product", "high")):
            for seed in range(3):
                A = spectrum(64, 10.0 ** (seed + 1))
                options = {"ridge": 1e-3, "method": method, "precision": precision,
                           "previous": spectrum(64, 2.0)}  # fmt: skip
                os.environ["SHAMPOO_KERNELS_GRAPHS"] = "0"
                expected = inverse_root(A, 2, **options)
                os.environ["SHAMPOO_KERNELS_GRAPHS"] = "1"
                result = inverse_root(A, 2, **options)
                assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
                assert BACKEND != "triton" or graphs.cache.graphs
    finally:
        os.environ.pop("SHAMPOO_KERNELS_GRAPHS")
        if previous is not None:
            os.environ["SHAMPOO_KERNELS_GRAPHS"] = previous


def check_no_synchronisation_and_graphs() -> None:
    """Every op runs under torch's synchronisation check, is captured, and replays the same bits."""
    A, grad = spectrum(96, 1e3), draw(2, 96, 64, dtype=BFLOAT16)
    stat, previous = torch.zeros(2, 96, 96, device=gpu_matrices.DEVICE), spectrum(96, 10.0)

    def everything() -> list[torch.Tensor]:
        gram_ema_(stat, grad, 0.0, 1.0, side="left")
        newton = inverse_root(A, 2, method="newton", previous=previous)
        other = inverse_root(A, 4, ridge=1e-3, method="product", precision="high")
        bounds = eigenvalue_bound(A), power_iteration(A, 3)
        return [stat, *newton, *other, *precondition(grad, newton.root, None), *bounds]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything()
        stream.synchronize()
        expected = without_waiting(everything)
        stream.synchronize()
    graph, captured = capture(everything, stream)
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def check_torch_library() -> None:
    """opcheck, and torch.compile without a graph break."""
    stat, grad = torch.zeros(2, 8, 8, device=gpu_matrices.DEVICE), draw(2, 8, 12)
    ops = torch.ops.shampoo_kernels
    try:
        import expecttest  # noqa: F401  (opcheck imports it)
    except ImportError:
        print("  without expecttest there is no opcheck")
    else:
        torch.library.opcheck(ops.gram_ema_.default, (stat, grad, 0.5, 1.0), {"side": "left"})
        options = {"method": "newton"}
        torch.library.opcheck(ops.inverse_root.default, (spectrum(8, 10.0), 2.0), options)
        torch.library.opcheck(ops.precondition.default, (grad, spectrum(8, 10.0), None))
        torch.library.opcheck(ops.eigenvalue_bound.default, (spectrum(8, 10.0),))
        torch.library.opcheck(ops.power_iteration.default, (spectrum(8, 10.0), 2, 4))

    @torch.compile(fullgraph=True, backend=COMPILER)
    def step(stat: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        gram_ema_(stat, grad, 0.5, 1.0, side="left")
        root = inverse_root(stat, 2, method="newton").root
        return precondition(grad, root, None)[0] * 2

    result = step(stat, grad)
    root = inverse_root(stat, 2, method="newton").root
    torch.testing.assert_close(result, 2 * precondition(grad, root, None)[0])


LARGE: dict[str, Callable[[], None]] = {
    "own graphs": check_own_graphs,
    "no synchronisation, graphs": check_no_synchronisation_and_graphs,
    "torch.library": check_torch_library,
}
