"""What models bring: shapes, dtypes and layouts of parameters, and the ways of torch.optim."""

import pytest
import torch
from torch import nn
from training import gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import statistics


def test_convolutions_in_any_memory_format():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        (W,) = parameters((6, 4, 3, 3), dtype=torch.float64)
        W = nn.Parameter(W.detach().to(memory_format=memory_format))
        optimizer = Shampoo([W], block_size=5, start_step=1)
        train(optimizer, [(W, gradients((6, 4, 3, 3), 4))])
        assert W.is_contiguous(memory_format=memory_format)
        assert optimizer.state[W]["left.0"].shape == (3, 3)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_read_16_bit_gradients_as_they_are(monkeypatch, dtype):
    """Products are exact and sums float32, so that L is that of float32 gradients to rounding."""
    seen, real = [], statistics.gram_ema_
    monkeypatch.setattr(
        statistics, "gram_ema_", lambda stat, grad, *a, **k: seen.append(grad.dtype) or real(
            stat, grad, *a, **k)
    )  # fmt: skip
    W, V = parameters((64, 48), dtype=dtype)[0], parameters((64, 48))[0]
    grads = gradients((64, 48), 3, dtype)
    optimizer = Shampoo([W, V])
    train(optimizer, [(W, grads), (V, [g.float() for g in grads])])
    assert set(seen) == {dtype, torch.float32}
    for name in ("left.0", "right.0"):
        a, b = (optimizer.state[p][name] for p in (W, V))
        # at most 64 sums in each of 3 steps, each rounded to 2^-24
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 64 * 2**-24 * b.diagonal().max().item())


def test_a_parameter_is_trained_alike_among_those_of_other_dtypes():
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    alone, among = ([parameters((6, 4), dtype=d)[0] for d in dtypes] for _ in range(2))
    grads = [gradients((6, 4), 4, d) for d in dtypes]
    for parameter, own in zip(alone, grads, strict=True):
        train(Shampoo([parameter], refresh_every=1), [(parameter, own)])
    train(Shampoo(among, refresh_every=1), list(zip(among, grads, strict=True)))
    for a, b in zip(alone, among, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_another_dtype():
    W, V = parameters((6, 4), dtype=torch.bfloat16)[0], parameters((6, 4), dtype=torch.bfloat16)[0]
    W.grad_dtype = None
    grads = gradients((6, 4), 3, torch.bfloat16)
    train(Shampoo([W]), [(W, [grads[0], grads[1].float(), grads[2].double()])])
    train(Shampoo([V]), [(V, grads)])
    # up to one rounding of the weights a step
    torch.testing.assert_close(W, V, rtol=3 * 2**-8, atol=0)


@pytest.mark.parametrize("shapes", [[(6, 4)], [(6, 4), (3,)], [(6, 4), (6, 4)]], ids=str)
def test_a_compiled_step_is_the_step(shapes):
    ours, theirs = parameters(*shapes), parameters(*shapes)
    pairs = [[(p, gradients(p.shape, 4, torch.float32)) for p in own] for own in (ours, theirs)]
    train(Shampoo(ours), pairs[0])
    optimizer = Shampoo(theirs)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    train(optimizer, pairs[1])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (), (1,), (1, 1), (2, 1, 3)])
def test_shapes_at_the_edge(shape):
    (W,) = parameters(shape)
    before = W.detach().clone()
    train(Shampoo([W], start_step=1), [(W, gradients(shape, 3, torch.float32))])
    assert W.isfinite().all()
    assert W.numel() == 0 or not torch.equal(W, before)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)])
def test_a_tensor_learning_rate(lr):
    W, V = parameters((6, 4))[0], parameters((6, 4))[0]
    grads = gradients((6, 4), 4, torch.float32)
    train(Shampoo([W], lr=lr, start_step=2), [(W, grads)])
    train(Shampoo([V], lr=0.01, start_step=2), [(V, grads)])
    torch.testing.assert_close(W, V, rtol=1e-6, atol=1e-7)


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
