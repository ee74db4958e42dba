"""inverse_root against every other way to an inverse root, at the same ridge: what it costs, and
what it is worth.

`bench_roots` holds all of them against each other, p = 1 to 4, three condition numbers; what comes
from a package has its version, what is "restated" comes from the published formula (restated.py).
`bench_stacks` is against batched torch.linalg.eigh, from one large block to many small ones.
The others get the ridge computed beforehand; ours computes its own.
"""

import functools

import pytest
import restated
import torch
from cases import Damped
from conftest import QUICK, SECONDS_A_ROW
from judging import errors_of
from rivals import PACKAGES, package

from shampoo_kernels import inverse_root, native
from shampoo_kernels.ops import roots

BATCH, N = (4, 48) if QUICK else (8, 256)
STACKS = (
    [(64, 32), (2, 96)]
    if QUICK
    else [(4096, 32), (256, 64), (64, 128), (16, 256), (4, 512), (1, 512), (1, 1024), (1, 2048)]
)
damped = functools.lru_cache(maxsize=2)(Damped)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def bench_roots(versus, p, condition):
    ridge = 1e-6
    matrices = damped(BATCH, N, condition, ridge)
    functions = ours(matrices, p, ridge) | others(matrices, p)
    versus(
        functions.pop("ours"),
        functions,
        case=f"{BATCH} x {N}², p = {p}, condition {condition:.0e}, ridge {ridge:.0e}",
        errors=errors_of(
            {"ours": ours(matrices, p, ridge)["ours"], **functions},
            lambda root: matrices.error(root, p),
        ),
        flops=useful(BATCH, N, p, ridge),
        sizes={"n": N, "batch": BATCH, "p": p, "condition": condition},
    )


@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_stacks(versus, stack, p, ridge):
    if stack[1] > 1024 and p == 4:
        pytest.skip("the largest block is measured with p = 2 alone")
    matrices = damped(*stack, 1e4, ridge)
    functions = ours(matrices, p, ridge) | {
        "torch.linalg.eigh": lambda: restated.eigh_root(matrices.A, p, matrices.shift)
    }
    errors = errors_of(functions, lambda root: matrices.error(root, p))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{stack[0]} x {stack[1]}², p = {p}, condition 1e4, ridge {ridge:.0e}",
        errors=errors,
        flops=useful(*stack, p, ridge),
        budget=SECONDS_A_ROW / 2,
    )


def ours(matrices, p, ridge):
    def by(method):
        return lambda: inverse_root(matrices.A, p, ridge=ridge, method=method).root

    return {"ours": by("auto"), "ours, newton": by("newton"), "ours, eigh": by("eigh")}


def others(matrices, p):
    A, shift = matrices.A, matrices.shift
    found = {
        "torch.linalg.eigh": lambda: restated.eigh_root(A, p, shift),
        "coupled Newton, restated": lambda: restated.coupled_newton(A, p, shift),
    }
    if p == 2:
        found["OKLS, restated"] = lambda: restated.okls(A, shift)
    if p in (2, 4):
        found["Newton-DB 10, restated"] = lambda: restated.newton_db(A, p, shift, 10)
        found["Newton-DB 25, restated"] = lambda: restated.newton_db(A, p, shift, 25)
    shifted = A + shift * torch.eye(A.shape[-1])
    if (module := package("pytorch_optimizer")) is not None:
        utils = module.optimizer.utils.matrix
        name = f"pytorch_optimizer {PACKAGES['pytorch_optimizer']}"
        found[f"{name} Schur-Newton"] = lambda: torch.stack(
            [utils.compute_power_schur_newton(a, p, ridge_epsilon=0.0) for a in shifted]
        )
        found[f"{name} SVD"] = lambda: utils.compute_power_svd(shifted, p)
        if p in (2, 4):
            found[f"{name} Newton-DB 10"] = lambda: dash_root(utils, shifted, p)
    if (module := package("torch_optimizer")) is not None:
        found[f"torch_optimizer {PACKAGES['torch_optimizer']} SVD"] = lambda: torch.stack(
            [module.shampoo._matrix_power(a, -1 / p) for a in shifted]
        )
    return found


def dash_root(utils, A, p):
    """The calls that DASH of pytorch_optimizer makes with its defaults."""
    scale = 2 * utils.batched_power_iteration(A)
    if p == 4:
        A = utils.compute_power_newton_db(A, scale, inverse=False)
        scale = scale.sqrt()
    return utils.compute_power_newton_db(A, scale)


def useful(batch, n, p, ridge):
    """Operations of the products in the schedule, triangles alone, where products are what runs."""
    floor = max(ridge, 1e-6)
    if roots.auto_method("cpu", native.isa(), n, float(p), "highest", ridge, floor) != "newton":
        return None
    steps = roots.schedule("newton", floor, p, torch.float32)
    return batch * roots.products(steps, p) * n * n * (n + 1)
