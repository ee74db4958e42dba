"""The laws that one Shampoo step keeps."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_kernels import Shampoo, backends
from shampoo_kernels.ops.eigenvalue_bound import eigenvalue_bound
from shampoo_kernels.optim import factors, stacks


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(shape, steps, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, *shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def train(optimizer, pairs):
    """pairs: (parameter, its gradient in each step, None for a missing one)."""
    for step in range(len(pairs[0][1])):
        for parameter, grads in pairs:
            parameter.grad = None if grads[step] is None else grads[step].clone()
        optimizer.step()


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def power(A, exponent):
    values, vectors = torch.linalg.eigh(A)
    return vectors * values**exponent @ vectors.mT


def restated(
    W, grads, *, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1, beta=0.95, p=(2, 2), ridge=1e-6,
    graft="adam", every=3, start=4, nesterov=False, maximize=False,
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
        {"nesterov": True},
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
    shampoo = Shampoo(ours, start_step=6)
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
    (W,), (V,) = parameters((8, 6)), parameters((8, 6))
    grads = gradients((8, 6), 1, torch.float32)
    before = W.detach().clone()
    train(Shampoo([W], weight_decay=0, block_size=4, start_step=1), [(W, grads)])
    train(torch.optim.AdamW([V], weight_decay=0, betas=(0.9, 0.95)), [(V, grads)])
    for rows in (slice(0, 4), slice(4, 8)):
        for cols in (slice(0, 4), slice(4, 6)):
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


def snapshot(optimizer, parameter):
    state = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    return parameter.detach().clone(), state


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_block_with_a_bad_gradient_stands_still_and_disturbs_no_other(bad):
    """1e25 is finite, but its square is not."""
    runs = []
    for poisoned in (False, True):
        W, b = parameters((8, 6), (5,))
        optimizer = Shampoo([W, b], block_size=4, start_step=2, refresh_every=1)
        grads = list(gradients((8, 6), 6, torch.float32))
        train(optimizer, [(W, grads[:4]), (b, gradients((5,), 4, torch.float32))])
        before = snapshot(optimizer, W)
        if poisoned:
            grads[4] = grads[4].clone()
            grads[4][5, 1] = bad  # row block 1, column block 0: block 2 of 4
        train(optimizer, [(W, grads[4:5]), (b, gradients((5,), 1, torch.float32))])
        runs.append((before, snapshot(optimizer, W), snapshot(optimizer, b)))
        train(optimizer, [(W, grads[5:]), (b, gradients((5,), 1, torch.float32))])
        assert W.isfinite().all()
    (_, clean, clean_b), (before, poisoned, poisoned_b) = runs
    block = (slice(4, 8), slice(0, 4))
    for name, value in poisoned[1].items():
        if name.endswith(".2"):
            assert torch.equal(value, before[1][name]), name
        elif name.startswith("exp_avg"):
            assert torch.equal(value[block], before[1][name][block]), name
            assert torch.equal(value[:4], clean[1][name][:4]), name
            assert torch.equal(value[4:, 4:], clean[1][name][4:, 4:]), name
        else:
            assert torch.equal(value, clean[1][name]), name
    assert torch.equal(poisoned[0][block], before[0][block])
    assert torch.equal(poisoned[0][:4], clean[0][:4])
    assert torch.equal(poisoned[0][4:, 4:], clean[0][4:, 4:])
    assert torch.equal(clean_b[0], poisoned_b[0])


def test_a_vector_with_a_bad_gradient_stands_still():
    (b,) = parameters((5,))
    optimizer = Shampoo([b], weight_decay=0.1)
    grads = [*gradients((5,), 3, torch.float32), torch.full((5,), math.nan)]
    train(optimizer, [(b, grads[:3])])
    weight, state = snapshot(optimizer, b)
    train(optimizer, [(b, grads[3:])])
    assert torch.equal(weight, b)
    del state["step"]
    assert all(torch.equal(state[name], optimizer.state[b][name]) for name in state)


def test_a_bad_gradient_counts_as_none_from_the_first_step_on():
    """Counts for bias correction stand still per block: the rest of the run is the same."""
    results = []
    for bad in (None, torch.full((6, 4), math.nan)):
        W, other = parameters((6, 4), (6, 4))
        grads = list(gradients((6, 4), 8, torch.float32))
        grads[0] = grads[3] = bad
        optimizer = Shampoo([W, other], start_step=3, refresh_every=1)
        train(optimizer, [(W, grads), (other, gradients((6, 4), 8, torch.float32, seed=2))])
        results.append((W.detach(), optimizer.state[W]))
    (a, state_a), (b, state_b) = results
    assert torch.equal(state_a["left.0"], state_b["left.0"])
    assert torch.equal(state_a["exp_avg"], state_b["exp_avg"])
    assert state_a["block_step.0"] == state_b["block_step.0"] == 6
    assert a.isfinite().all()
    assert b.isfinite().all()


def test_a_parameter_without_gradient_stands_still():
    W, other = parameters((6, 4), (6, 4))
    optimizer = Shampoo([W, other], start_step=2, refresh_every=2)
    grads = gradients((6, 4), 5, torch.float32)
    train(optimizer, [(W, grads), (other, grads)])
    weight, state = snapshot(optimizer, W)
    train(optimizer, [(W, [None] * 3), (other, grads[:3])])
    assert torch.equal(weight, W)
    roots = {name for name in state if "root" in name}
    for name in state.keys() - roots:
        assert torch.equal(state[name], optimizer.state[W][name]), name


SHAPES = [(8, 6), (5,), (8, 6), (4, 3, 2, 2), (8, 6), (6, 8), (20, 6), (20, 6)]


def trained_together(shapes, which, **options):
    own = [p for i, p in enumerate(parameters(*shapes)) if i in which]
    optimizer = Shampoo(own, start_step=1, refresh_every=1, block_size=8, **options)
    seeds = [i for i in range(len(shapes)) if i in which]
    train(optimizer, [(p, gradients(p.shape, 6, torch.float32, s))
                      for p, s in zip(own, seeds, strict=True)])  # fmt: skip
    return dict(zip(seeds, own, strict=True))


def agree(a, b):
    """Bitwise with native kernels, each block of which is on its own; torch's eigh is not."""
    if backends()["inverse_root"]["cpu"].backend == "native":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_parameter_alone_and_among_others_is_trained_alike():
    together = trained_together(SHAPES, range(len(SHAPES)))
    for i in range(len(SHAPES)):
        agree(trained_together(SHAPES, [i])[i], together[i])


def test_stacks_in_small_parts_are_trained_alike(monkeypatch):
    whole = trained_together(SHAPES, range(len(SHAPES)))
    monkeypatch.setattr(stacks, "PART_BYTES", 1)
    monkeypatch.setattr(factors, "ROOT_BYTES", 1)
    parts = trained_together(SHAPES, range(len(SHAPES)))
    for i in range(len(SHAPES)):
        agree(whole[i], parts[i])


def test_a_parameter_that_comes_late_is_trained_as_if_alone():
    W, late = parameters((6, 4), (6, 4), dtype=torch.float64)
    optimizer = Shampoo([W, late], start_step=3, refresh_every=1)
    grads, own = gradients((6, 4), 10), gradients((6, 4), 10, seed=5)
    train(optimizer, [(W, grads), (late, [*[None] * 4, *own[:6]])])
    V, alone = parameters((6, 4), (6, 4), dtype=torch.float64)
    train(Shampoo([V], start_step=3, refresh_every=1), [(V, grads)])
    train(Shampoo([alone], start_step=3, refresh_every=1), [(alone, own[:6])])
    torch.testing.assert_close(W, V, rtol=0, atol=1e-9)
    torch.testing.assert_close(late, alone, rtol=0, atol=1e-9)


def test_a_group_that_comes_late_has_its_own_options():
    W, V = parameters((6, 4), (6, 4), dtype=torch.float64)
    optimizer = Shampoo([W], start_step=1)
    grads = gradients((6, 4), 6)
    train(optimizer, [(W, grads[:3])])
    optimizer.add_param_group({"params": [V], "precondition": False, "lr": 0.1})
    train(optimizer, [(W, grads[3:]), (V, grads[3:])])
    A, B = parameters((6, 4), (6, 4), dtype=torch.float64)
    train(Shampoo([A], start_step=1), [(A, grads)])
    train(torch.optim.AdamW([B], lr=0.1, betas=(0.9, 0.95)), [(B, grads[3:])])
    torch.testing.assert_close(W, A, rtol=0, atol=1e-12)
    torch.testing.assert_close(V, B, rtol=0, atol=1e-12)


def test_each_step_refreshes_its_slice_of_every_stack(monkeypatch):
    calls = []
    real = factors.inverse_root
    monkeypatch.setattr(
        factors, "inverse_root",
        lambda A, p, **rest: calls.append(len(A)) or real(A, p, **rest),
    )  # fmt: skip
    own = parameters(*[(6, 4)] * 7)
    optimizer = Shampoo(own, start_step=4, refresh_every=3)
    sizes = []
    for _ in range(9):
        calls.clear()
        train(optimizer, [(p, gradients((6, 4), 1, torch.float32, i)) for i, p in enumerate(own)])
        sizes.append(list(calls))
    #  of 7 blocks, slices 0, 1, 2 have 3, 2, 2; all at step 4; then steps 5, 6, ... mod 3
    assert sizes == [[], [], [], [7, 7], [2, 2], [3, 3], [2, 2], [2, 2], [3, 3]]


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("decay", [0, 0.1])
def test_the_number_of_operations_does_not_grow_with_the_number_of_layers(precondition, decay):
    counts = []
    for layers in (3, 12):
        own = parameters(*[(6, 6), (6,), (6, 12)] * layers)
        optimizer = Shampoo(
            own, block_size=6, start_step=1, refresh_every=2, weight_decay=decay,
            precondition=precondition,
        )  # fmt: skip
        pairs = [(p, gradients(p.shape, 3, torch.float32)) for p in own]
        train(optimizer, pairs)
        with CountOps() as mode:
            for _ in range(4):
                optimizer.step()
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


def test_convolutions_in_any_memory_format():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        (W,) = parameters((6, 4, 3, 3), dtype=torch.float64)
        W = nn.Parameter(W.detach().to(memory_format=memory_format))
        optimizer = Shampoo([W], block_size=5, start_step=1)
        train(optimizer, [(W, gradients((6, 4, 3, 3), 4))])
        assert W.is_contiguous(memory_format=memory_format)
        assert optimizer.state[W]["left.0"].shape == (5, 5)
        assert optimizer.state[W]["exp_avg"].shape == W.shape
        results.append(W.detach().contiguous())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_a_convolution_is_a_matrix():
    (W,), (V,) = (parameters((6, 4, 3, 3)) for _ in range(2))
    V = nn.Parameter(V.detach().reshape(6, 36))
    grads = gradients((6, 4, 3, 3), 4, torch.float32)
    train(Shampoo([W], start_step=1), [(W, grads)])
    train(Shampoo([V], start_step=1), [(V, [g.reshape(6, 36) for g in grads])])
    assert torch.equal(W.reshape(6, 36), V)


def test_max_dimension_leaves_the_long_side_without_factor():
    (W,), (V,) = (parameters((9, 4), dtype=torch.float64) for _ in range(2))
    grads = gradients((9, 4), 5)
    optimizer = Shampoo([W], max_dimension=8, block_size=3, start_step=1)
    train(optimizer, [(W, grads)])
    assert not [name for name in optimizer.state[W] if name.startswith("left")]
    train(Shampoo([V], p=(None, 2), block_size=3, start_step=1), [(V, grads)])
    assert torch.equal(W, V)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_once_from_float32(dtype):
    (W,), (V,) = parameters((6, 4), dtype=dtype), parameters((6, 4))
    V.data.copy_(W.data)
    optimizer = Shampoo([W], start_step=1)
    grads = gradients((6, 4), 1, dtype)
    train(optimizer, [(W, grads)])
    train(Shampoo([V], start_step=1), [(V, [g.float() for g in grads])])
    assert torch.equal(W, V.to(dtype))
    assert {v.dtype for v in optimizer.state[W].values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (), (1,), (1, 1), (2, 1, 3)])
def test_shapes_at_the_edge(shape):
    (W,) = parameters(shape)
    before = W.detach().clone()
    train(Shampoo([W], start_step=1), [(W, gradients(shape, 3, torch.float32))])
    assert W.isfinite().all()
    assert W.numel() == 0 or not torch.equal(W, before)


@pytest.mark.parametrize("graft", ["adam", None])
def test_a_zero_gradient_moves_nothing(graft):
    W, b = parameters((6, 4), (3,))
    before = W.detach().clone(), b.detach().clone()
    zeros = [(W, [torch.zeros(6, 4)] * 4), (b, [torch.zeros(3)] * 4)]
    train(Shampoo([W, b], start_step=1, weight_decay=0, graft=graft), zeros)
    assert torch.equal(W, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)])
def test_a_tensor_learning_rate(lr):
    W, V = parameters((6, 4))[0], parameters((6, 4))[0]
    grads = gradients((6, 4), 4, torch.float32)
    train(Shampoo([W], lr=lr, start_step=2), [(W, grads)])
    train(Shampoo([V], lr=0.01, start_step=2), [(V, grads)])
    torch.testing.assert_close(W, V, rtol=1e-6, atol=1e-7)


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


def test_step_runs_a_closure_with_gradients():
    (W,) = parameters((4, 3))
    optimizer = Shampoo([W], start_step=1)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_hooks_schedulers_and_zero_grad_work_as_in_torch_optim():
    (W,) = parameters((4, 3))
    optimizer = Shampoo([W], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, [(W, gradients((4, 3), 1, torch.float32))])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == ["pre", "post"]
    optimizer.zero_grad()
    assert W.grad is None
    optimizer.step()


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
        for _ in range(200):
            optimizer.zero_grad()
            loss = (X @ W - Y).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["shampoo"] < 0.5 * losses["adamw"]
