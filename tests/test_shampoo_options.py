"""The options of Shampoo, and what it refuses."""

import io
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from training import gradients, parameters, train

from shampoo_kernels import Shampoo

BAD = [
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", "fast"),
    ("lr", torch.ones(2)),
    ("lr", torch.tensor(-1.0)),
    ("betas", 0.9),
    ("betas", (0.9,)),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9, -0.1)),
    ("eps", 0.0),
    ("eps", math.inf),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("shampoo_beta", 1.0),
    ("shampoo_beta", -0.1),
    ("p", 0),
    ("p", -2),
    ("p", (2, 2, 2)),
    ("p", math.inf),
    ("p", "2"),
    ("p", True),
    ("ridge", -1e-6),
    ("ridge", None),
    ("statistic", "kl"),
    ("statistic", "frobenius"),
    ("graft", "sgd"),
    ("graft", True),
    ("block_size", 0),
    ("block_size", 2.5),
    ("max_dimension", 0),
    ("refresh_every", 0),
    ("refresh_every", True),
    ("start_step", 0),
    ("root_method", "svd"),
    ("precision", "low"),
    ("nesterov", 1),
    ("maximize", None),
    ("capturable", "yes"),
    ("root_dtype", torch.int8),
    ("root_dtype", "bfloat16"),
    ("precondition", 0),
    ("process_group", object()),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_every_bad_option_is_named(name, value):
    (W,) = parameters((3, 3))
    with pytest.raises(ValueError, match=f"^Shampoo: {name} must be .*, got "):
        Shampoo([W], **{name: value})
    with pytest.raises(ValueError, match=f"^Shampoo: {name} must be .*, got "):
        Shampoo([{"params": [W], name: value}])
    optimizer = Shampoo([W])
    with pytest.raises(ValueError, match=f"^Shampoo: {name} must be .*, got "):
        optimizer.add_param_group({"params": parameters((2,)), name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"graft": None, "start_step": 5},
        {"root_method": "newton", "p": 2.5},
        {"root_method": "newton", "precision": "high", "ridge": 1e-5},
        {"root_method": "product", "p": (2, 3)},
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValueError, match=r"^Shampoo: "):
        Shampoo(parameters((3, 3)), **options)


def test_options_are_kept_as_plain_values():
    own = parameters((3, 3))
    optimizer = Shampoo(own, p=(Fraction(5, 2), 2.0), betas=[0.8, 0.9])
    assert optimizer.param_groups[0]["p"] == (2.5, 2)
    assert isinstance(optimizer.param_groups[0]["p"][1], int)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert "refresh_every: 10" in repr(optimizer)
    assert optimizer.defaults["p"] == (2.5, 2)
    train(optimizer, [(own[0], gradients((3, 3), 2, torch.float32))])
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", ["newton", "product"])
def test_every_root_method_trains_alike(method):
    results = []
    for root_method in (method, "eigh"):
        own = parameters((7, 5), (7, 5), (3, 2, 2, 2), dtype=torch.float64)
        options = {"ridge": 1e-3, "block_size": 4, "root_method": root_method}
        train(Shampoo(own, **options), [(p, gradients(p.shape, 6)) for p in own])
        results.append(own)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def bad_gradients():
    dense, sparse = parameters((4, 3), (4, 3))
    dense.grad = torch.ones(4, 3)
    sparse.grad = torch.ones(4, 3).to_sparse()
    complex_ = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
    complex_.grad = torch.ones(4, 3, dtype=torch.complex64)
    return {
        "sparse": ([dense, sparse], {}),
        "real": ([dense, complex_], {}),
        "capturable": ([dense], {"capturable": True}),
    }


@pytest.mark.parametrize("what", ["sparse", "real", "capturable"])
def test_what_cannot_be_stepped_is_refused_before_anything_changes(what):
    own, options = bad_gradients()[what]
    optimizer = Shampoo(own[:1], **options)
    for parameter in own[1:]:
        optimizer.add_param_group({"params": [parameter]})
    before = own[0].detach().clone()
    with pytest.raises(RuntimeError, match=f"^Shampoo: .*{what}"):
        optimizer.step()
    assert torch.equal(own[0], before)
    assert not optimizer.state


def test_named_parameters_and_repeated_ones():
    layer = nn.Linear(3, 4)
    optimizer = Shampoo(layer.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, [(p, gradients(p.shape, 2, torch.float32)) for p in layer.parameters()])
    W, V = parameters((3, 3))[0], parameters((3, 3))[0]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = Shampoo([W, W])
    grads = gradients((3, 3), 4, torch.float32)
    train(optimizer, [(W, grads)])
    train(Shampoo([V]), [(V, grads)])
    assert torch.equal(W, V)
