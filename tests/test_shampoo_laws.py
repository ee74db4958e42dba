"""What holds for every variant: resuming, bad blocks, company, scale, the number of operations."""

import math

import pytest
import torch
from test_shampoo_stacks import CountOps, agree, snapshot
from test_shampoo_state import same_state, steps, through_a_file
from torch import nn
from training import SOAP, VARIANTS, gradients, parameters, train

from shampoo_kernels import Shampoo

SHAPES = [(7, 5), (7, 5), (5,), (3, 2, 2, 2), (), (8, 5)]
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_resumes_bit_for_bit(options, stop):
    options = {"block_size": 4, "refresh_every": 3, "lr": 0.01, **options}
    own = parameters(*SHAPES)
    optimizer = Shampoo(own, **options)
    steps(optimizer, own, 0, stop)
    saved = through_a_file({"model": own, "optimizer": optimizer.state_dict()})
    steps(optimizer, own, stop, 9)
    resumed = [nn.Parameter(p.detach().clone()) for p in saved["model"]]
    other = Shampoo(resumed, lr=1.0)
    other.load_state_dict(saved["optimizer"])
    steps(other, resumed, stop, 9)
    assert all(torch.equal(a, b) for a, b in zip(own, resumed, strict=True))
    same_state(optimizer, other)
    assert all(p.isfinite().all() for p in own)


@every_variant
@pytest.mark.parametrize("bad", [math.nan, 1e25])
def test_a_block_with_a_bad_gradient_stands_still_and_disturbs_no_other(options, bad):
    runs = []
    for poisoned in (False, True):
        W, b = parameters((8, 7), (5,))
        optimizer = Shampoo([W, b], block_size=4, refresh_every=2, **options)
        grads = list(gradients((8, 7), 6, torch.float32))
        train(optimizer, [(W, grads[:4]), (b, gradients((5,), 4, torch.float32))])
        before = snapshot(optimizer, W)
        if poisoned:
            grads[4] = grads[4].clone()
            grads[4][5, 1] = bad  # row 5: lower left block, 2 of 4; with one factor, other blocks
        train(optimizer, [(W, grads[4:5]), (b, gradients((5,), 1, torch.float32))])
        runs.append((before, snapshot(optimizer, W), snapshot(optimizer, b)))
        train(optimizer, [(W, grads[5:]), (b, gradients((5,), 1, torch.float32))])
        assert W.isfinite().all()
    (_, clean, clean_b), (before, poisoned, poisoned_b) = runs
    p = options.get("p", 2)
    index, block = {
        (2, None): (1, (slice(4, 8), slice(None))),
        (None, 2): (0, (slice(None), slice(0, 4))),
    }.get(p if isinstance(p, tuple) else (p, p), (2, (slice(4, 8), slice(0, 4))))
    others = torch.ones(8, 7, dtype=torch.bool)
    others[block] = False
    for name, value in poisoned[1].items():
        if name.endswith(f".{index}"):
            assert torch.equal(value, before[1][name]), name
        elif name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(value[block], before[1][name][block]), name
            assert torch.equal(value[others], clean[1][name][others]), name
        else:
            assert torch.equal(value, clean[1][name]), name
    assert torch.equal(poisoned[0][block], before[0][block])
    assert torch.equal(poisoned[0][others], clean[0][others])
    assert torch.equal(clean_b[0], poisoned_b[0])


@every_variant
def test_a_parameter_alone_and_among_others_is_trained_alike(options):
    """Square blocks: of a null space, the eigenvectors of SOAP depend on the last bit."""
    shapes = [(6, 6), (5,), (6, 6), (12, 6), (6, 4)]
    dtype = torch.float64 if options.get("application") else torch.float32
    results = []
    for which in (range(5), [2]):
        own = [p for i, p in enumerate(parameters(*shapes, dtype=dtype)) if i in which]
        optimizer = Shampoo(own, **{"refresh_every": 1, "block_size": 6, **options})
        grads = [gradients(shapes[i], 6, dtype, seed=i) for i in which]
        train(optimizer, list(zip(own, grads, strict=True)))
        results.append(own[2 if len(own) > 1 else 0])
    if options.get("application"):  # QR and eigh are torch's
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    else:
        agree(*results)


@every_variant
def test_zero_and_extreme_gradients_stay_finite(options):
    for factor in (0.0, 1e-18, 1e15):
        own = parameters((6, 4), (5,), (4, 6))
        optimizer = Shampoo(own, refresh_every=2, **options)
        pairs = [(p, [factor * g for g in gradients(p.shape, 5, torch.float32)]) for p in own]
        train(optimizer, pairs)
        for p in own:
            assert p.isfinite().all(), factor
            assert all(v.isfinite().all() for v in optimizer.state[p].values()), factor


@every_variant
def test_a_block_without_gradient_at_first_is_trained_like_a_late_one(options):
    """A zero gradient counts as a step, but leaves nothing to compute a root from."""
    (W,) = parameters((6, 6), dtype=torch.float64)
    optimizer = Shampoo([W], refresh_every=50, weight_decay=0, **options)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    before = W.detach().clone()
    train(optimizer, [(W, [zero, zero])])
    assert torch.equal(W, before)
    train(optimizer, [(W, gradients((6, 6), 1))])
    side = "right" if options.get("p", (2, 2)) == (None, 2) else "left"
    kept = optimizer.state[W].get(f"{side}_root.0", optimizer.state[W].get(f"{side}_basis.0"))
    assert kept.count_nonzero() > 6


def disturbed(grad, seed):
    """Every entry off by the last bit of the largest, which is what Gram products are off by."""
    signs = torch.randn(grad.shape, generator=torch.Generator().manual_seed(seed)).sign()
    return grad + 2**-23 * grad.abs().max() * signs


@every_variant
def test_float32_follows_float64(options):
    """As closely as float32 follows itself when its gradients are disturbed, five times.

    Roots in bfloat16 are rounded to the next of two numbers by less than that: six steps of
    lr = 1e-3, each turned by a few units of 2^-8. Bases by eigh: the lift of orthogonal iteration
    is a multiple of the dtype's eps.
    """
    runs = []
    options = {**options, "basis_method": "eigh"}
    for dtype, seed in ((torch.float64, 0), *((torch.float32, seed) for seed in range(4))):
        own = [nn.Parameter(p.detach().to(dtype)) for p in parameters((5, 5), (6,), (5, 5))]
        optimizer = Shampoo(own, **{"refresh_every": 2, "ridge": 1e-2, **options})
        grads = [gradients(p.shape, 6, torch.float32) for p in own]
        if seed:
            grads = [[disturbed(g, seed) for g in each] for each in grads]
        pairs = [(p, [g.to(dtype) for g in each]) for p, each in zip(own, grads, strict=True)]
        train(optimizer, pairs)
        runs.append(torch.cat([p.detach().double().flatten() for p in own]))
    exact, single, *others = runs
    apart = max((single - other).abs().max().item() for other in others)
    tolerance = 5 * apart + 6 * 2**-24 * exact.abs().max().item()
    if "root_dtype" in options:
        tolerance = 6e-3 * 4 * 2**-8
    torch.testing.assert_close(single, exact, rtol=0, atol=tolerance)


@every_variant
def test_the_number_of_operations_does_not_grow_with_the_number_of_layers(options):
    counts = []
    for layers in (3, 12):
        own = parameters(*[(6, 6), (6,), (6, 12)] * layers)
        optimizer = Shampoo(own, **{"block_size": 6, "refresh_every": 2, **options})
        train(optimizer, [(p, gradients(p.shape, 3, torch.float32)) for p in own])
        with CountOps() as mode:
            for _ in range(4):
                optimizer.step()
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("options", [{}, {"graft": "sgd"}, SOAP], ids=str)
def test_coupled_decay_is_part_of_the_gradient(options):
    W, V = parameters((6, 4), dtype=torch.float64)[0], parameters((6, 4), dtype=torch.float64)[0]
    coupled = Shampoo([W], weight_decay=0.1, decoupled_weight_decay=False, maximize=True, **options)
    plain = Shampoo([V], weight_decay=0, **options)
    for G in gradients((6, 4), 6):
        train(coupled, [(W, [G])])
        train(plain, [(V, [0.1 * V.detach() - G])])
    torch.testing.assert_close(W, V, rtol=0, atol=1e-12)


def test_coupled_decay_without_preconditioning_is_adams():
    ours, theirs = (parameters((6, 4), (5,), dtype=torch.float64) for _ in range(2))
    options = {"weight_decay": 0.1, "betas": (0.9, 0.95), "maximize": True}
    optimizer = Shampoo(ours, decoupled_weight_decay=False, precondition=False, **options)
    for each, own in ((optimizer, ours), (torch.optim.Adam(theirs, **options), theirs)):
        train(each, [(p, gradients(p.shape, 8)) for p in own])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"graft": None}, SOAP], ids=str)
def test_a_clipped_update_keeps_its_direction_and_at_most_the_given_size(options):
    changes = []
    for limit in (None, 0.05, 1e3):
        (W,) = parameters((8, 7), dtype=torch.float64)
        before = W.detach().clone()
        fixed = {"weight_decay": 0, "lr": 1.0, "block_size": 4}
        optimizer = Shampoo([W], max_update_rms=limit, **fixed, **options)
        train(optimizer, [(W, gradients((8, 7), 1))])
        changes.append(W.detach() - before)
    free, clipped, loose = changes
    assert torch.equal(free, loose)
    rows, cols = (4, 4), (4, 3)
    for a, b in zip(
        [c for r in free.split(rows) for c in r.split(cols, 1)],
        [c for r in clipped.split(rows) for c in r.split(cols, 1)],
        strict=True,
    ):
        assert a.square().mean().sqrt() > 0.05
        torch.testing.assert_close(b.square().mean().sqrt(), torch.tensor(0.05).double())
        torch.testing.assert_close(b / b.norm(), a / a.norm(), rtol=1e-12, atol=1e-14)


def test_what_has_no_factor_is_not_clipped():
    """Where its rows are spread over processes, none of them knows the size of the update."""
    runs = []
    for limit in (None, 1e-3):
        own = parameters((6, 4), (5,))
        optimizer = Shampoo([{"params": [own[0]], "precondition": False}, {"params": [own[1]]}],
                            max_update_rms=limit)  # fmt: skip
        train(optimizer, [(p, gradients(p.shape, 3, torch.float32)) for p in own])
        runs.append(own)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
