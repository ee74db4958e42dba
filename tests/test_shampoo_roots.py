"""When the roots of a block are computed, and what stands in before."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.profiler import ProfilerActivity, profile
from training import gradients, parameters, train

from shampoo_kernels import Shampoo, native, use_backend
from shampoo_kernels.optim import factors, stacks, turns


@pytest.fixture
def computed(monkeypatch):
    """Numbers of blocks in each call that computes roots."""
    calls = []
    real = factors.compute_
    monkeypatch.setattr(
        factors, "compute_",
        lambda root, *rest, **options: calls.append(len(root)) or real(root, *rest, **options),
    )  # fmt: skip
    return calls


FIRST = {"zero": torch.zeros(6, 4), "nan": torch.full((6, 4), math.nan)}


@pytest.mark.parametrize("first", FIRST)
def test_a_block_gets_its_roots_with_its_first_usable_gradient(first):
    """What counts for nothing (no step for NaN, no statistics for zero) delays only itself."""
    W, V = parameters((6, 4))[0], parameters((6, 4))[0]
    grads = gradients((6, 4), 3, torch.float32)
    optimizer = Shampoo([W], weight_decay=0, refresh_every=100, betas=(0.9, 0.9), shampoo_beta=0.9)
    train(optimizer, [(W, [FIRST[first], *grads[:1]])])
    assert optimizer.state[W]["left_root.0"].any()
    train(optimizer, [(W, grads[1:])])
    other = Shampoo([V], weight_decay=0, refresh_every=100, betas=(0.9, 0.9), shampoo_beta=0.9)
    train(other, [(V, grads)])
    if first == "nan":
        assert torch.equal(W, V)
    assert torch.nn.functional.cosine_similarity(
        (W - parameters((6, 4))[0]).flatten(), (V - parameters((6, 4))[0]).flatten(), dim=0
    ) > 0.99  # fmt: skip


def test_without_a_root_a_block_takes_the_graft_alone(monkeypatch):
    """As on a device where the roots wait for their turn."""
    monkeypatch.setattr(turns, "due", lambda *_: ((), set()))
    own, theirs = (parameters((6, 4), (6, 4), dtype=torch.float64) for _ in range(2))
    optimizer = Shampoo(own, lr=0.01, nesterov=False)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95))
    for each, pair in ((optimizer, own), (adamw, theirs)):
        train(each, [(p, gradients((6, 4), 20, seed=i)) for i, p in enumerate(pair)])
    assert not optimizer.state[own[0]]["left_root.0"].any()
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_what_is_due_on_an_accelerator_is_known_without_looking(monkeypatch):
    """There a stack of 6 blocks, of one parameter each, has the device of its tensors alone."""
    own = parameters(*[(6, 4)] * 6)
    optimizer = Shampoo(own)
    train(optimizer, [(p, gradients((6, 4), 1, torch.float32)) for p in own])
    stack = dataclasses.replace(optimizer._plans[0].stacks[0], device=torch.device("cuda"))
    monkeypatch.setattr(turns, "waiting", lambda *_: pytest.fail("looked"))
    group = {**optimizer.defaults, "refresh_every": 3, "start_step": 5}
    for steps, place, expected in (
        ([4] * 6, 0, []),
        ([5] * 6, 0, [0, 1, 2, 3, 4, 5]),
        ([6] * 6, 0, [0, 3]),
        ([6] * 6, 1, [2, 5]),
        ([7, 7, 7, 5, 7, 2], 0, [1, 3, 4]),  # a late one starts, another has not
        ([7, 8, 9, 7, 8, 9], 0, []),  # turns go by a parameter's own steps
        ([6, 7, 8, 6, 7, 8], 0, [0, 1, 2, 3, 4, 5]),
    ):
        found, first = turns.due(stack, steps, group, place)
        assert list(found) == expected, (steps, place)
        assert first == {i for i, step in enumerate(steps) if step == 5}


def test_layers_behind_a_head_of_zeros_get_roots_in_the_second_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    nn.init.zeros_(model[2].weight)
    optimizer = Shampoo(model.parameters())
    X, Y = torch.randn(64, 8), torch.randn(64, 4)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        seen.append(optimizer.state[model[0].weight]["left_root.0"].any().item())
    assert seen == [False, True]


def test_a_checkpoint_made_before_training_delays_no_root():
    model = nn.Linear(6, 4)
    optimizer = Shampoo(model.parameters())
    get_optimizer_state_dict(model, optimizer)
    pairs = [(p, gradients(p.shape, 1, torch.float32)) for p in model.parameters()]
    train(optimizer, pairs)
    assert optimizer.state[model.weight]["left_root.0"].triu(1).any()


def test_a_start_step_lowered_in_a_run_computes_roots_at_once():
    (W,) = parameters((6, 4))
    optimizer = Shampoo([W], start_step=1000)
    train(optimizer, [(W, gradients((6, 4), 12, torch.float32))])
    optimizer.param_groups[0]["start_step"] = 5
    train(optimizer, [(W, gradients((6, 4), 1, torch.float32))])
    assert optimizer.state[W]["left_root.0"].triu(1).any()


def test_each_step_refreshes_its_slice_of_every_stack(computed):
    own = parameters(*[(6, 4)] * 7)
    optimizer = Shampoo(own, start_step=4, refresh_every=3)
    sizes = []
    for _ in range(9):
        computed.clear()
        train(optimizer, [(p, gradients((6, 4), 1, torch.float32, i)) for i, p in enumerate(own)])
        sizes.append(list(computed))
    #  of 7 blocks, slices 0, 1, 2 have 3, 2, 2; all at step 4; then steps 5, 6, ... mod 3
    assert sizes == [[], [], [], [7, 7], [2, 2], [3, 3], [2, 2], [2, 2], [3, 3]]


@pytest.mark.parametrize("apart", [False, True])
def test_every_step_refreshes_as_many_blocks_over_all_stacks_and_groups(computed, apart):
    own = parameters(*[(3 + i, 5) for i in range(7)], (9,), *[(20, 5)] * 3)
    optimizer = Shampoo([{"params": [p]} for p in own] if apart else own, block_size=5,
                        refresh_every=4)  # fmt: skip
    pairs = [(p, gradients(p.shape, 1, torch.float32)) for p in own]
    counts = []
    for _ in range(13):
        computed.clear()
        train(optimizer, pairs)
        counts.append(sum(computed) // 2)  # left and right
    blocks = counts[0]
    assert blocks == 3 * 1 + 4 * 2 + 3 * 4
    assert set(counts[1:]) <= {blocks // 4, -(-blocks // 4)}
    assert sum(counts[1:5]) == blocks


def test_blocks_that_come_late_are_computed_in_one_call_and_once(computed):
    own = parameters(*[(6, 6)] * 12)
    optimizer = Shampoo(own, refresh_every=3)
    grads = gradients((6, 6), 4, torch.float32)
    train(optimizer, [(p, grads[:3]) for p in own[:6]])
    computed.clear()
    train(optimizer, [(p, grads[3:]) for p in own])
    assert computed == [6 + 2, 6 + 2]  # left and right: six late ones and two whose turn it is


def test_small_parts_keep_every_turn(monkeypatch):
    results = []
    for size in (stacks.PART_BYTES, 1):
        monkeypatch.setattr(stacks, "PART_BYTES", size)
        own = parameters(*[(6, 4)] * 5, dtype=torch.float64)
        optimizer = Shampoo(own, refresh_every=3)
        train(optimizer, [(p, gradients((6, 4), 6, seed=i)) for i, p in enumerate(own)])
        results.append([optimizer.state[p]["left_root.0"] for p in own])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("method", ["newton", "product", "eigh"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_refresh_keeps_to_its_workspace(monkeypatch, tmp_path, method, precision, backend):
    """What torch allocates at most at a time; native kernels keep 3 to 5 matrices a thread more,
    and of blocks that a slice picks nothing else."""
    limit, d = 1 << 20, 32
    monkeypatch.setattr(factors, "ROOT_BYTES", limit)
    own = parameters(*[(d, d)] * 1000)
    for p in own:
        p.grad = torch.randn(d, d)
    options = {"root_method": method, "precision": precision}
    optimizer = Shampoo(own, refresh_every=10**6, start_step=2, **options)
    optimizer.step()
    stack = optimizer._plans[0].stacks[0]
    stack.steps.add_(1)
    arguments = range(len(own)), torch.ones(len(own)), optimizer.param_groups[0]
    chosen = use_backend(backend) if backend else contextlib.nullcontext()
    cpu = [ProfilerActivity.CPU]
    with chosen, profile(activities=cpu, profile_memory=True, acc_events=True) as trace:
        factors.refresh_roots_(stack, *arguments)
    used = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    native_kernel = backend is None and method != "product" and native.lib is not None
    assert (0 if native_kernel else limit / 4) < peak <= limit
