"""Whose turn it is, and which roots still fit."""

import dataclasses
import statistics as numbers

import pytest
import torch
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import eigenbasis, factors


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the matrices whose root or basis is computed."""
    sizes = []

    def counting(real):
        def call(A, *rest, **options):  # of compute_ the root, which is as large
            sizes.extend([A.shape[-1]] * len(A))
            return real(A, *rest, **options)

        return call

    monkeypatch.setattr(factors, "compute_", counting(factors.compute_))
    iteration = counting(eigenbasis.orthogonal_iteration)
    monkeypatch.setattr(eigenbasis, "orthogonal_iteration", iteration)
    monkeypatch.setattr(torch.linalg, "eigh", counting(torch.linalg.eigh))
    return sizes


def work(computed, shapes, steps, **options):
    """Of each step after the first, the cubes of what was computed."""
    own = parameters(*shapes)
    optimizer = Shampoo(own, **options)
    pairs = [(p, gradients(p.shape, 1, torch.float32)) for p in own]
    found = []
    for _ in range(steps):
        computed.clear()
        train(optimizer, pairs)
        found.append(sum(d**3 for d in computed))
    return found[1:]


LAYER = [(24, 72), (24, 24), (96, 24), (24, 96), (24,)]  # of a small transformer, width 24


@pytest.mark.parametrize("options", [{}, SOAP, {"refresh": "level"}], ids=str)
def test_the_costliest_step_is_at_most_half_more_than_the_median(computed, options):
    found = work(computed, LAYER * 10, 21, block_size=24, refresh_every=10, **options)
    assert max(found) <= 1.5 * numbers.median(found)
    assert sum(found[:10]) == sum(found[10:])


def test_level_turns_even_out_what_equal_numbers_do_not(computed):
    """Stacks of one block each: staggered, four costly ones come in four neighbouring steps."""
    shapes = [(24, 24), (23, 24), (24, 23), (23, 23), *[(6, 6 + i) for i in range(4)]] * 2
    costs = {}
    for refresh in ("staggered", "level", "together"):
        found = work(computed, shapes, 9, refresh=refresh, refresh_every=4)
        costs[refresh] = max(found)
        assert sum(found[:4]) == sum(found[4:])
    assert costs["level"] <= 1.1 * numbers.mean(found)
    assert costs["level"] <= costs["staggered"] < costs["together"]


@pytest.mark.parametrize("refresh", ["staggered", "level"])
def test_turns_go_by_all_groups_together(computed, refresh):
    own = parameters(*[(12, 12), (12, 12), (5,), (5,)] * 4)  # vectors have no turns
    groups = [{"params": own[i : i + 4]} for i in range(0, 16, 4)]
    optimizer = Shampoo(groups, refresh=refresh, refresh_every=4)
    counts = []
    for _ in range(9):
        computed.clear()
        train(optimizer, [(p, gradients(p.shape, 1, torch.float32)) for p in own])
        counts.append(len(computed) // 2)
    assert counts == [8, 2, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("options", [{}, SOAP], ids=str)
def test_together_is_all_or_nothing(computed, options):
    found = work(computed, [(6, 4)] * 7, 10, refresh="together", refresh_every=3, **options)
    every = 7 * (6**3 + 4**3)
    assert found == [0, every, 0, 0, every, 0, 0, every, 0]


def test_a_late_parameter_refreshes_by_its_own_steps_together(computed):
    own = parameters((6, 4), (6, 4))
    optimizer = Shampoo(own, refresh="together", refresh_every=3)
    grads = gradients((6, 4), 8, torch.float32)
    counts = []
    for step in range(8):
        computed.clear()
        train(optimizer, [(own[0], grads[step : step + 1]),
                          (own[1], [grads[step] if step else None])])  # fmt: skip
        counts.append(len(computed) // 2)
    assert counts == [1, 1, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"p": 3}, {"p": (4, 2)}, SOAP], ids=str)
def test_a_root_that_fits_is_kept_and_one_that_does_not_is_computed(computed, options):
    """Gradients c G have the same directions: scaled statistics change the roots with c alone."""
    (W,) = parameters((6, 6), dtype=torch.float64)
    adaptive = {"refresh_every": 1, "refresh_tolerance": 0.2, "scale": None, "shampoo_beta": 0.5}
    optimizer = Shampoo([W], **adaptive, **options)
    G = torch.linalg.qr(gradients((6, 6), 1)[0]).Q + 0.1 * gradients((6, 6), 1, seed=2)[0]
    state = optimizer.state[W]
    counts, kept = [], []
    for factor in (1, 1, 1.01, 3, 3, 3):
        computed.clear()
        train(optimizer, [(W, [factor * G])])
        counts.append(len(computed))
        kept.append(state.get("left_root.0", state.get("left_basis.0")).clone())
    soap = "application" in options
    #  L: 1, 1, 1.01, then (3² + 1)/2 = 5, (9 + 5)/2 = 7, 8 times GGᵀ
    assert counts == ([2, 0, 0, 0, 0, 0] if soap else [2, 0, 0, 2, 2, 0])
    assert torch.equal(kept[0], kept[2])
    if soap:
        computed.clear()
        train(optimizer, [(W, [gradients((6, 6), 1, seed=5)[0]])])
        assert len(computed) == 2


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_misfit_is_the_relative_change(p):
    """The root of A fits (1 + e) A up to e, and one that is not there up to 1."""
    grads = gradients((5, 5), 3)
    A = torch.stack([G @ G.mT for G in grads])
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.pow(-1 / p).unsqueeze(-2) @ vectors.mT
    change = torch.tensor([0.0, 0.3, -0.5]).double()
    found = factors._misfit((1 + change)[:, None, None] * A, root, p, 0.0)
    torch.testing.assert_close(found, change.abs(), rtol=1e-6, atol=1e-6)
    absent = factors._misfit(A, 0 * root, p, 0.0)
    torch.testing.assert_close(absent, torch.ones_like(absent), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, SOAP], ids=str)
def test_an_accelerator_keeps_what_fits_without_looking(options):
    """There all blocks are computed, and those that fit keep their root: the result is the same."""
    own = parameters(*[(6, 6)] * 4, dtype=torch.float64)
    optimizer = Shampoo(own, refresh="together", refresh_tolerance=0.05, **options)
    grads = [gradients((6, 6), 2, seed=i) for i in range(4)]
    train(optimizer, [(p, g[:1]) for p, g in zip(own, grads, strict=True)])
    # two blocks see their own gradient again, two another one
    pairs = [(p, [g[i // 2]]) for i, (p, g) in enumerate(zip(own, grads, strict=True))]
    group = optimizer.param_groups[0]
    train(optimizer, pairs)
    stack = optimizer._plans[0].stacks[0]
    results = []
    for device in ("cpu", "cuda"):
        twin = dataclasses.replace(
            stack, device=torch.device(device), root={k: v.clone() for k, v in stack.root.items()},
            extra={k: v.clone() for k, v in stack.extra.items()},
        )  # fmt: skip
        moves = torch.ones(4).double()
        if options:
            eigenbasis.refresh_(twin, range(4), set(), moves, group)
        else:
            factors.refresh_roots_(twin, range(4), moves, group)
        results.append((twin.root["left"], twin.extra.get("exp_avg_sq", moves)))
    changed = [
        not torch.equal(a, b) for a, b in zip(results[0][0], stack.root["left"], strict=True)
    ]
    assert changed == [False, False, True, True]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
