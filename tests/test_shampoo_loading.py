"""What Shampoo loads: its own state, an older one, and nothing that does not fit."""

import copy
from pathlib import Path

import pytest
import torch
from states import make
from test_shampoo_state import OPTIONS, SHAPES, parameters, same_state, steps
from torch.optim import AdamW

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import options


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
        (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number"),
        (lambda d: d["param_groups"][0].pop("ridge"), "ridge must be an option of every"),
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
    assert other.param_groups[0]["version"] == 2
    steps(optimizer, own, 2, 6)
    steps(other, twin, 2, 6)
    same_state(optimizer, other)
    assert len(other.state) == len(SHAPES)


STATES = Path(__file__).parent / "states"


def loaded(version, **options):
    saved = torch.load(STATES / f"version_{version}.pt", weights_only=True)
    own = make.parameters()
    for p, weight in zip(own, saved["weights"], strict=True):
        p.data.copy_(weight)
    optimizer = Shampoo(own, lr=1.0, **options)
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer, own, saved["after"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_stored_state_of_every_version_goes_on_as_it_did_then(version):
    """Written by that version itself, with the weights three steps later, in float64."""
    optimizer, own, after = loaded(version)
    make.steps(optimizer, own, 3, 6)
    for a, b in zip(own, after, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=1e-9)
    assert optimizer.state_dict()["param_groups"][0]["version"] == 2


def test_there_is_a_stored_state_of_the_present_version():
    version = Shampoo(make.parameters()).param_groups[0]["version"]
    assert (STATES / f"version_{version}.pt").exists()
    optimizer, _, _ = loaded(version)
    fresh = make.made(Shampoo)["optimizer"]["state"]
    assert {k: set(v) for k, v in optimizer.state_dict()["state"].items()} == {
        k: set(v) for k, v in fresh.items()
    }


def test_a_state_from_before_an_option_existed_was_made_without_it():
    """Whatever the optimizer was made with: what is loaded replaces it, as in torch.optim."""
    optimizer, own, after = loaded(2, statistic="kl", refresh="together", max_update_rms=1e-3)
    assert optimizer.param_groups[0]["max_update_rms"] is None
    make.steps(optimizer, own, 3, 6)
    for a, b in zip(own, after, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=1e-9)


def without_later_options(groups):
    return [{k: v for k, v in group.items() if k not in options.ADDED} for group in groups]


@pytest.mark.parametrize("by", ["state_dict", "pickle"])
def test_options_that_came_later_do_not_change_a_run_from_before(by):
    """Enough blocks of one shape that whose turn it is shows."""
    shapes = [*SHAPES, *[(8, 8)] * 4]
    own, twin = parameters(shapes=shapes), parameters(shapes=shapes)
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 4)
    if by == "state_dict":
        other = Shampoo(twin, application="soap", graft=None, split=2, refresh="together")
        saved = optimizer.state_dict()
        saved["param_groups"] = without_later_options(saved["param_groups"])
        other.load_state_dict(saved)
        for a, b in zip(own, twin, strict=True):
            b.data.copy_(a.data)
    else:
        twin, other = copy.deepcopy((own, optimizer))
        state = other.__getstate__()
        (state["defaults"],) = without_later_options([state["defaults"]])
        state["param_groups"] = without_later_options(state["param_groups"])
        other.__setstate__(state)
        other.add_param_group({"params": parameters(shapes=[(2, 2)])})
    steps(optimizer, own, 4, 9)
    steps(other, twin, 4, 9)
    same_state(optimizer, other)
    assert all(torch.equal(a, b) for a, b in zip(own, twin, strict=True))


@pytest.mark.parametrize(
    ("made", "loading"),
    [
        ({}, {"application": "soap", "graft": None}),
        ({"application": "soap", "graft": None}, {}),
        ({"graft": "sgd"}, {}),
        ({"statistic": "kl"}, {}),
    ],
    ids=str,
)
def test_what_is_loaded_brings_its_variant_along(made, loading):
    own, twin = parameters(), parameters()
    optimizer, other = Shampoo(own, **OPTIONS, **made), Shampoo(twin, **OPTIONS, **loading)
    steps(optimizer, own, 0, 4)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(own, twin, strict=True):
        b.data.copy_(a.data)
    steps(optimizer, own, 4, 6)
    steps(other, twin, 4, 6)
    same_state(optimizer, other)


@pytest.mark.parametrize(
    "change",
    [
        {"application": "soap", "graft": None},
        {"graft": "sgd"},
        {"scale": "least_squares"},
        {"statistic": "frobenius"},
        {"p": (2, None)},
        {"max_dimension": 6},
        {"precondition": False},
        {"split": (1, 5)},
        {"batch_dims": 1},
    ],
    ids=str,
)
def test_a_variant_cannot_change_in_flight(change):
    own = parameters()
    optimizer = Shampoo(own, **{**OPTIONS, "start_step": 1})
    steps(optimizer, own, 0, 2)
    before = [p.detach().clone() for p in own]
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=r"cannot change once there is state"):
        steps(optimizer, own, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
