"""Automatic mixed precision: torch.autocast, and the GradScaler with all that it does."""

import math

import pytest
import torch
from torch import nn
from training import SOAP, VARIANTS, gradients, parameters, train

from shampoo_kernels import Shampoo


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_step_under_autocast_is_the_step(options, dtype):
    """It decides itself what it multiplies in; autocast would round L and R."""
    results = []
    for enabled in (False, True):
        own = parameters((7, 5), (5,))
        optimizer = Shampoo(own, refresh_every=2, block_size=4, **options)
        with torch.autocast("cpu", dtype, enabled=enabled):
            train(optimizer, [(p, gradients(p.shape, 5, torch.float32)) for p in own])
        results.append([*own, *(x for state in optimizer.state.values() for x in state.values())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def run(scale, *, spoil=(), clip=None, steps=8, resume=None, seed=0):
    """A small net under autocast; in the steps of `spoil` one gradient overflows.

    Gives (losses, net, optimizer, scaler); `resume` is the step after which all three are saved and
    go on in new ones.
    """
    torch.manual_seed(seed)
    x, y = torch.randn(16, 6), torch.randint(4, (16,))

    def make():
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = Shampoo(net.parameters(), lr=0.02, refresh_every=2)
        return net, optimizer, torch.amp.GradScaler(
            "cpu", init_scale=scale, growth_interval=3, enabled=scale != 1
        )  # fmt: skip

    net, optimizer, scaler = make()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        if step in spoil:
            net[0].weight.grad[1, 2] = math.inf
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if step == resume:
            states = [one.state_dict() for one in (net, optimizer, scaler)]
            net, optimizer, scaler = make()
            for one, state in zip((net, optimizer, scaler), states, strict=True):
                one.load_state_dict(state)
    return losses, net, optimizer, scaler


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(clip):
    plain, scaled = run(1, clip=clip), run(2.0**10, clip=clip)
    assert same(plain[1], scaled[1])
    assert plain[0] == scaled[0]
    assert plain[0][-1] < plain[0][0]
    assert scaled[3].get_scale() == 2.0**12  # it grew twice in eight steps


@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_overflow_skips_the_step_of_all_and_halves_the_scale(clip):
    """The scaler does not call step(): nothing counts as skipped by the optimizer itself."""
    _, net, optimizer, scaler = run(2.0**10, spoil=(0, 4), clip=clip)
    assert all(p.isfinite().all() for p in net.parameters())
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert steps == {6.0}
    assert optimizer.metrics()["skipped_gradients"] == 0
    # 1/2, then after three good ones 2, 1/2, 2
    assert scaler.get_scale() == 2.0**10


def test_a_scaler_resumes_with_the_optimizer_to_the_same_bits():
    whole, parts = run(2.0**10, spoil=(2,)), run(2.0**10, spoil=(2,), resume=3)
    assert same(whole[1], parts[1])
    assert whole[3].state_dict() == parts[3].state_dict()
    assert whole[0] == parts[0]


def test_one_scaler_for_two_optimizers_skips_the_one_that_overflowed():
    W, V = parameters((6, 4), (6, 4))
    first, second = Shampoo([W]), Shampoo([V], **SOAP)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = W.detach().clone(), V.detach().clone()
    grad = gradients((6, 4), 1, torch.float32)[0]
    scaler.scale((W * grad).sum() + (V * grad).sum()).backward()
    W.grad[0, 0] = math.nan
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(W, before[0])
    assert not torch.equal(V, before[1])
    assert scaler.get_scale() == 2.0


def test_without_a_scaler_the_block_that_overflowed_is_skipped_and_counted():
    """The same accident as above, and what the optimizer does about it alone."""
    W, V = parameters((8, 4), (6, 4))
    optimizer = Shampoo([W, V], block_size=4)
    pairs = [(p, [g.clone() for g in gradients(p.shape, 3, torch.float32)]) for p in (W, V)]
    pairs[0][1][1][5, 0] = math.inf
    train(optimizer, [(p, grads[:1]) for p, grads in pairs])
    before = W.detach().clone()
    train(optimizer, [(p, grads[1:2]) for p, grads in pairs])
    assert torch.equal(W[4:], before[4:])
    assert not torch.equal(W[:4], before[:4])
    train(optimizer, [(p, grads[2:]) for p, grads in pairs])
    assert optimizer.metrics()["skipped_gradients"] == 1
