"""The options of Shampoo, and what it refuses."""

import io
import math
from fractions import Fraction

import numpy as np
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
    ("lr", torch.tensor(1j)),
    ("betas", 0.9),
    ("betas", (0.9,)),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9, -0.1)),
    ("eps", 0.0),
    ("eps", math.inf),
    ("eps", 1e-60),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("shampoo_beta", 1.1),
    ("shampoo_beta", -0.1),
    ("p", 0),
    ("p", -2),
    ("p", (2, 2, 2)),
    ("p", math.inf),
    ("p", "2"),
    ("p", True),
    ("ridge", -1e-6),
    ("ridge", None),
    ("statistic", "kfac"),
    ("application", "eigenbasis"),
    ("scale", "frobenius"),
    ("scale", True),
    ("rank_rtol", 1.0),
    ("rank_rtol", -1e-6),
    ("basis_method", "qr"),
    ("graft", "lion"),
    ("graft", True),
    ("block_size", 0),
    ("block_size", 2.5),
    ("max_dimension", 0),
    ("refresh_every", 0),
    ("refresh_every", True),
    ("refresh", "never"),
    ("refresh_tolerance", 1.0),
    ("refresh_tolerance", math.nan),
    ("decoupled_weight_decay", 0),
    ("max_update_rms", 0.0),
    ("max_update_rms", math.inf),
    ("split", 0),
    ("split", (1, 2, 3)),
    ("split", 1.5),
    ("batch_dims", -1),
    ("batch_dims", True),
    ("start_step", 0),
    ("root_method", "svd"),
    ("precision", "low"),
    ("nesterov", 1),
    ("maximize", None),
    ("capturable", "yes"),
    ("root_dtype", torch.int8),
    ("root_dtype", torch.float16),
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


EDGES = [
    ("lr", 0.0),
    ("lr", 50.0),
    ("betas", (0.0, 0.0)),
    ("eps", torch.finfo(torch.float32).tiny),
    ("weight_decay", 0.0),
    ("weight_decay", 20.0),
    ("shampoo_beta", 0.0),
    ("shampoo_beta", 1.0),
    ("ridge", 0.0),
    ("p", 0.5),
    ("rank_rtol", 0.0),
    ("refresh_tolerance", 0.0),
    ("max_update_rms", 1e-30),
    ("block_size", 1),
    ("max_dimension", 1),
    ("refresh_every", 1),
    ("start_step", 1),
    ("root_dtype", torch.float64),
    ("graft", "".join(["ad", "am"])),  # equal to the one that is allowed, but not the same object
]


@pytest.mark.parametrize(("name", "value"), EDGES, ids=str)
def test_what_is_allowed_reaches_to_its_edges_and_can_be_stepped(name, value):
    W, b = parameters((6, 4), (3,))
    optimizer = Shampoo([W, b], **{name: value})
    assert optimizer.param_groups[0][name] == (value if name != "p" else (value, value))
    train(optimizer, [(p, gradients(p.shape, 3, torch.float32)) for p in (W, b)])
    assert W.isfinite().all()
    assert b.isfinite().all()


def everything(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_an_option_changed_to_a_bad_one_changes_nothing(name, value, steps):
    """In the second group: the first has stepped by the time that its turn would come."""
    own = parameters((6, 4), (4, 3))
    optimizer = Shampoo([{"params": [p]} for p in own], refresh_every=2)
    if steps:
        train(optimizer, [(p, gradients(p.shape, steps, torch.float32)) for p in own])
    for p in own:
        p.grad = torch.ones_like(p)
    before = everything(optimizer)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"^Shampoo: {name} must be .*, got "):
        optimizer.step()
    after = everything(optimizer)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.param_groups[1][name] = good
    optimizer.step()


def test_a_tensor_learning_rate_changed_in_place_is_looked_at():
    lr = torch.tensor(0.1)
    (W,) = parameters((6, 4))
    optimizer = Shampoo([W], lr=lr)
    train(optimizer, [(W, gradients((6, 4), 2, torch.float32))])
    lr.fill_(-1)
    with pytest.raises(ValueError, match=r"^Shampoo: lr must be finite and not negative, got "):
        optimizer.step()


def test_a_learning_rate_on_an_accelerator_is_not_looked_at():
    """That would mean waiting for it; meta has no value to look at."""
    lr = torch.empty((), device="meta")
    optimizer = Shampoo(parameters((6, 4)), lr=lr)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr


def test_a_group_that_was_replaced_counts():
    own, twin = parameters((6, 4)), parameters((6, 4))
    grads = gradients((6, 4), 4, torch.float32)
    optimizer, other = Shampoo(own), Shampoo(twin)
    train(optimizer, [(own[0], grads[:2])])
    train(other, [(twin[0], grads[:2])])
    changes = {"lr": 0.5, "weight_decay": 0.2, "nesterov": True}
    optimizer.param_groups[0] = {**optimizer.param_groups[0], **changes}
    other.param_groups[0].update(changes)
    train(optimizer, [(own[0], grads[2:])])
    train(other, [(twin[0], grads[2:])])
    assert torch.equal(own[0], twin[0])
    del optimizer.param_groups[0]["ridge"]
    with pytest.raises(ValueError, match=r"^Shampoo: ridge must be an option"):
        optimizer.step()


def test_the_smallest_eps_divides_nothing_by_zero():
    W, b = parameters((6, 4), (3,))
    optimizer = Shampoo([W, b], eps=torch.finfo(torch.float32).tiny)
    train(optimizer, [(p, [torch.zeros_like(p)]) for p in (W, b)])
    assert W.isfinite().all()
    assert b.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"graft": None, "start_step": 5},
        {"root_method": "newton", "p": 2.5},
        {"root_method": "newton", "precision": "high", "ridge": 1e-5},
        {"root_method": "product", "p": (2, 3)},
        {"root_method": "newton", "rank_rtol": 1e-6},
        {"application": "soap"},
        {"application": "soap", "graft": None, "p": 4},
        {"statistic": "kl", "p": (2, 4)},
        {"refresh_tolerance": 0.1, "p": 2.5},
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValueError, match=r"^Shampoo: "):
        Shampoo(parameters((3, 3)), **options)


def test_options_are_kept_as_plain_values():
    own = parameters((3, 3))
    optimizer = Shampoo(own, p=(Fraction(5, 2), 2.0), betas=[0.8, 0.9], refresh_every=10)
    assert optimizer.param_groups[0]["p"] == (2.5, 2)
    assert isinstance(optimizer.param_groups[0]["p"][1], int)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert "refresh_every: 10" in repr(optimizer)
    assert optimizer.defaults["p"] == (2.5, 2)
    train(optimizer, [(own[0], gradients((3, 3), 2, torch.float32))])
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", [Fraction, np.float64, np.float32])
@pytest.mark.parametrize("later", [False, True])
def test_numbers_of_other_libraries_are_kept_as_plain_ones(kind, later):
    half = kind(0.5)
    given = {"lr": half, "betas": (half, half), "eps": half, "weight_decay": half,
             "shampoo_beta": half, "ridge": half, "p": half, "block_size": np.int64(4),
             "max_dimension": np.int32(9), "refresh_every": np.int8(2)}  # fmt: skip
    (W,) = parameters((6, 5))
    optimizer = Shampoo([W], **({} if later else given))
    if later:
        optimizer.param_groups[0].update(given)
    train(optimizer, [(W, gradients((6, 5), 3, torch.float32))])
    group = optimizer.param_groups[0]
    for name, value in given.items():
        plain = group[name] if isinstance(group[name], tuple) else (group[name],)
        assert {type(x) for x in plain} <= {float, int}, name
        assert set(plain) == {float(x) for x in np.atleast_1d(value)}, name
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


def test_a_wrong_backend_is_named(monkeypatch):
    monkeypatch.setenv("SHAMPOO_KERNELS_BACKEND", "bogus")
    with pytest.raises(ValueError, match=r"^SHAMPOO_KERNELS_BACKEND must be one of"):
        Shampoo([nn.Parameter(torch.zeros(2, 2))])
