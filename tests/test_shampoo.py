"""The mathematics of one Shampoo step."""

import pytest
import torch
from torch import nn
from training import gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.ops.eigenvalue_bound import eigenvalue_bound


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def power(A, exponent):
    values, vectors = torch.linalg.eigh(A)
    return vectors * values**exponent @ vectors.mT


def restated(
    W, grads, *, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1, beta=0.95, p=(2, 2), ridge=1e-6,
    graft="adam", every=3, start=4, nesterov=True, maximize=False,
):  # fmt: skip
    """The whole algorithm for one matrix that is one block, in float64, roots by eigh."""
    W, (m, n) = W.clone(), W.shape
    M, V, L, R = torch.zeros(m, n), torch.zeros(m, n), torch.zeros(m, m), torch.zeros(n, n)
    M, V, L, R = M.double(), V.double(), L.double(), R.double()
    for t, G in enumerate((-g if maximize else g for g in grads), start=1):
        M, V = betas[0] * M + (1 - betas[0]) * G, betas[1] * V + (1 - betas[1]) * G**2
        L, R = beta * L + (1 - beta) * G @ G.mT, beta * R + (1 - beta) * G.mT @ G
        ahead = betas[0] * M + (1 - betas[0]) * G if nesterov else M
        momentum = ahead / (1 - betas[0] ** (t + nesterov))
        adam = momentum / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        if t == start or (t > start and t % every == 0):
            L_hat, R_hat = L / (1 - beta**t), R / (1 - beta**t)
            trace = L_hat.trace()
            left, right = (
                eye(len(A)) if q is None
                else power(A + ridge * eigenvalue_bound(A) * eye(len(A)), -1 / q)
                for A, q in ((L_hat, p[0]), (R_hat, p[1]))
            )  # fmt: skip
            both = None not in p
            scale = (
                trace ** (0.5 / p[0] + 0.5 / p[1]) if both
                else n ** (1 / p[0]) if p[1] is None else m ** (1 / p[1])
            )  # fmt: skip
        update = adam
        if t >= start:
            update = scale * left @ momentum @ right
            update = update * (adam.norm() / update.norm() if graft else 1)
        W = W * (1 - lr * decay) - lr * update
    return W


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": (4, 4)},
        {"p": (1, 3)},
        {"p": (2, None)},
        {"p": (None, 4)},
        # from the first step on, when L has no full rank: the ridge sets the condition number
        {"graft": None, "start": 1, "ridge": 1e-3},
        {"graft": None, "start": 1, "ridge": 1e-3, "p": (1, 3)},
        {"graft": None, "start": 1, "ridge": 1e-3, "p": (2, None)},
        {"graft": None, "start": 1, "ridge": 1e-3, "p": (None, 4)},
        {"nesterov": False},
        {"maximize": True, "betas": (0.0, 0.0)},
        {"every": 1, "start": 1, "ridge": 1e-3},
    ],
    ids=str,
)
def test_twenty_steps_agree_with_the_algorithm_restated(options):
    (W,), grads = parameters((6, 4), dtype=torch.float64), gradients((6, 4), 20)
    expected = restated(W.detach(), grads, **options)
    names = {"decay": "weight_decay", "beta": "shampoo_beta", "every": "refresh_every",
             "start": "start_step"}  # fmt: skip
    given = {"lr": 0.01, "decay": 0.1, "every": 3, "start": 4, "ridge": 1e-6, **options}
    optimizer = Shampoo([W], **{names.get(name, name): value for name, value in given.items()})
    train(optimizer, [(W, grads)])
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-9)


def test_the_roots_2_and_4_are_told_apart():
    results = []
    for p in (2, 4):
        (W,) = parameters((5, 5), dtype=torch.float64)
        train(Shampoo([W], p=p, start_step=1), [(W, gradients((5, 5), 5))])
        results.append(W.detach())
    assert (results[0] - results[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_preconditioning_it_is_adamw(dtype, tolerance, maximize):
    shapes = [(4, 6), (3, 2, 3, 3), (7,), (), (1, 5), (7,)]
    ours, theirs = (parameters(*shapes, dtype=dtype) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1,
               "maximize": maximize}  # fmt: skip
    optimizers = (
        Shampoo(ours, **options, precondition=False),
        torch.optim.AdamW(theirs, **options),
    )
    for optimizer, own in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, [(p, gradients(p.shape, 30, dtype, seed=i)) for i, p in enumerate(own)])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_vectors_and_the_steps_before_start_step_are_adamw():
    shapes = [(6, 4), (5,), ()]
    ours, theirs = (parameters(*shapes, dtype=torch.float64) for _ in range(2))
    shampoo = Shampoo(ours, start_step=6, nesterov=False)
    adamw = torch.optim.AdamW(theirs, betas=(0.9, 0.95))
    for optimizer, own in ((shampoo, ours), (adamw, theirs)):
        train(optimizer, [(p, gradients(p.shape, 5)) for p in own])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    for optimizer, own in ((shampoo, ours), (adamw, theirs)):
        train(optimizer, [(p, gradients(p.shape, 1)) for p in own])
    assert (ours[0] - theirs[0]).abs().max() > 1e-5
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-14)


def test_a_grafted_update_has_the_norm_of_adamws_in_every_block():
    (W,), (V,) = parameters((8, 7)), parameters((8, 7))
    grads = gradients((8, 7), 1, torch.float32)
    before = W.detach().clone()
    train(Shampoo([W], weight_decay=0, block_size=4, start_step=1), [(W, grads)])
    train(torch.optim.AdamW([V], weight_decay=0, betas=(0.9, 0.95)), [(V, grads)])
    for rows in (slice(0, 4), slice(4, 8)):
        for cols in (slice(0, 4), slice(4, 7)):
            norms = [((X.detach() - before)[rows, cols]).norm() for X in (W, V)]
            torch.testing.assert_close(*norms, rtol=1e-4, atol=0)


def test_the_update_does_not_depend_on_the_scale_of_the_gradient():
    updates = []
    for scale in (1.0, 1e-6, 1e6):
        (W,) = parameters((6, 4), dtype=torch.float64)
        before = W.detach().clone()
        grads = [scale * g for g in gradients((6, 4), 5)]
        options = {"graft": None, "start_step": 1, "weight_decay": 0, "refresh_every": 1}
        train(Shampoo([W], **options), [(W, grads)])
        updates.append(W.detach() - before)
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(updates[2], updates[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("graft", ["adam", None])
def test_a_zero_gradient_moves_nothing(graft):
    W, b = parameters((6, 4), (3,))
    before = W.detach().clone(), b.detach().clone()
    zeros = [(W, [torch.zeros(6, 4)] * 4), (b, [torch.zeros(3)] * 4)]
    train(Shampoo([W, b], start_step=1, weight_decay=0, graft=graft), zeros)
    assert torch.equal(W, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-3), (torch.float64, 0)])
def test_root_dtype_is_how_roots_are_kept(dtype, tolerance):
    """bfloat16: six updates, each of norm lr * sqrt(24), turned by a few units of 2^-8."""
    W, V = parameters((6, 4))[0], parameters((6, 4))[0]
    grads = gradients((6, 4), 6, torch.float32)
    optimizer = Shampoo([W], start_step=1, refresh_every=2, root_dtype=dtype)
    train(optimizer, [(W, grads)])
    assert optimizer.state[W]["left_root.0"].dtype == dtype
    train(Shampoo([V], start_step=1, refresh_every=2), [(V, grads)])
    torch.testing.assert_close(W, V, rtol=0, atol=tolerance)


def test_it_learns_a_badly_scaled_least_squares_problem_faster_than_adamw():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    X = torch.randn(256, 16, generator=generator) * scale @ rotation
    Y = X @ torch.randn(16, 8, generator=generator)
    losses = {}
    for name, make in (("adamw", torch.optim.AdamW), ("shampoo", Shampoo)):
        W = nn.Parameter(torch.zeros(16, 8))
        optimizer = make([W], lr=0.1, betas=(0.9, 0.95), weight_decay=0)
        for _ in range(101):  # later the steps of a constant rate dominate, and the loss is noise
            optimizer.zero_grad()
            loss = (X @ W - Y).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["shampoo"] < 0.5 * losses["adamw"]
