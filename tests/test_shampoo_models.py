"""What models bring: shapes, dtypes and layouts of parameters, and the ways of torch.optim."""

import pytest
import torch
from torch import nn
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import stacks, statistics


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
    seen, real = [], statistics.accumulate_
    monkeypatch.setattr(
        statistics, "accumulate_", lambda stat, grad, *a, **k: seen.append(grad.dtype) or real(
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


@pytest.mark.parametrize("options", [{}, SOAP, {"statistic": "kl"}], ids=str)
@pytest.mark.parametrize(
    ("shape", "pieces", "how"),
    [
        ((3, 6, 6), [(6, 6)] * 3, {"batch_dims": 1}),  # experts
        ((2, 2, 6, 6), [(6, 6)] * 4, {"batch_dims": 2}),
        ((18, 6), [(6, 6)] * 3, {"split": 3}),  # a fused query, key and value
        ((12, 3, 2, 1), [(6, 3, 2)] * 2, {"split": (2, 1)}),  # a convolution of two groups
    ],
    ids=str,
)
def test_a_stack_is_trained_as_its_matrices_are(options, shape, pieces, how):
    (W,) = parameters(shape)
    parts = [nn.Parameter(x.clone()) for x in W.detach().reshape(len(pieces), *pieces[0]).unbind()]
    grads = gradients(shape, 5, torch.float32)
    optimizer = Shampoo([W], block_size=6, refresh="together", refresh_every=2, **how, **options)
    train(optimizer, [(W, grads)])
    assert optimizer.state[W]["exp_avg"].shape == shape
    other = Shampoo(parts, block_size=6, refresh="together", refresh_every=2, **options)
    each = [[g.reshape(len(pieces), *pieces[0])[i] for g in grads] for i in range(len(pieces))]
    train(other, list(zip(parts, each, strict=True)))
    assert torch.equal(W.reshape(len(pieces), *pieces[0]), torch.stack(list(parts)))


def test_a_split_that_does_not_divide_changes_nothing():
    own = parameters((6, 4), (8, 4))
    optimizer = Shampoo([{"params": [own[0]]}, {"params": [own[1]], "split": 3}])
    before = own[0].detach().clone()
    for p in own:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"^Shampoo: split must divide .*\(8, 4\).*got \(3, 1\)"):
        optimizer.step()
    assert torch.equal(own[0], before)
    assert not optimizer.state


def test_the_split_cannot_change_once_there_is_state():
    (W,) = parameters((6, 4))
    optimizer = Shampoo([W])
    train(optimizer, [(W, gradients((6, 4), 1, torch.float32))])
    optimizer.param_groups[0]["split"] = 3
    with pytest.raises(ValueError, match=r"split.* cannot change"):
        optimizer.step()


def test_a_transposed_convolution_is_input_by_all_others():
    layer = nn.ConvTranspose2d(6, 4, 3)
    optimizer = Shampoo(layer.parameters(), start_step=1)
    layer(torch.randn(2, 6, 5, 5)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["left.0"].shape == (6, 6)
    assert state["right.0"].shape == (36, 36)


def test_an_embedding_has_no_factor_for_its_long_side():
    layer = nn.Embedding(50, 6)
    optimizer = Shampoo(layer.parameters(), max_dimension=40)
    layer(torch.arange(9)).square().mean().backward()
    optimizer.step()
    assert {name for name in optimizer.state[layer.weight] if "." in name} == {
        "block_step.0", "right.0", "right_root.0"
    }  # fmt: skip


def test_blocks_of_other_devices_and_dtypes_are_other_stacks():
    """No second device here but meta, where nothing is computed."""
    places = [("cpu", torch.float32), ("meta", torch.float32), ("cpu", torch.bfloat16)] * 2
    own = [nn.Parameter(torch.zeros(6, 4, device=d, dtype=t)) for d, t in places]
    states = [{} for _ in own]
    group = Shampoo([own[0]]).param_groups[0]
    built = stacks.build(own, states, group, [stacks.cut_parameter(p, group) for p in own])
    assert [[block.parameter for block in stack.blocks] for stack in built] == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]
    for parameter, state in zip(own, states, strict=True):
        assert {v.device.type for k, v in state.items() if k != "step"} == {parameter.device.type}
        assert {v.dtype for v in state.values()} == {torch.float32}


@pytest.mark.parametrize("options", [{}, SOAP, {"statistic": "kl"}], ids=str)
def test_a_model_on_two_devices_is_trained_as_its_parts_are(options):
    """In one group, in turns of the same shape; what is on meta has no values, but state there."""
    shapes = [(6, 4), (5,)] * 2
    own, alone = parameters(*shapes), parameters(*shapes[:2])
    own[2:] = [nn.Parameter(p.to("meta")) for p in own[2:]]
    options = {"refresh_every": 2, "refresh": "together", **options}
    optimizer, other = Shampoo(own, **options), Shampoo(alone, **options)
    grads = [gradients(shape, 5, torch.float32) for shape in shapes]
    pairs = list(zip(own, grads, strict=True))
    train(optimizer, [(p, [g.to(p.device) for g in given]) for p, given in pairs])
    train(other, list(zip(alone, grads[:2], strict=True)))
    assert all(map(torch.equal, own[:2], alone))
    for p in own:
        assert {x.device for name, x in optimizer.state[p].items() if name != "step"} == {p.device}
        assert optimizer.state[p]["step"] == 5
    moved = Shampoo(own[2:])
    moved.load_state_dict(other.state_dict())  # to where the parameters are
    for p, state in moved.state.items():
        assert {x.device for name, x in state.items() if name != "step"} == {p.device}


def test_a_frozen_parameter_has_no_state_and_may_thaw_later():
    W, V = parameters((6, 4), (6, 4))
    V.requires_grad_(False)
    optimizer = Shampoo([W, V], refresh_every=2)
    grads = gradients((6, 4), 6, torch.float32)
    train(optimizer, [(W, grads[:3])])
    assert V not in optimizer.state
    V.requires_grad_()
    train(optimizer, [(W, grads[3:]), (V, grads[3:])])
    assert optimizer.state[V]["step"] == 3
    assert optimizer.state[V]["left_root.0"].any()


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    optimizer = Shampoo(model.parameters())
    model.head(model.embedding(torch.arange(9))).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
