"""Blocks in stacks: none disturbs another, whoever is late, missing, or not finite."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradients, parameters, train

from shampoo_kernels import Shampoo, backends
from shampoo_kernels.optim import factors, stacks


def snapshot(optimizer, parameter):
    state = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    return parameter.detach().clone(), state


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_block_with_a_bad_gradient_stands_still_and_disturbs_no_other(bad):
    """1e25 is finite, but its square is not."""
    runs = []
    for poisoned in (False, True):
        W, b = parameters((8, 7), (5,))
        # block 2 is at place 1 of its stack: its root is due in steps 3 and 5, the bad one
        optimizer = Shampoo([W, b], block_size=4, start_step=2, refresh_every=2)
        grads = list(gradients((8, 7), 6, torch.float32))
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


@pytest.mark.parametrize("shape", [(5,), (), (1, 1)])
@pytest.mark.parametrize("bad", [math.nan, 1e25])
def test_a_vector_with_a_bad_gradient_stands_still(shape, bad):
    (b,) = parameters(shape)
    optimizer = Shampoo([b], weight_decay=0.1)
    grads = [*gradients(shape, 3, torch.float32), torch.full(shape, bad)]
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
    version = W._version
    train(optimizer, [(W, [None] * 3), (other, grads[:3])])
    assert torch.equal(weight, W)
    assert W._version == version
    for name in state:
        assert torch.equal(state[name], optimizer.state[W][name]), name


def test_a_step_of_one_half_leaves_the_graph_of_the_other_alone():
    """As with two players who share an optimizer: writing W would make its backward fail."""
    W, V = parameters((4, 4), (4, 4))
    optimizer = Shampoo([W, V])
    train(optimizer, [(p, gradients((4, 4), 1, torch.float32)) for p in (W, V)])
    x = torch.ones(4, 4, requires_grad=True)
    loss = (x @ W).square().sum()
    train(optimizer, [(W, [None]), (V, gradients((4, 4), 1, torch.float32))])
    loss.backward()
    optimizer.step()


def test_gradients_that_miss_every_other_step_get_roots_all_the_same():
    """Turns go by a parameter's own steps: by those of its stack it would be due in even ones."""
    W, other = parameters((6, 4), (6, 4))
    optimizer = Shampoo([W, other], refresh_every=2)
    grads = gradients((6, 4), 8, torch.float32)
    roots = []
    for step, grad in enumerate(grads):
        train(optimizer, [(W, [None if step % 2 else grad]), (other, [grad])])
        roots.append(optimizer.state[W]["left_root.0"].clone())
    assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(roots)) == 2


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


def test_a_parameter_that_comes_late_gets_roots_when_it_starts():
    W, late = parameters((6, 4), (6, 4))
    optimizer = Shampoo([W, late], start_step=3, refresh_every=100)
    grads = gradients((6, 4), 7, torch.float32)
    train(optimizer, [(W, grads[:6]), (late, [*[None] * 4, *grads[:2]])])
    assert not optimizer.state[late]["left_root.0"].any()
    kept = optimizer.state[W]["left_root.0"].clone()
    train(optimizer, [(W, grads[6:]), (late, grads[6:])])
    assert optimizer.state[late]["left_root.0"].any()
    assert torch.equal(optimizer.state[W]["left_root.0"], kept)


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
