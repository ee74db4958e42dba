"""pytorch_optimizer with these kernels in it: the peer's own runs, states and formulas."""

import contextlib

import pytest
import torch
from peers import (
    CASES,
    DTYPES,
    MODELS,
    check_agreement,
    check_root,
    check_state,
    distance,
    error,
    matrices,
    need,
    rounding,
    run,
    true_root,
)

from shampoo_kernels import native, use_backend
from shampoo_kernels.integrations import pytorch_optimizer as integration

need(integration.INTEGRATION)
import pytorch_optimizer as peer  # noqa: E402
from pytorch_optimizer.optimizer.utils.preconditioner import PreConditioner  # noqa: E402

OPTIMIZERS = {
    "DASH, eigh": lambda p: peer.DASH(p, inverse_root_method="eigh", precondition_frequency=3),
    "ScalableShampoo, svd": lambda p: peer.ScalableShampoo(
        p, start_preconditioning_step=2, preconditioning_compute_steps=3, use_svd=True
    ),
    "Shampoo": lambda p: peer.Shampoo(p, preconditioning_compute_steps=3),
    "SOAP": lambda p: peer.SOAP(p, precondition_frequency=3),
}
# Iterations that stop early by default, here run to their limit.
CONVERGED = {
    "DASH, Newton": lambda p: peer.DASH(p, newton_steps=60, precondition_frequency=3),
}


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_agrees_with_the_peer(optimizer, name, dtype):
    warm = 6 if optimizer == "SOAP" and dtype == torch.float32 else 0
    check_agreement(integration.INTEGRATION, OPTIMIZERS[optimizer], name, dtype, warm)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", CONVERGED)
def test_agrees_with_the_limit_of_the_peers_iteration(optimizer, name):
    check_agreement(integration.INTEGRATION, CONVERGED[optimizer], name, torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": False},
        {"betas": (0.0, 0.9), "grafting_beta": 0.99, "correct_bias": False},
        {"start_preconditioning_step": 7, "momentum": 0.5},
        {"block_size": 9, "weight_decay": 0.1},
        {"maximize": True, "lr": 1e-4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_dash_options(name, options):
    def dash(parameters):
        options_all = {"inverse_root_method": "eigh", "precondition_frequency": 3} | options
        return peer.DASH(parameters, **options_all)

    check_agreement(integration.INTEGRATION, dash, name, torch.float64)


@pytest.mark.parametrize("optimizer", {**OPTIMIZERS, **CONVERGED})
def test_state(optimizer):
    check_state(integration.INTEGRATION, {**OPTIMIZERS, **CONVERGED}[optimizer], "mlp")


def dash(**options):
    made = peer.DASH([torch.nn.Parameter(torch.zeros(4, 4))], **options)
    return lambda A, p: made.compute_inverse_root(A.clone(), p, made.param_groups[0])


def preconditioner(A, p, **options):
    """A PreConditioner with the statistics A, all of one size and so in one stack."""
    n = A.shape[-1]
    var = torch.zeros(n * len(A) // 2, n, dtype=A.dtype)
    made = PreConditioner(var, 0.9, p, n, 1, 8192, False, 0, **options)
    made.statistics.copy_(A)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("n", [16, 100, 257])
def test_dash_is_closer_to_its_formula(n, p, dtype):
    A, eps = matrices(n, dtype), 1e-5
    torch.manual_seed(0)
    invert = dash(matrix_eps=eps)
    theirs = invert(A, p)
    with integration.enable():
        ours = invert(A, p)
    truth, kappa = true_root(A, p, eps)
    check_root(ours, theirs, truth, kappa, p)
    wide = slice(3, 7)  # from 1e4 on ten steps are not enough
    assert (error(ours, truth)[wide] < 0.01 * error(theirs, truth)[wide]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("n", [16, 100])
def test_scalable_shampoo_is_as_close_to_its_formula(n, p, dtype):
    A, eps = matrices(n, dtype), 1e-6
    torch.manual_seed(0)
    made = preconditioner(A, p)
    made.compute_pre_conditioners()
    theirs = made.pre_conditioners
    with integration.enable():
        made.compute_pre_conditioners()
    largest = torch.linalg.eigvalsh(A.double())[:, -1:]
    truth, kappa = true_root(A, p, eps * largest)
    check_root(made.pre_conditioners, theirs, truth, kappa, p)


@pytest.mark.parametrize("use_svd", [False, True])
def test_blocks_of_several_sizes(use_svd):
    torch.manual_seed(0)
    made = PreConditioner(torch.zeros(7, 11), 0.9, 0, 5, 1, 8192, False, 0, use_svd=use_svd)
    assert len({s.shape for s in made.statistics}) == 3
    G = torch.randn(7, 11)
    with integration.enable():
        made.add_statistics(G)
        made.compute_pre_conditioners()
    for S, X in zip(made.statistics, made.pre_conditioners, strict=True):
        assert torch.equal(S, S.mT)
        shift = 0 if use_svd else 1e-6 * float(torch.linalg.eigvalsh(S.double())[-1])
        truth, kappa = true_root(S, 4, shift)
        units = 4 if use_svd else 1  # of backward error: eigh commits a few, the iteration one
        assert error(X, truth) <= units * rounding(X, kappa, 4)
        assert X.untyped_storage().nbytes() == X.nbytes  # saved alone
    expected = 1e-6 * 0.9 * torch.eye(5) + 0.1 * G[:5, :5] @ G[:5, :5].T
    torch.testing.assert_close(made.statistics[0], expected)


def test_a_bad_block_keeps_its_root_alone():
    A = matrices(16, torch.float32)
    made = preconditioner(A, 4)
    with integration.enable():
        made.compute_pre_conditioners()
        before = made.pre_conditioners.clone()
        made.statistics[2, 3, 3] = torch.nan
        made.compute_pre_conditioners()
    assert torch.equal(made.pre_conditioners, before)


@pytest.mark.parametrize("p", [1, 2, 3, 8, 16])
def test_matrices_of_the_peers_own_tests(p):
    """Ones, which is singular, and zeros."""
    A = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)]).double()
    made = preconditioner(A, p)
    with integration.enable():
        made.compute_pre_conditioners()
    for X, A, largest in zip(made.pre_conditioners, made.statistics, (2.0, 1e-16), strict=True):
        damped = A + 1e-6 * largest * torch.eye(2)
        product = torch.linalg.matrix_power(X, p) @ damped
        torch.testing.assert_close(product, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_scalable_shampoo_trains_as_its_formula_says(monkeypatch):
    """Its iteration stops at 1e-3; a run with exact roots is the truth that both are held to."""

    def exact(mat_g, p, ridge_epsilon, **_):
        return true_root(mat_g, p, ridge_epsilon * torch.linalg.eigvalsh(mat_g)[-1])[0]

    def scalable(p):
        return peer.ScalableShampoo(
            p, start_preconditioning_step=2, preconditioning_compute_steps=3
        )

    theirs, _ = run(scalable, "mlp", torch.float64)
    ours, _ = run(scalable, "mlp", torch.float64, within=integration.enable)
    name = "pytorch_optimizer.optimizer.utils.preconditioner.compute_power_schur_newton"
    monkeypatch.setattr(name, exact)
    truth, _ = run(scalable, "mlp", torch.float64)
    assert distance(ours, truth, "mlp") <= 1e-9 < distance(theirs, truth, "mlp")


EXACT = {
    "DASH, eigh": lambda p: peer.DASH(p, inverse_root_method="eigh"),
    "Shampoo": lambda p: peer.Shampoo(p),
}


@pytest.mark.parametrize("optimizer", EXACT)
@pytest.mark.parametrize("shape", [(6, 5), (7,), (4, 3, 2)])
def test_nan_raises_as_in_the_peer(optimizer, shape):
    """Before the parameter is touched; the kernels alone would give a root and go on."""
    for within in (contextlib.nullcontext, integration.enable):
        p = torch.nn.Parameter(torch.ones(shape))
        made = EXACT[optimizer]([p])
        p.grad = torch.full(shape, torch.nan)
        with within(), pytest.raises(torch.linalg.LinAlgError):
            made.step()
        assert torch.equal(p, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shampoo_in_16_bits_is_the_peers(dtype):
    """The statistic of a vector is of low rank, and indefinite by rounding."""
    ends = []
    for within in (contextlib.nullcontext, integration.enable):
        p = torch.nn.Parameter(torch.zeros(7, dtype=dtype))
        made = peer.Shampoo([p], preconditioning_compute_steps=2)
        generator = torch.Generator().manual_seed(0)
        with within():
            for _ in range(6):
                p.grad = torch.randn(7, generator=generator).to(dtype)
                made.step()
        ends.append(p.detach())
    assert ends[0].count_nonzero() > 0
    assert torch.equal(*ends)


def test_other_dtypes_and_ranks_take_the_peers_way():
    torch.manual_seed(0)
    for shape, dtype in (
        ((6, 5), torch.bfloat16),
        ((4, 3, 5), torch.float32),
        ((7,), torch.float32),
    ):
        ends = []
        for within in (contextlib.nullcontext, integration.enable):
            p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
            made = peer.SOAP([p], precondition_1d=True, precondition_frequency=2)
            generator = torch.Generator().manual_seed(0)
            with within():
                for _ in range(4):
                    p.grad = torch.randn(shape, generator=generator).to(dtype)
                    made.step()
            ends.append(p.detach())
        torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["both", "input", "output"])
@pytest.mark.parametrize("shape", [(12, 6), (6, 6), (7, 11), (5, 4, 3), (4, 3, 2, 2)])
def test_scalable_shampoo_statistics(shape, kind):
    """In one stack (the first two) and one by one, of every axis."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    ends = []
    for within in (contextlib.nullcontext, integration.enable):
        var = torch.zeros(shape, dtype=torch.float64)
        made = PreConditioner(var, 0.9, 0, 6, 1, 8192, False, kind)
        with within():
            for g in G:
                made.add_statistics(g)
        ends.append(list(made.statistics))
    assert made.is_same_shapes or shape not in ((12, 6), (6, 6))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.skipif(native.lib is None, reason=str(native.why_not))
@pytest.mark.parametrize(
    ("count", "n", "alone"), [(1, 129, True), (1, 128, False), (2, 129, False)]
)
def test_one_large_block_is_decomposed_by_all_cores(count, n, alone, monkeypatch):
    """By the peer's own call: a core per block leaves the others idle."""
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(A.shape) or eigh(A))
    invert = dash(matrix_eps=1e-5, inverse_root_method="eigh")
    A = matrices(n, torch.float64)[1 : 1 + count]
    with integration.enable(), use_backend("native"):
        found = invert(A, 4)
    monkeypatch.undo()
    assert calls == ([(1, 129, 129)] if alone else [])
    truth, kappa = true_root(A, 4, 2e-5)
    assert (error(found, truth) <= 4 * rounding(found, kappa, 4)).all()
