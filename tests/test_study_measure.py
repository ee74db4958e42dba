"""Every approximation, the singular values and the bound against the dense H in float64."""

import math
import sys

import pytest
import torch
from dense import (
    exactly_kronecker,
    gradients,
    rearranged,
    second_moment,
    spd,
    square_root,
)

from shampoo_kernels.study import (
    NAMES,
    DenseGradients,
    FactoredGradients,
    GradientHistory,
    approximations,
    cosine,
    fixed_point,
    measure,
    optimal_kronecker,
    power_steps,
    singular_values,
)

# float64 sums of at most 1e5 products of size 1: 1e5 * 2^-53 = 1e-11 before the square roots.
TOLERANCE = 1e-10


def dense_cosine(H, P):
    return float((H * P).sum() / (H.norm() * P.norm()))


def factors(examples=7, atoms=3, positions=2, m=4, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(examples, atoms, positions, m, generator=generator, dtype=torch.float64)
    act = torch.randn(examples, positions, n, generator=generator, dtype=torch.float64)
    return 3 * delta, 0.2 * act.exp()


def held_both_ways(**sizes):
    delta, act = factors(**sizes)
    dense = torch.einsum("bktm,btn->bkmn", delta, act).flatten(0, 1)
    return FactoredGradients(delta, act), DenseGradients(dense)


@pytest.mark.parametrize("chunk", [1 << 22, 40])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"positions": 1}, {"atoms": 1}, {"m": 1}, {"n": 1}, {"examples": 1}],
    ids=str,
)
def test_factors_have_the_moments_of_the_gradients_they_make(monkeypatch, sizes, chunk):
    monkeypatch.setattr("shampoo_kernels.study.gradients.CHUNK", chunk)
    factored, dense = held_both_ways(**sizes)
    m, n = dense.shape
    assert (factored.shape, factored.count) == ((m, n), dense.count)
    generator = torch.Generator().manual_seed(1)
    rough = [torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (m, n)]
    for L, R in ((spd(m, 1), spd(n, 2)), rough):  # the second pair is not symmetric
        scale = (factored.scale / dense.scale) ** 2  # each divides by its own
        for got, expected in (
            (factored.left(R), dense.left(R)),
            (factored.right(L), dense.right(L)),
            (factored.squares(L, R), dense.squares(L, R)),
            (factored.inner(L, R), dense.inner(L, R)),
            (factored.norm, dense.norm),
            (factored.trace, dense.trace),
            (factored.statistics[0], dense.left(torch.eye(n).double())),
            (factored.statistics[1], dense.right(torch.eye(m).double())),
        ):
            torch.testing.assert_close(got * scale, expected, rtol=TOLERANCE, atol=TOLERANCE)
    I_m, I_n = dense.identities()
    for got, expected in zip(dense.statistics, (dense.left(I_n), dense.right(I_m)), strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(factored.values(), dense.values())
    mean = factored.mean() * factored.scale
    torch.testing.assert_close(mean, dense.values().mean(0))
    torch.testing.assert_close(dense.mean() * dense.scale, dense.values().mean(0))


def test_moments_against_their_definitions():
    values = gradients(9, 3, 4)
    grads = DenseGradients(values)
    L, R = spd(3, 1), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    G = values / grads.scale
    torch.testing.assert_close(grads.left(R), (G @ R @ G.mT).mean(0))
    torch.testing.assert_close(grads.right(L), (G.mT @ L @ G).mean(0))
    torch.testing.assert_close(grads.squares(L, R), (L.mT @ G @ R).square().mean(0))
    H = second_moment(G)
    assert grads.norm == pytest.approx(float(H.norm()), rel=TOLERANCE)
    assert grads.trace == pytest.approx(float(H.trace()), rel=TOLERANCE)
    assert torch.equal(grads.right(L), grads.right(L).mT)


def power(A, exponent):
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values**exponent) @ vectors.mT


def dense_approximations(values):
    """(mn, mn) of every approximation that needs no K-FAC factors, from textbook formulas."""
    H = second_moment(values)
    count, m, n = values.shape
    u, _, vt = torch.linalg.svd(rearranged(H, m, n))
    L = torch.einsum("bij,bkj->ik", values, values) / count
    R = torch.einsum("bji,bjk->ik", values, values) / count
    made = {
        "optimal": torch.kron(vt[0].reshape(n, n), u[:, 0].reshape(m, m)),
        "shampoo_squared": torch.kron(R, L),
        "shampoo": torch.kron(square_root(R), square_root(L)),
    }
    steps = L, R
    for name in ("two_steps", "three_steps"):
        steps = (
            torch.einsum("bij,jk,blk->il", values, steps[1], values),
            torch.einsum("bji,jk,bkl->il", values, steps[0], values),
        )
        made[name] = torch.kron(steps[1], steps[0])
    basis = torch.kron(torch.linalg.eigh(R).eigenvectors, torch.linalg.eigh(L).eigenvectors)
    made["corrected"] = basis @ torch.diag(torch.diag(basis.mT @ H @ basis)) @ basis.mT
    return H, made


@pytest.mark.parametrize("shape", [(40, 4, 5), (60, 8, 3)])
def test_every_approximation_against_dense(shape):
    values = gradients(*shape)
    H, made = dense_approximations(values)
    got = measure(values, spectrum=True)
    assert set(got.cosines) == set(made) | {"q_half", "kl"}
    for name, product in made.items():
        product = product * torch.sign(product.trace())
        expected = dense_cosine(H, product)
        assert got.cosines[name] == pytest.approx(expected, abs=TOLERANCE), name
        nearest = float((H * product).sum() / product.square().sum())
        of_trace = float(H.trace() / product.trace())
        assert got.scales[name] == pytest.approx(nearest / of_trace, rel=1e-5), name
    assert got.norm == pytest.approx(float(H.norm()), rel=TOLERANCE)
    assert got.trace == pytest.approx(float(H.trace()), rel=TOLERANCE)
    sigma = torch.linalg.svdvals(rearranged(H, *shape[1:]))
    assert got.spectrum.sigma1 == pytest.approx(float(sigma[0]), rel=TOLERANCE)
    assert got.spectrum.sigma2 == pytest.approx(float(sigma[1]), rel=TOLERANCE)
    assert got.row()["cosine_shampoo"] == got.cosines["shampoo"]


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0])
def test_fixed_point_solves_its_equations(q):
    values = gradients(60, 4, 5)
    L, R, converged = fixed_point(values, q, tol=1e-12)
    assert converged
    again = (
        torch.einsum("bij,jk,blk->il", values, power(R, q - 1), values) / len(values),
        torch.einsum("bji,jk,bkl->il", values, power(L, q - 1), values) / len(values),
    )
    if q == 1:  # the equations that the traces determine up to the split of the scale
        again = tuple(x / x.trace() for x in again)
        L, R = L / L.trace(), R / R.trace()
        torch.testing.assert_close(again[0], L)
        torch.testing.assert_close(again[1], R)
        return
    torch.testing.assert_close(again[0] / power(R, q).trace(), L)
    torch.testing.assert_close(again[1] / power(L, q).trace(), R)


def test_fixed_point_of_two_is_the_optimum_and_of_one_is_shampoo_squared():
    values = gradients(40, 4, 5)
    best = optimal_kronecker(values)
    L, R, _ = fixed_point(values, 2.0, tol=1e-12)
    torch.testing.assert_close(torch.kron(R, L), best.sigma * torch.kron(best.right, best.left))
    L, R, _ = fixed_point(values, 1.0)
    left, right = ((G @ G.mT).mean(0) for G in (values, values.mT))
    torch.testing.assert_close(torch.kron(R, L), torch.kron(right, left) / left.trace())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_points_of_singular_factors_are_finite(dtype):
    """L of rank 1 of 2, R with 9 of 10 columns zero: the scales of both have no fixed point."""
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(40, 2, 100)
    values[:, 0, :10] = torch.randn(40, 10, generator=generator)
    values[:, 1] = -values[:, 0]
    found = measure(DenseGradients(values, dtype=dtype), names=["kl", "q_half", "optimal"]).cosines
    # H = B⊗A with A of rank 1, and every q is exact for it
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-4)


def test_an_iteration_that_stopped_early_says_so(monkeypatch):
    values = gradients(60, 4, 5)
    settled = measure(values, names=["optimal", "kl", "shampoo"]).converged
    assert settled == {"optimal": True, "kl": True}
    monkeypatch.setattr(sys.modules[approximations.__module__], "_STEPS", 1)
    stopped = measure(values, names=["optimal", "kl", "shampoo"])
    assert stopped.converged == {"optimal": True, "kl": False}
    assert stopped.row()["converged_kl"] is False


def test_kl_minimises_the_divergence_of_gaussians():
    """log det(R⊗L) + tr((R⊗L)^-1 H): no factor nearby does better."""
    values = gradients(60, 4, 5)
    H = second_moment(values)
    L, R, _ = fixed_point(values, 0.0, tol=1e-12)

    def divergence(L, R):
        P = torch.kron(R, L)
        return float(torch.logdet(P) + torch.linalg.solve(P, H).trace())

    for seed in range(10):
        A, B = spd(4, seed), spd(5, seed)
        assert divergence(L, R) < divergence(L + 1e-3 * A * L.norm() / A.norm(), R)
        assert divergence(L, R) < divergence(L, R - 1e-3 * B * R.norm() / B.norm())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("kfac", "ekfac", "shampoo")])
def test_exactly_kronecker_is_recovered(name):
    grads, _, _ = exactly_kronecker(4, 5)
    assert measure(grads, names=[name]).cosines[name] == pytest.approx(1, abs=1e-8)
    assert measure(grads, names=[name]).scales[name] == pytest.approx(1, abs=1e-8)


def test_kfac_and_ekfac_against_dense():
    delta, act = factors(positions=1, examples=30)
    D = torch.einsum("bktm,bkto->mo", delta, delta) / 90
    A = torch.einsum("btm,bto->mo", act, act) / 30
    grads = FactoredGradients(delta, act, kfac=(D, A))
    H = second_moment(grads.values())
    got = measure(grads, names=["kfac", "ekfac", "shampoo_squared"]).cosines
    assert got["kfac"] == pytest.approx(dense_cosine(H, torch.kron(A, D)), abs=TOLERANCE)
    basis = torch.kron(torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(D).eigenvectors)
    best = basis @ torch.diag(torch.diag(basis.mT @ H @ basis)) @ basis.mT
    assert got["ekfac"] == pytest.approx(dense_cosine(H, best), abs=TOLERANCE)
    assert got["ekfac"] > got["kfac"]


def test_statistics_of_other_gradients():
    truth, other = gradients(40, 4, 5), gradients(10, 4, 5, seed=1)
    got = measure(truth, other).cosines
    L, R = ((G @ G.mT).mean(0) for G in (other, other.mT))
    assert got["shampoo_squared"] == pytest.approx(cosine(truth, L, R), abs=TOLERANCE)
    assert got["optimal"] == measure(truth).cosines["optimal"]
    with pytest.raises(ValueError, match=r"statistics must be of gradients \(4, 5\)"):
        measure(truth, gradients(3, 5, 4))


def test_float32_takes_the_kernels_and_agrees():
    """Sums of 60 * 13 float32 products: 1e3 * 2^-24 = 6e-5, relative to numbers of size 1."""
    values = gradients(60, 7, 13).float()
    single, double = measure(DenseGradients(values, dtype=torch.float32)), measure(values)
    for name, value in double.cosines.items():
        assert single.cosines[name] == pytest.approx(value, abs=1e-3 if name == "kl" else 1e-4)


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.3])
def test_history_is_the_weighted_covariance(beta):
    values = gradients(30, 3, 4)
    history = GradientHistory(beta)
    for value in values:
        history.append(value)
        value.fill_(float("nan"))  # what was appended is a copy
    values = gradients(30, 3, 4)
    weights = beta ** torch.arange(29, -1, -1, dtype=torch.float64)
    weights /= weights.sum()
    L = torch.einsum("b,bij,bkj->ik", weights, values, values)
    got = history.gradients()
    # beta = 0.3 drops gradients once their weight is below 1e-6
    torch.testing.assert_close(
        got.left(torch.eye(4, dtype=torch.float64)) * got.scale**2, L, rtol=1e-5, atol=1e-5
    )
    assert len(history) == (12 if beta == 0.3 else 30)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: measure(torch.zeros(3, 2, 2)), "measure: grads is zero everywhere"),
        (lambda: measure(DenseGradients(torch.zeros(3, 2, 2), layer="fc")), 'layer "fc" is zero'),
        (lambda: measure(torch.full((3, 2, 2), torch.nan)), "must be finite"),
        (lambda: approximations(gradients(3, 2, 2), ["kfac"]), "K-FAC of layer"),
        (lambda: approximations(gradients(3, 2, 2), ["nonsense"]), "names are optimal, .* 'nonsen"),
        (lambda: fixed_point(gradients(3, 2, 2), math.nan), "q must be finite"),
        (lambda: singular_values(gradients(3, 2, 2), 0), "count must be at least 1, got 0"),
        (lambda: power_steps(gradients(3, 2, 2), -1), "steps must be at least 0, got -1"),
        (lambda: GradientHistory(1.5), "beta must be above 0 and at most 1, got 1.5"),
        (lambda: GradientHistory(layer="fc").gradients(), 'layer "fc" has no gradient yet'),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
