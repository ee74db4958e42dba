"""Sampled gradients against autograd example by example, the laws of labels and batches, memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense import mlp, one_by_one
from torch import nn

from shampoo_kernels.study import FactoredGradients, Unmeasurable, layer_names, measure, sample

F64 = torch.float64
# float64 sums of at most 1e4 products of size 1, in another order
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


class Odd(nn.Module):
    """Everything that needs care: in-place activations, a module called twice, a grouped and a
    strided convolution, a weight used as a plain tensor, dropout, batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(3, 3, 3, groups=3, padding="same")
        self.twice = nn.Linear(4, 4)
        self.mix = nn.Parameter(torch.randn(12, 12) / 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        x = self.depthwise(self.act(self.norm(self.conv(x))))
        x = self.act(self.twice(torch.tanh(self.twice(x))))
        x = (x.flatten(2).mT @ self.mix.view(4, 3, 4, 3)[0, :, 0]) + x.flatten(2).mT
        return self.head(self.drop(x.flatten(1)))


def odd():
    torch.manual_seed(0)
    return Odd().double(), torch.randn(7, 2, 8, 8, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2, 0])


def test_every_kind_of_layer_has_autograds_gradients():
    model, x, y = odd()
    model.eval()
    got = sample(model, x, y, chunk=3)
    assert list(got) == layer_names(model) == ["mix", "conv", "depthwise", "twice", "head"]
    losses = F.cross_entropy(model(x), y, reduction="none")
    for layer, grads in got.items():
        torch.testing.assert_close(grads.values(), one_by_one(model, layer, losses), **CLOSE)
        assert grads.layer == layer
    assert got["head"].kfac is not None
    assert got["depthwise"].kfac is None


def test_nothing_of_the_model_changes():
    model, x, y = odd()
    model.train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.random.get_rng_state()
    sample(model, x, y)
    with pytest.raises(ValueError, match="labels"):
        sample(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tied_weights_are_counted_with_every_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).tanh())

    torch.manual_seed(0)
    model, x = Tied().double(), torch.randint(0, 5, (6, 3))
    y = torch.randint(0, 5, (6, 3))
    grads = sample(model, x, y, layers="head")["head"]
    losses = F.cross_entropy(model(x).mT, y, reduction="none").mean(1)
    torch.testing.assert_close(grads.values(), one_by_one(model, "head", losses), **CLOSE)
    assert grads.kfac is None


def test_weights_of_attention_that_no_linear_layer_calls():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x, y = (
        Attention().double(),
        torch.randn(5, 3, 8, dtype=F64),
        torch.randn(5, 3, 8).double(),
    )
    got = sample(model, x, y, loss="squared")
    losses = (model(x) - y).square().sum(-1).mean(-1) / 2
    assert list(got) == ["inner.in_proj_weight", "inner.out_proj"]
    for layer, grads in got.items():
        torch.testing.assert_close(grads.values(), one_by_one(model, layer, losses), **CLOSE)


def test_losses():
    model, x = mlp(5, 4, 3), torch.randn(6, 5, dtype=F64)
    classes, values = torch.randint(0, 3, (6,)), torch.randn(6, 3, dtype=F64)
    outputs = model(x)
    for loss, targets, losses in (
        ("cross_entropy", classes, F.cross_entropy(outputs, classes, reduction="none")),
        ("squared", values, (outputs - values).square().sum(1) / 2),
        (F.l1_loss, values, (outputs - values).abs().mean(1)),
    ):
        got = sample(model, x, targets, loss=loss, layers="0")["0"]
        torch.testing.assert_close(got.values(), one_by_one(model, "0", losses), **CLOSE)


def test_positions():
    """Outputs (N, T, C): one example is a sequence, its loss the mean over the positions."""
    model, x = mlp(5, 4, 3), torch.randn(6, 7, 5, dtype=F64)
    y = torch.randint(0, 3, (6, 7))
    losses = F.cross_entropy(model(x).mT, y, reduction="none").mean(1)
    for layer, grads in sample(model, x, y).items():
        torch.testing.assert_close(grads.values(), one_by_one(model, layer, losses), **CLOSE)


def test_kfac_factors():
    model, x = mlp(5, 4, 3), torch.randn(9, 5, dtype=F64)
    grads = sample(model, x, labels="expected", layers="0", chunk=2)["0"]
    p = model(x).softmax(1)
    hidden = model[1](model[0](x)).detach()
    delta = torch.stack([(p - F.one_hot(torch.tensor(s), 3)) @ model[2].weight for s in range(3)])
    delta = (delta * (1 - hidden**2)).detach()  # (C, N, 4)
    expected = torch.einsum("ns,snm,snk->mk", p.detach(), delta, delta) / 9
    torch.testing.assert_close(grads.kfac[0], expected, **CLOSE)
    torch.testing.assert_close(grads.kfac[1], x.mT @ x / 9, **CLOSE)


def test_float32_model_within_its_rounding():
    """Against the same model in float64: sums of 64 products, 64 * 2^-24 = 4e-6 of size 1."""
    model, x = mlp(64, 16, 3), torch.randn(20, 64, dtype=F64)
    exact = measure(sample(model, x, labels="expected", layers="0")["0"]).cosines
    single = measure(sample(model.float(), x.float(), labels="expected", layers="0")["0"]).cosines
    for name in ("optimal", "shampoo_squared", "shampoo", "kfac", "ekfac", "corrected"):
        assert single[name] == pytest.approx(exact[name], abs=1e-4)


MEMORY = """
import re
import torch
from torch import nn
from shampoo_kernels.study import measure, sample

def most():  # of this process since it began; ru_maxrss would count what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
inputs, labels = torch.randn(10_000, 512), torch.randint(0, 10, (10_000,))
before = most()
grads = sample(model, inputs, labels, layers="0", dtype=torch.float32)["0"]
names = ["optimal", "shampoo_squared", "corrected"]
found = measure(grads, names=names)
assert grads.count == 10_000 and grads.shape == (512, 512)
assert all(0 < value < 1.001 for value in found.cosines.values()), found
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_layer_of_512_with_10_000_samples_takes_little_memory():
    """10,000 gradients of 512 x 512 would be 10 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) * 1024 < 2 << 30


def test_too_many_gradients_are_refused_before_they_are_made():
    model = nn.Sequential(nn.Conv2d(3, 3, 5, groups=3, padding=2), nn.Flatten(), nn.Linear(192, 2))
    inputs = torch.zeros(1, 3, 8, 8).expand(50_000, -1, -1, -1)
    words = r'layer "0", \(50000, 1, 3, 25\), take 0.0 GiB, more than max_bytes = 0.0'
    with pytest.raises(ValueError, match=words):
        sample(model, inputs, torch.zeros(50_000).long(), layers="0", max_bytes=1 << 20)


def bad(**changes):
    model = mlp(4, 3, 3)
    settings = {"inputs": torch.randn(5, 4, dtype=F64), "targets": torch.tensor([0, 1, 2, 0, 1])}
    return lambda: sample(model, **(settings | changes))


def unused():
    model = mlp(4, 3, 3)
    model.register_module("spare", nn.Linear(2, 2))
    model.forward = lambda x: nn.Sequential.forward(model[:3], x)
    return model


def frozen():
    model = mlp(4, 3, 3)
    model[0].requires_grad_(False)
    return model


def kink():
    """A finite output with a gradient that is not: the root of 0."""
    model = mlp(4, 3, 3)
    nn.init.zeros_(model[0].bias)
    model.forward = lambda x: model[0](x).abs().sqrt()
    return model


def infinite(value):
    model = mlp(4, 3, 3)
    with torch.no_grad():
        model[0].weight[0, 0] = value
    return model


X, Y = torch.ones(5, 4, dtype=F64), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (bad(layers="5"), ValueError, 'no layer "5"; the model has: 0, 2'),
        (bad(layers=["0", "0.bias"]), ValueError, 'layer "0.bias" must have a weight of at least'),
        (bad(loss="hinge"), ValueError, 'layer "0": loss must be "cross_entropy" or "squared"'),
        (bad(loss=F.l1_loss, labels="sampled", targets=None), ValueError, '"0": .*likelihood'),
        (bad(labels="true"), ValueError, 'labels must be "real" or "sampled" or "expected"'),
        (bad(targets=None), ValueError, 'layer "0": labels="real" needs targets'),
        (bad(labels="sampled"), ValueError, 'layer "0": labels="sampled" takes no targets'),
        (bad(targets=Y[:3]), ValueError, r'layer "0": targets must be \(5, \*\) .* got \(3,\)'),
        (bad(targets=Y[:, None]), ValueError, r"targets must be \(5,\), got \(5, 1\)"),
        (bad(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (bad(batch_size=6), ValueError, "batch_size 6 needs as many inputs, got 5"),
        (bad(labels="expected", targets=None, batch_size=2), ValueError, "needs batch_size=1"),
        (bad(inputs=[1.0]), TypeError, "inputs must be a tensor, got list"),
        (
            bad(inputs=torch.ones(5, 2, 4, dtype=F64), labels="expected", targets=None),
            ValueError,
            r'"expected" needs outputs \(N, C\), got \(5, 2, 3\) \(layer "0"\)',
        ),
        (lambda: sample(unused(), X, Y, layers="spare"), ValueError, '"spare" has no gradient'),
        (lambda: sample(unused(), X, Y, layers="spare", batch_size=5), ValueError, '"spare" has'),
        (lambda: sample(frozen(), X, Y, layers="0"), ValueError, '"0" has no gradient: it does'),
        (lambda: sample(infinite(torch.nan), X, Y), Unmeasurable, '"0": the output .* be finite'),
        (lambda: sample(kink(), 0 * X, Y, layers="0"), Unmeasurable, 'of layer "0" must be finite'),
        (bad(targets=Y.double()), TypeError, r"targets must be int64, got \(5,\) float64"),
        (bad(targets=Y + 1), ValueError, "targets must be classes from 0 to 2, got 3"),
        (bad(targets=Y - 100), ValueError, "targets must be classes from 0 to 2, got -100"),
        (lambda: sample(nn.ReLU(), X, Y), ValueError, "no layer with a matrix"),
        (lambda: sample(nn.LSTM(4, 3).double(), X, Y), ValueError, r"one tensor .* got tuple"),
    ],
)  # fmt: skip
def test_bad_input_names_the_layer(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_layer_whose_gradients_vanish_is_named_when_it_is_measured():
    model = mlp(4, 3, 3)
    nn.init.zeros_(model[2].weight)
    grads = sample(model, X, Y, layers="0")["0"]
    with pytest.raises(ValueError, match='the gradient of layer "0" is zero everywhere'):
        measure(grads)


def test_long_sides_are_measured_when_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8193, 2), nn.Linear(2, 3))
    x, y = torch.randint(0, 8193, (4,)), torch.tensor([0, 1, 2, 0])
    assert list(sample(model, x, y)) == ["1"]
    assert sample(model, x, y, layers="0")["0"].shape == (8193, 2)


def test_linear_layers_keep_factors():
    model, x = mlp(40, 30, 3), torch.randn(6, 40, dtype=F64)
    grads = sample(model, x, labels="expected")
    assert all(isinstance(g, FactoredGradients) for g in grads.values())
