"""What Shampoo loads: its own state, an older one, and nothing that does not fit."""

import copy

import pytest
import torch
from test_shampoo_state import OPTIONS, SHAPES, parameters, same_state, steps
from torch.optim import AdamW

from shampoo_kernels import Shampoo


def to(state_dict, name, dtype):
    state_dict["state"][0][name] = state_dict["state"][0][name].to(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["param_groups"][0].update(version=99), "version 2, got 99"),
        (lambda d: d["param_groups"][0].pop("version"), "version 2, got None"),
        (lambda d: d["param_groups"][0].update(block_size=3), "cannot change once there is state"),
        (lambda d: d["state"][0].pop("right.0"), "'right.0'.*got absent"),
        (lambda d: d["state"][0].update(extra=torch.zeros(2)), "'extra'.*must be absent"),
        (lambda d: d["state"].update({0: d["state"][5]}), r"parameter \(7, 5\)"),
        (lambda d: d["state"][0].pop("step"), "'step'.*got absent"),
        (
            lambda d: d["state"][0].update(step=4.0),
            r"'step'.*must be a floating tensor \(\), got 4",
        ),
        (lambda d: d["state"][0].update(extra=3), "'extra'.*must be absent, got 3"),
        (lambda d: to(d, "left.0", torch.int64), "'left.0'.*floating.*, got one of torch.int64"),
        (lambda d: to(d, "left.0", torch.complex64), "'left.0'.*got one of torch.complex64"),
        (lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be finite"),
        (
            lambda d: d["param_groups"][0].update(refresh_every=0),
            "refresh_every must be an integer",
        ),
        (lambda d: d["param_groups"][0].update(betas=None), "betas must be two numbers"),
        (lambda d: d["param_groups"][0].pop("params"), "must hold 'params'"),
        (lambda d: d.pop("state"), "must hold 'state'"),
        (lambda d: d.pop("param_groups"), "must hold 'param_groups'"),
        (lambda d: (d.clear(), d.update(AdamW(parameters()).state_dict())), "version 2, got None"),
        (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (lambda d: d["param_groups"].pop(), "different number"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 4)
    twin = copy.deepcopy(optimizer)
    bad = optimizer.state_dict()
    change(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    same_state(optimizer, twin)
    assert optimizer.param_groups[0]["block_size"] == 4


def in_version_1(state_dict):
    """There a root that had not been computed was the identity."""
    for state in state_dict["state"].values():
        for name, value in state.items():
            if "_root." in name and not value.any():
                value.fill_diagonal_(1)
    for group in state_dict["param_groups"]:
        group["version"] = 1
    return state_dict


@pytest.mark.parametrize("stop", [2, 5])
def test_a_state_of_version_1_goes_on_like_the_original(stop):
    """Before start_step, with no root computed, and after it."""
    own, twin = parameters(), parameters()
    optimizer, other = Shampoo(own, **OPTIONS), Shampoo(twin, lr=1.0)
    steps(optimizer, own, 0, stop)
    old = in_version_1(optimizer.state_dict())
    before = copy.deepcopy(old)
    other.load_state_dict(old)
    for a, b in zip(own, twin, strict=True):
        b.data.copy_(a.data)
    steps(optimizer, own, stop, 8)
    steps(other, twin, stop, 8)
    same_state(optimizer, other)
    assert other.param_groups[0]["version"] == 2
    assert old["param_groups"] == before["param_groups"]
    for key, state in old["state"].items():
        assert all(torch.equal(state[name], before["state"][key][name]) for name in state)


def test_an_unpickled_optimizer_of_version_1_goes_on_like_the_original():
    own, twin = parameters(), parameters()
    optimizer, other = Shampoo(own, **OPTIONS), Shampoo(twin, **OPTIONS)
    steps(optimizer, own, 0, 2)
    steps(other, twin, 0, 2)
    state = other.__getstate__()
    in_version_1(state)
    other.__setstate__(state)
    steps(optimizer, own, 2, 6)
    steps(other, twin, 2, 6)
    same_state(optimizer, other)
    assert len(other.state) == len(SHAPES)
