"""The variants, each against its formula written out in float64."""

import pytest
import torch
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.ops.eigenvalue_bound import eigenvalue_bound

LR, DECAY, B1, B2, BETA, RIDGE = 0.01, 0.1, 0.9, 0.95, 0.8, 1e-3
COMMON = {"lr": LR, "weight_decay": DECAY, "betas": (B1, B2), "shampoo_beta": BETA, "ridge": RIDGE,
          "nesterov": False}  # fmt: skip
SHAPE, STEPS = (6, 4), 12


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def power(A, exponent):
    """(A + ridge)^exponent."""
    values, vectors = torch.linalg.eigh(A + RIDGE * eigenvalue_bound(A) * eye(len(A)))
    return vectors * values**exponent @ vectors.mT


def moments(grads):
    """(t, G, M, V) of every step."""
    M = V = torch.zeros_like(grads[0])
    for t, G in enumerate(grads, 1):
        M, V = B1 * M + (1 - B1) * G, B2 * V + (1 - B2) * G**2
        yield t, G, M, V


def agrees(restated, shape=SHAPE, seed=1, **options):
    """Train with `options`, and compare with W <- (1 - lr decay) W - lr U, U from `restated`."""
    (W,), grads = parameters(shape, dtype=torch.float64), gradients(shape, STEPS, seed=seed)
    expected = W.detach().clone()
    for U in restated(grads):
        expected = (1 - LR * DECAY) * expected - LR * U
    optimizer = Shampoo([W], **{**COMMON, "refresh_every": 1, **options})
    train(optimizer, [(W, grads)])
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-9)
    return optimizer.state[W]


def test_a_running_sum_is_adagrads():
    def restated(grads):
        L, R = torch.zeros(6, 6).double(), torch.zeros(4, 4).double()
        for t, G, M, _ in moments(grads):
            L, R = L + G @ G.mT, R + G.mT @ G
            yield L.trace() ** 0.5 * power(L, -0.5) @ (M / (1 - B1**t)) @ power(R, -0.5)

    agrees(restated, shampoo_beta=1, graft=None)


@pytest.mark.parametrize("beta", [BETA, 1])
def test_frobenius_statistics_are_steps_of_the_power_iteration(beta):
    """From W = I / ‖G‖: with one gradient, R ⊗ L is Shampoo's with trace scaling."""
    keep, new = (1, 1) if beta == 1 else (beta, 1 - beta)

    def restated(grads):
        L, R, energy, corrected = 0, 0, 0, 0
        for t, G, M, _ in moments(grads):
            WL = eye(6) / G.norm() if t == 1 else L * corrected / L.norm() ** 2
            WR = eye(4) / G.norm() if t == 1 else R * corrected / R.norm() ** 2
            L, R = keep * L + new * G @ WR @ G.mT, keep * R + new * G.mT @ WL @ G
            corrected = 1 if beta == 1 else 1 - beta**t
            energy = keep * energy + new * G.norm() ** 2
            c = energy * corrected / (L.trace() * R.trace())
            left, right = power(c**0.5 * L / corrected, -0.5), power(c**0.5 * R / corrected, -0.5)
            yield left @ (M / (1 - B1**t)) @ right

    state = agrees(restated, statistic="frobenius", shampoo_beta=beta, graft=None)
    assert state["energy.0"] > 0


def test_every_statistic_of_a_kronecker_product_finds_its_factors():
    """Of gradients A^(1/2) Z B^(1/2), E[g gᵀ] = B ⊗ A: the expectation of each is a multiple.

    About 100 gradients count at beta = 0.99, hence cosines within a few per cent of 1."""
    A = torch.diag(torch.tensor([8.0, 4, 2, 1, 1, 1]).double())
    B = torch.diag(torch.tensor([9.0, 1, 1, 1]).double())
    grads = [A.sqrt() @ Z @ B.sqrt() for Z in gradients(SHAPE, 400)]
    cosines = {}
    for statistic in ("shampoo", "frobenius", "kl"):
        (W,) = parameters(SHAPE, dtype=torch.float64)
        optimizer = Shampoo([W], statistic=statistic, shampoo_beta=0.99, refresh_every=1)
        train(optimizer, [(W, grads)])
        state = optimizer.state[W]
        cosines[statistic] = [
            ((X * Y).sum() / X.norm() / Y.norm()).item()
            for X, Y in ((state["left.0"], A), (state["right.0"], B))
        ]
    assert min(min(pair) for pair in cosines.values()) > 0.95, cosines


@pytest.mark.parametrize("scale", [None, "trace"])
@pytest.mark.parametrize(("every", "start"), [(1, 1), (3, 1), (3, 5)])
def test_kl_statistics_put_the_whitened_gradient_in(scale, every, start):
    """With the roots as they were last computed: from the first step on, whatever start_step is."""

    def restated(grads):
        rms = grads[0].norm() / 24**0.5
        L, R = rms * eye(6), rms * eye(4)
        left, right, energy = eye(6) / rms**0.5, eye(4) / rms**0.5, 0
        for t, G, M, V in moments(grads):
            X, Y = G @ right, left @ G
            L = BETA * L + (1 - BETA) / 4 * X @ X.mT
            R = BETA * R + (1 - BETA) / 6 * Y.mT @ Y
            energy = BETA * energy + (1 - BETA) * G.norm() ** 2
            if t == 1 or t % every == 0:
                c = energy / (1 - BETA**t) / (L.trace() * R.trace()) if scale else 1
                left, right = power(c**0.5 * L, -0.5), power(c**0.5 * R, -0.5)
            M_hat = M / (1 - B1**t)
            adam = M_hat / ((V / (1 - B2**t)).sqrt() + 1e-8)
            U = left @ M_hat @ right
            yield adam if t < start else U if start == 1 else U * adam.norm() / U.norm()

    graft = "adam" if start > 1 else None
    options = {"graft": graft, "refresh_every": every, "start_step": start}
    agrees(restated, statistic="kl", scale=scale, **options)


@pytest.mark.parametrize("statistic", ["frobenius", "kl"])
def test_with_one_factor_the_other_is_the_identity(statistic):
    start = 1 if statistic == "kl" else 0

    def restated(grads):
        L = start * grads[0].norm() ** 2 / 24 * eye(6)
        for t, G, M, _ in moments(grads):
            L = BETA * L + (1 - BETA) * G @ G.mT / 4
            corrected = L if start else L / (1 - BETA**t)
            yield power(corrected, -0.5) @ (M / (1 - B1**t))

    agrees(restated, statistic=statistic, p=(2, None), graft=None)


@pytest.mark.parametrize("statistic", ["shampoo", "frobenius", "kl"])
@pytest.mark.parametrize("scale", ["trace", "least_squares"])
@pytest.mark.parametrize("p", [2, (2, None)])
def test_no_statistic_depends_on_the_scale_of_the_gradient(statistic, scale, p):
    updates = []
    for factor in (1.0, 1e-6, 1e6):
        (W,) = parameters(SHAPE, dtype=torch.float64)
        before = W.detach().clone()
        optimizer = Shampoo([W], statistic=statistic, scale=scale, p=p, graft=None, weight_decay=0,
                            nesterov=False)  # fmt: skip
        train(optimizer, [(W, [factor * g for g in gradients(SHAPE, 5)])])
        updates.append(W.detach() - before)
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(updates[2], updates[0], rtol=1e-6, atol=0)


def test_least_squares_scaling_fits_the_second_moment():
    def restated(grads):
        L, R, fit = 0, 0, 0
        for t, G, M, _ in moments(grads):
            L, R = BETA * L + (1 - BETA) * G @ G.mT, BETA * R + (1 - BETA) * G.mT @ G
            fit = BETA * fit + (1 - BETA) * (G * (L @ G @ R)).sum() / (L.norm() * R.norm())
            L_hat, R_hat, fit_hat = (x / (1 - BETA**t) for x in (L, R, fit))
            c = fit_hat / (L_hat.norm() * R_hat.norm())
            left, right = power(c**0.5 * L_hat, -0.25), power(c**0.5 * R_hat, -0.25)
            yield left @ (M / (1 - B1**t)) @ right

    agrees(restated, scale="least_squares", p=4, graft=None)


def test_of_a_constant_gradient_least_squares_is_the_optimal_scale():
    """c minimises ‖g gᵀ - c R ⊗ L‖, which is measured with the dense matrices."""
    (W,), G = parameters(SHAPE, dtype=torch.float64), gradients(SHAPE, 1)[0]
    optimizer = Shampoo([W], scale="least_squares", graft=None, nesterov=False)
    train(optimizer, [(W, [G] * 3)])
    state = optimizer.state[W]
    correction = 1 - 0.95**3
    L, R = state["left.0"] / correction, state["right.0"] / correction
    g, H = G.mT.reshape(-1), torch.kron(R, L)
    best = (torch.outer(g, g) * H).sum() / H.norm() ** 2
    found = state["energy.0"] / correction / (L.norm() * R.norm())
    torch.testing.assert_close(found, best, rtol=1e-12, atol=0)


def test_without_scale_p_4_is_the_original_shampoo():
    def restated(grads):
        L, R = torch.zeros(6, 6).double(), torch.zeros(4, 4).double()
        for t, G, M, _ in moments(grads):
            L, R = L + G @ G.mT, R + G.mT @ G
            yield power(L, -0.25) @ (M / (1 - B1**t)) @ power(R, -0.25)

    agrees(restated, shampoo_beta=1, scale=None, p=4, graft=None)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_a_pseudo_inverse_root_leaves_the_null_space_alone(p):
    """Gradients of rank 2: with rank_rtol the update is in their span, and scaled in it alone."""
    (W,), (U,) = parameters(SHAPE, dtype=torch.float64), parameters((6, 2), dtype=torch.float64)
    Q = torch.linalg.qr(U.detach()).Q
    grads = [Q @ Q.mT @ G for G in gradients(SHAPE, 4)]
    before = W.detach().clone()
    options = {"p": (p, None), "graft": None, "weight_decay": 0, "rank_rtol": 1e-9, "ridge": 0.0}
    train(Shampoo([W], **options), [(W, grads)])
    change = W.detach() - before
    torch.testing.assert_close(Q @ Q.mT @ change, change, rtol=0, atol=1e-9)
    assert change.norm() > 1e-4


def test_pseudo_inverse_roots_need_eigh():
    with pytest.raises(ValueError, match=r"^Shampoo: .*rank_rtol"):
        Shampoo(parameters(SHAPE), rank_rtol=1e-6, root_method="newton")


def grafted(grads, step):
    """Shampoo² with the norm of `step`(t, G, M^, V)."""
    L, R, S = torch.zeros(6, 6).double(), torch.zeros(4, 4).double(), 0
    for t, G, M, V in moments(grads):
        L, R, S = BETA * L + (1 - BETA) * G @ G.mT, BETA * R + (1 - BETA) * G.mT @ G, S + G**2
        M_hat = M / (1 - B1**t)
        U = power(L, -0.5) @ M_hat @ power(R, -0.5)
        own = step(t, M_hat, V, S)
        yield U * own.norm() / U.norm()


GRAFTS = {
    "adam": lambda t, M, V, S: M / ((V / (1 - B2**t)).sqrt() + 1e-8),
    "rmsprop": lambda t, M, V, S: M / (V.sqrt() + 1e-8),
    "adagrad": lambda t, M, V, S: M / (S.sqrt() + 1e-8),
    "sgd": lambda t, M, V, S: M,
}


@pytest.mark.parametrize("graft", GRAFTS)
def test_grafts_give_their_own_length(graft):
    state = agrees(lambda grads: grafted(grads, GRAFTS[graft]), graft=graft)
    assert ("exp_avg_sq" in state) == (graft != "sgd")


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("options", [{"precondition": False}, {"start_step": 100}], ids=str)
def test_without_preconditioning_the_graft_itself_steps(graft, options):
    def restated(grads):
        S = 0
        for t, G, M, V in moments(grads):
            S = S + G**2
            yield GRAFTS[graft](t, M / (1 - B1**t), V, S)

    agrees(restated, graft=graft, **options)


# Square: of a first gradient of lower rank the eigenvectors of the null space are any.
SQUARE = (5, 5)


def rotated(grads, every, method, p=(2, 2)):
    """Adam in the eigenbasis; Q from eigh first, v moved along with every change of basis."""
    L, R, V, QL, QR = 0, 0, 0, eye(5), eye(5)
    for t, G, M, _ in moments(grads):
        L, R = BETA * L + (1 - BETA) * G @ G.mT, BETA * R + (1 - BETA) * G.mT @ G
        V = B2 * V + (1 - B2) * (QL.mT @ G @ QR) ** 2
        if t == 1 or t % every == 0:
            new = []
            for A, Q, root in ((L, QL, p[0]), (R, QR, p[1])):
                if root is None:
                    new.append(Q)
                elif t == 1 or method == "eigh":
                    new.append(torch.linalg.eigh(A).eigenvectors)
                else:
                    lift = max(1e-8, 64 * len(A) * 2**-52) * (Q.mT @ A @ Q).diagonal().max()
                    X, T = torch.linalg.qr((A + lift * eye(len(A))) @ Q)
                    new.append(X * T.diagonal().sign())
            V = (QL.mT @ new[0]).mT ** 2 @ V @ (QR.mT @ new[1]) ** 2
            QL, QR = new
        M_hat = QL.mT @ (M / (1 - B1**t)) @ QR
        yield QL @ (M_hat / ((V / (1 - B2**t)).sqrt() + 1e-8)) @ QR.mT


@pytest.mark.parametrize("method", ["orthogonal_iteration", "eigh"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("p", [(2, 2), (2, None), (None, 2)], ids=str)
def test_soap_is_adam_in_the_eigenbasis(method, every, p):
    state = agrees(
        lambda grads: rotated(grads, every, method, p), SQUARE,
        application="soap", graft=None, basis_method=method, refresh_every=every, p=p,
    )  # fmt: skip
    assert "left_root.0" not in state
    for side, d, root in (("left", 5, p[0]), ("right", 5, p[1])):
        assert (f"{side}_basis.0" in state) == (root is not None)
        if root is not None:
            Q = state[f"{side}_basis.0"]
            torch.testing.assert_close(Q.mT @ Q, eye(d), rtol=0, atol=1e-12)
            assert (state[f"{side}_values.0"] >= 0).all()


def test_soap_before_its_start_is_adamw():
    (W,), (V,) = (parameters(SHAPE, dtype=torch.float64) for _ in range(2))
    grads = gradients(SHAPE, 5)
    optimizer = Shampoo([W], application="soap", graft=None, start_step=6, nesterov=False)
    train(optimizer, [(W, grads)])
    train(torch.optim.AdamW([V], betas=(0.9, 0.95)), [(V, grads)])
    torch.testing.assert_close(W, V, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [SOAP, {**SOAP, "statistic": "kl"}, {"graft": None}], ids=str)
def test_without_graft_what_has_no_factor_runs_adamw(options):
    """Vectors, and matrices with long sides, next to weights that are preconditioned."""
    own, twin = (parameters((7,), (), (9, 11), (5, 4), dtype=torch.float64) for _ in range(2))
    grads = [gradients(p.shape, 5) for p in own]
    train(Shampoo(own, max_dimension=8, **options), list(zip(own, grads, strict=True)))
    adamw = torch.optim.AdamW(twin[:3], betas=(0.9, 0.95))
    train(adamw, list(zip(twin[:3], grads[:3], strict=True)))
    for a, b in zip(own[:3], twin[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert not torch.equal(own[3], twin[3])


def test_kl_statistics_in_an_eigenbasis():
    def restated(grads):
        rms = grads[0].norm() / 5
        L, R, V, QL, QR = rms * eye(5), rms * eye(5), 0, eye(5), eye(5)
        XL, XR = eye(5) / rms**0.5, eye(5) / rms**0.5  # X Xᵀ is the inverse
        for t, G, M, _ in moments(grads):
            X, Y = G @ XR, XL.mT @ G
            V = B2 * V + (1 - B2) * (QL.mT @ G @ QR) ** 2
            L = BETA * L + (1 - BETA) / 5 * X @ X.mT
            R = BETA * R + (1 - BETA) / 5 * Y.mT @ Y
            (lam, new_L), (mu, new_R) = torch.linalg.eigh(L), torch.linalg.eigh(R)
            V = (QL.mT @ new_L).mT ** 2 @ V @ (QR.mT @ new_R) ** 2
            QL, QR = new_L, new_R
            XL, XR = QL * (lam + RIDGE * lam.max()) ** -0.5, QR * (mu + RIDGE * mu.max()) ** -0.5
            M_hat = QL.mT @ (M / (1 - B1**t)) @ QR
            yield QL @ (M_hat / ((V / (1 - B2**t)).sqrt() + 1e-8)) @ QR.mT

    options = {"application": "soap", "graft": None, "basis_method": "eigh"}
    agrees(restated, SQUARE, statistic="kl", **options)


def test_coupled_decay_leaves_a_block_of_weights_that_are_not_finite_alone():
    good, bad = parameters((6, 4), (6, 4))
    with torch.no_grad():
        bad[0, 0] = torch.nan
    optimizer = Shampoo([good, bad], decoupled_weight_decay=False, weight_decay=0.1)
    train(optimizer, [(p, gradients((6, 4), 3, torch.float32)) for p in (good, bad)])
    assert good.isfinite().all()
    assert optimizer.metrics()["skipped_gradients"] == 3
    assert all(torch.isfinite(x).all() for x in optimizer.state[bad].values())
