"""What `python -m shampoo_kernels bench` measures: each op on a few stacks, with its truth."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import shampoo_kernels as sk
from shampoo_kernels.ops.pack import Pieces


class Case(NamedTuple):
    """`call` takes whatever backend is chosen around it; `error` judges its result."""

    op: str
    size: str
    device: str
    call: Callable[[], Any]
    error: Callable[[Any], Tensor | float]


def stacks(largest: int) -> list[tuple[int, int]]:
    """(blocks, n), about as many numbers in each, none larger than `largest`."""
    usual = [(256, 32), (64, 128), (4, 512), (1, 1024)]
    return [stack for stack in usual if stack[1] <= largest] or [(4, largest)]


def relative(X: Tensor, exact: Tensor) -> Tensor:
    """The Frobenius norm of the difference over that of the truth, in the worst block."""
    difference = (X.double() - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    return difference.nan_to_num(nan=math.inf).max()


def _gram(batch: int, n: int, device: str) -> Case:
    grad = torch.randn(batch, n, n, device=device)
    stat = torch.zeros_like(grad)
    exact = sk.gram_ema_(stat.double(), grad.double(), 0.0, 1.0, side="left")
    return Case(
        "gram_ema_",
        f"{batch} x {n}²",
        device,
        lambda: sk.gram_ema_(stat, grad, 0.0, 1.0, side="left"),
        lambda X: relative(X, exact),
    )


def _psd(batch: int, n: int, device: str) -> Tensor:
    """Eigenvalues over two decades, so that every method has something to do."""
    G = torch.randn(batch, n, n, device=device)
    return (G * torch.logspace(0, -1, n, device=device)) @ G.mT / n


def _root(batch: int, n: int, device: str) -> Case:
    A = _psd(batch, n, device)
    exact = sk.inverse_root(A.double(), 2, ridge=1e-4, method="eigh").root
    return Case(
        "inverse_root",
        f"{batch} x {n}²",
        device,
        lambda: sk.inverse_root(A, 2, ridge=1e-4).root,
        lambda X: relative(X, exact),
    )


def _bound(batch: int, n: int, device: str) -> Case:
    A = _psd(batch, n, device)
    exact = sk.eigenvalue_bound(A.double())
    return Case(
        "eigenvalue_bound",
        f"{batch} x {n}²",
        device,
        lambda: sk.eigenvalue_bound(A),
        lambda bound: (bound / exact - 1).abs().max(),
    )


def _power(batch: int, n: int, device: str) -> Case:
    A = _psd(batch, n, device)
    exact = sk.power_iteration(A.double(), 10, 1)
    return Case(
        "power_iteration",
        f"{batch} x {n}²",
        device,
        lambda: sk.power_iteration(A, 10, 1),
        lambda found: (found / exact - 1).abs().max(),
    )


def _orthogonal(batch: int, n: int, device: str) -> Case:
    A = _psd(batch, n, device)
    Q = torch.linalg.qr(torch.randn_like(A)).Q
    eye = torch.eye(n, dtype=torch.float64, device=device)
    return Case(
        "orthogonal_iteration",
        f"{batch} x {n}²",
        device,
        lambda: sk.orthogonal_iteration(A, Q)[1],
        lambda found: (found.double().mT @ found.double() - eye).abs().max(),
    )


def _kronecker(batch: int, n: int, device: str) -> Case:
    grads = torch.randn(batch, n, n, device=device)
    eye = torch.eye(n, device=device)
    exact = sk.kronecker_power_step(grads.double(), eye.double(), eye.double())[0]
    return Case(
        "kronecker_power_step",
        f"{batch} of {n}²",
        device,
        lambda: sk.kronecker_power_step(grads, eye, eye)[0],
        lambda X: relative(X, exact),
    )


def _precondition(batch: int, n: int, device: str) -> Case:
    grad, left, right = (torch.randn(batch, n, n, device=device) for _ in range(3))
    exact = left.double() @ grad.double() @ right.double()
    return Case(
        "precondition",
        f"{batch} x {n}²",
        device,
        lambda: sk.precondition(grad, left, right)[0],
        lambda X: relative(X, exact),
    )


def _orthogonalize(batch: int, n: int, device: str) -> Case:
    """The steps of Muon: well conditioned for any G, which the polar factor is not."""
    G, muon = torch.randn(batch, n, n, device=device), (3.4445, -4.7750, 2.0315)
    exact = sk.orthogonalize(G.double(), coefficients=muon)
    return Case(
        "orthogonalize",
        f"{batch} x {n}²",
        device,
        lambda: sk.orthogonalize(G, coefficients=muon),
        lambda X: relative(X, exact),
    )


def _pack(batch: int, n: int, device: str) -> Case:
    """Blocks of 16-bit matrices twice as wide, cast into one stack."""
    data = torch.randn(batch, n, 2 * n, device=device).bfloat16()[:, :, :n]
    stack = torch.zeros(batch, n, n, device=device)
    pieces = Pieces(data.unbind(), [stack])

    def call() -> Tensor:
        pieces.pack_()
        return stack

    exact = data.double()
    return Case("pack", f"{batch} x {n}²", device, call, lambda X: relative(X, exact))


OPS: dict[str, Callable[[int, int, str], Case]] = {
    "gram_ema_": _gram,
    "inverse_root": _root,
    "eigenvalue_bound": _bound,
    "power_iteration": _power,
    "orthogonal_iteration": _orthogonal,
    "kronecker_power_step": _kronecker,
    "precondition": _precondition,
    "orthogonalize": _orthogonalize,
    "pack": _pack,
}
