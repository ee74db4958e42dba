"""How cost grows: every op on a grid of block size and number of blocks, ours, our reference, and
the torch one-liner; how many torch operations a step makes as layers are added; and what is left to
each of several processes.

The grid is what the heat map, the crossover of the backends and the fitted slopes are drawn from.
"""

import counting
import processes
import pytest
import restated
import torch
from cases import Damped, relative, transformer_layer
from conftest import QUICK, SECONDS_A_ROW
from judging import errors_of

from shampoo_kernels import gram_ema_, inverse_root, precondition, use_backend

LARGEST = 64**3 if QUICK else 1024**3  # blocks times n³
GRID = [
    (batch, n)
    for n in (32, 64, 128, 256, 512, 1024)
    for batch in (1, 4, 16, 64, 256, 1024, 4096)
    if batch * n**3 <= LARGEST
]
GRID += [] if QUICK else [(1, 2048)]
LAYERS = (1, 4, 16) if QUICK else (1, 4, 16, 64)
RANKS = (1, 2) if QUICK else (1, 2, 3, 4)
SHARED = 2 * transformer_layer(64) if QUICK else 8 * transformer_layer(128)


def reference(function):
    def run():
        with use_backend("reference"):
            return function()

    return run


def grown(versus, op, batch, n, ours, one_liner, exact, flops, take=lambda result: result):
    name, plain = one_liner
    functions = {"ours": ours, name: plain, "our reference": reference(ours)}
    errors = errors_of(functions, lambda result: relative(take(result)[:1], exact))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{op} {batch} x {n}²",
        flops=flops,
        errors=errors,
        sizes={"n": n, "batch": batch},
        budget=SECONDS_A_ROW / 4,
    )


@pytest.mark.parametrize("stack", GRID, ids=str)
def bench_gram(versus, stack):
    batch, n = stack
    grad, stat = torch.randn(batch, n, n), torch.zeros(batch, n, n)
    theirs = stat.clone()
    grown(
        versus,
        "gram_ema_",
        batch,
        n,
        lambda: gram_ema_(stat, grad, 0.0, 1.0, side="left"),
        ("baddbmm_", lambda: theirs.baddbmm_(grad, grad.mT, beta=0.0, alpha=1.0)),
        grad[:1].double() @ grad[:1].double().mT,
        batch * n * (n + 1) * n,
    )


@pytest.mark.parametrize("stack", GRID, ids=str)
def bench_root(versus, stack):
    """p = 2 at the ridge of Shampoo's default."""
    batch, n = stack
    few = Damped(min(batch, 16), n, 1e4, 1e-4)
    A, shift = (x.repeat(-(-batch // 16), 1, 1) for x in (few.A, few.shift))
    grown(
        versus,
        "inverse_root",
        batch,
        n,
        lambda: inverse_root(A, 2, ridge=1e-4).root,
        ("torch.linalg.eigh", lambda: restated.eigh_root(A, 2, shift)),
        few.exact(2)[:1],
        None,
    )


@pytest.mark.parametrize("stack", GRID, ids=str)
def bench_preconditioning(versus, stack):
    batch, n = stack
    grad, left, right = (torch.randn(batch, n, n) for _ in range(3))

    def plain():
        result = torch.bmm(torch.bmm(left, grad), right)
        return result, result.square().sum((1, 2))

    grown(
        versus,
        "precondition",
        batch,
        n,
        lambda: precondition(grad, left, right),
        ("bmm, bmm, sum", plain),
        left[:1].double() @ grad[:1].double() @ right[:1].double(),
        4 * batch * n**3,
        take=lambda result: result[0],
    )


def bench_operations(note):
    layer = [(32, 24), (24, 32), (32,)]
    for name, make in counting.optimizers().items():
        counts = {layers: counting.operations(make, layers * layer) for layers in LAYERS}
        columns = {f"{layers} layers": count for layers, count in counts.items()}
        note("torch operations a step", optimizer=name, **columns)


@pytest.mark.skipif(not processes.available(), reason="torch has no gloo here")
def bench_ranks(note):
    for count in RANKS:
        found = processes.shares(SHARED, count)
        busiest = processes.Share(*map(max, zip(*found, strict=True)))
        note(
            "ranks: what the busiest has of a step",
            ranks=count,
            **{
                "part of the work": processes.work(SHARED, count),
                "MiB of statistics and roots": busiest.kept / 2**20,
                "MiB sent": busiest.sent / 2**20,
                "collectives": busiest.collectives,
                "ms of a core": 1e3 * busiest.spent,
                "ms, all ranks on the cores of this machine": 1e3 * busiest.passed,
            },
        )
