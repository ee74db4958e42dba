"""Distributed Shampoo's inverse roots of single matrices, and the config of our own."""

import pickle
from fractions import Fraction

import pytest
import torch
from meta_shampoo import (
    EIGEN,
    HIGHER,
    KL,
    PLAIN,
    kernel_config,
    lists,
    maker,
    matrix_functions,
    ours,
    types,
)
from peers import distance, run, tolerance

from shampoo_kernels.integrations import _distributed_shampoo_config as configs


def spectrum(n, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return Q * torch.logspace(0, -condition, n, dtype=torch.float64) @ Q.mT


def truth(A, root, shift):
    """Of the damped matrix as float32 holds it: its rounding is nobody's method's."""
    values, vectors = torch.linalg.eigh((A + shift * torch.eye(len(A))).double())
    return vectors * values ** (-1 / float(root)) @ vectors.mT


def tridiagonal(n, alpha, beta, ends):
    A = torch.diag(torch.full((n,), alpha))
    A += torch.diag(torch.full((n - 1,), beta), 1) + torch.diag(torch.full((n - 1,), beta), -1)
    A[0, 0] += beta if ends else -beta
    A[-1, -1] += beta if ends else 0
    return A


@pytest.mark.parametrize("config", [EIGEN, types.CoupledNewtonConfig(), HIGHER], ids=str)
@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("condition", [2, 4, 5])
def test_roots_are_as_close_to_the_truth_as_the_peers(config, root, condition):
    A = torch.stack([spectrum(32, condition, seed) for seed in range(4)]).float()
    epsilon = 0.0 if config is HIGHER else 1e-6
    shift = 1e-6
    call = configs.call_for(config, Fraction(root), epsilon, A.dtype, 32)
    found, solved = configs.root_of(A, Fraction(root), call)
    assert solved.all()
    theirs = torch.stack(
        [matrix_functions.matrix_inverse_root(a, Fraction(root), config, epsilon) for a in A]
    )
    exact = torch.stack([truth(a, root, shift) for a in A])
    errors = [((x - exact).norm() / exact.norm()).item() for x in (found.double(), theirs.double())]
    # Below the error model either may be lucky; above it, a LAPACK of the same name differs a bit.
    assert errors[0] <= max(1.01 * errors[1], 4 * 2.0**-24 * 10 ** (condition / 2) * 32**0.5)


def test_roots_that_no_iteration_has_are_left_to_the_peer():
    for config in (types.CoupledNewtonConfig(), HIGHER):
        for root, ours_is in ((1, True), (64, True), (65, False), (Fraction(5, 2), False)):
            call = configs.call_for(config, Fraction(root), 1e-6, torch.float32, 8)
            assert (call is not None) == ours_is
    assert configs.call_for(EIGEN, Fraction(5, 2), 1e-6, torch.float32, 8) is not None
    assert configs.call_for(EIGEN, Fraction(2), 1e-6, torch.bfloat16, 8) is None


@pytest.mark.parametrize("rtol", [None, 0.0, 1e-5])
def test_the_rank_is_the_peers(rtol):
    """Eigenvalues on both sides of rtol and of n eps, which None stands for."""
    stability = types.PseudoInverseConfig(rank_rtol=rtol)
    config = types.EigenConfig(rank_deficient_stability_config=stability)
    n, eps = 32, torch.finfo(torch.float32).eps
    small = torch.tensor([1.5 * eps, 8 * eps, 60 * eps, 5e-6, 2e-5, 1e-3])
    A = torch.diag(torch.cat([torch.ones(n - len(small)), small]))
    (found,), solved = in_one_call(A[None], 2, config)
    expected = matrix_functions.matrix_inverse_root(A, Fraction(2), config)
    assert solved
    assert ((found.diagonal() == 0) == (expected.diagonal() == 0)).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


EASY = [
    (torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([1.0, 0.5])), 2),
    (torch.tensor([[1195.0, -944, -224], [-944, 746, 177], [-224, 177, 42]]),
     torch.tensor([[1.0, 1, 1], [1, 2, -3], [1, -3, 18]]), 2),
]  # fmt: skip


@pytest.mark.parametrize(("A", "expected", "root"), EASY, ids=["diagonal", "3x3"])
@pytest.mark.parametrize("power", [1, 2])
def test_known_roots(A, expected, root, power):
    with ours.enable():
        found = lists.matrix_inverse_root(
            A, Fraction(root, power), kernel_config(ridge=0.0, method="eigh")
        )
    torch.testing.assert_close(
        found, torch.linalg.matrix_power(expected, power), rtol=1e-2, atol=0.05
    )


REPLACED = {"eigen": EIGEN, "newton": types.CoupledNewtonConfig(), "higher": HIGHER}


def in_one_call(A, root, config, epsilon=0.0):
    """What blocks of one size get in place of the peer's own function: (roots, solved)."""
    call = configs.call_for(config, Fraction(root), epsilon, A.dtype, A.shape[-1])
    return configs.root_of(A, Fraction(root), call)


@pytest.mark.parametrize("config", REPLACED)
def test_known_roots_in_place_of_the_peers(config):
    for A, expected, root in EASY:
        (found,), solved = in_one_call(A[None], root, REPLACED[config])
        assert solved or config != "eigen"  # iterations leave the second, near 1e6, to the peer
        if solved:
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.05)
    assert in_one_call(EASY[0][0][None], 2, REPLACED[config])[1]


@pytest.mark.parametrize("config", ["eigen", "newton"])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4, 8])
def test_identity_and_tridiagonal_in_place_of_the_peers(n, root, config):
    """All sizes and ratios in one call; only the singular limit may be left to the peer."""
    sizes = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    pairs = [(a, b) for a in sizes for b in sizes if 2 * b <= a]
    A = torch.stack(
        [torch.eye(n)] + [tridiagonal(n, *pair, ends) for pair in pairs for ends in (True, False)]
    )
    found, solved = in_one_call(A, root, REPLACED[config])
    assert (solved | (torch.linalg.cond(A.double()) > 1e4)).all()
    again = torch.linalg.inv(torch.linalg.matrix_power(found.double(), root))
    scale = torch.linalg.matrix_norm(A, torch.inf).clamp(min=1.0)
    errors = (again - A).abs().amax((1, 2)) / scale
    assert (errors[solved] <= 1e-4).all()
    assert (found[0] - torch.eye(n)).abs().max() < 1e-6


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_the_identity(n, root, method):
    with ours.enable():
        found = matrix_functions.matrix_inverse_root(
            torch.eye(n), Fraction(root), kernel_config(ridge=1e-7, method=method)
        )
    assert (found - torch.eye(n)).abs().max() < 1e-6


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("root", [1, 2, 4])
def test_tridiagonal_matrices(n, ends, root):
    """X^(-root) is A again, for the sizes and ratios of the peer's tests, its limit included."""
    sizes = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    with ours.enable():
        for alpha, beta in ((a, b) for a in sizes for b in sizes if 2 * b <= a):
            A = tridiagonal(n, alpha, beta, ends)
            X = matrix_functions.matrix_inverse_root(
                A, Fraction(root), kernel_config(ridge=0.0, method="eigh")
            ).double()
            again = torch.linalg.inv(torch.linalg.matrix_power(X, root))
            scale = max(1.0, torch.linalg.matrix_norm(A, torch.inf).item())
            assert torch.linalg.matrix_norm(again - A, torch.inf) <= 1e-4 * scale


def test_what_the_kernel_config_refuses():
    config = kernel_config()
    with ours.enable():
        for A, root, error in (
            (torch.ones(2), 2, ValueError),
            (torch.ones(2, 3), 2, ValueError),
            (torch.eye(2), -2, ValueError),
            (torch.full((2, 2), torch.inf), 2, ArithmeticError),
            (torch.zeros(2, 2), 2, ArithmeticError),
            (-torch.eye(2), 2, ArithmeticError),
        ):
            with pytest.raises(error):
                matrix_functions.matrix_inverse_root(A, Fraction(root), config)


@pytest.mark.parametrize("kind", [PLAIN, KL])
def test_the_kernel_config_trains_where_float32_is_rank_deficient(kind):
    config = kernel_config(ridge=1e-6)
    make = maker(config, kind, torch.float32, epsilon=1e-12)
    found, optimizer = run(make, "mlp", torch.float32, within=ours.enable)
    again = pickle.loads(pickle.dumps(optimizer.param_groups[0]["preconditioner_config"]))
    assert again.amortized_computation_config == config
    wide = maker(config, kind, torch.float64, epsilon=1e-12)
    exact, _ = run(wide, "mlp", torch.float64, within=ours.enable)
    with ours.enable():
        allowed = tolerance(make, "mlp", torch.float32, found)
    assert distance(found, exact, "mlp") <= allowed
