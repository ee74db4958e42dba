"""Distributed Shampoo: on these kernels it does what it does alone."""

import dataclasses
import functools
import pkgutil
import threading
from fractions import Fraction

import pytest
import torch
from meta_shampoo import (
    AFTER,
    EIGEN,
    HIGHER,
    KL,
    NEWTON,
    PLAIN,
    RELATIVE,
    kernel_config,
    lists,
    maker,
    matrix_functions,
    ours,
    trained,
    types,
)
from peers import MODELS, check_agreement, check_state, run, task

from shampoo_kernels.integrations import _distributed_shampoo_config as configs
from shampoo_kernels.integrations._patching import UnsupportedPeer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", [EIGEN, AFTER, NEWTON, HIGHER, RELATIVE], ids=[
    "eigen", "eigen-after", "newton", "higher-order", "higher-order-relative"])  # fmt: skip
def test_parameters_agree(model, config):
    check_agreement(ours.INTEGRATION, maker(config), model, torch.float64)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_parameters_agree_in_float32(model, epsilon):
    make = maker(dtype=torch.float32, epsilon=epsilon)
    check_agreement(ours.INTEGRATION, make, model, torch.float32)


def test_forty_roots_are_four_calls(monkeypatch):
    def counted(owner, name):
        function, calls = getattr(owner, name), []

        @functools.wraps(function)
        def count(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, count)
        return calls

    calls, single = counted(configs, "inverse_root"), counted(lists, "matrix_inverse_root")
    make = maker(precondition_frequency=1, start_preconditioning_step=1)

    def step():
        generator = torch.Generator().manual_seed(0)
        sizes = (24, 40, 40, 40, 24)
        model = torch.nn.Sequential(*map(torch.nn.Linear, sizes, sizes[1:])).double()
        optimizer = make(list(model.parameters()))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()

    step()
    alone = len(single)
    with ours.enable():
        step()
    assert (alone, len(single) - alone, len(calls)) == (40, 0, 4)


def test_the_state_is_the_peers_and_goes_on_from_either():
    check_state(ours.INTEGRATION, maker(), "mlp")


# Failures


def outcome(make, spoil, steps=12):
    """(step, exception) at which a run ends; spoil(parameters, k) changes gradients."""
    model, loss = task("mlp", torch.float32)
    optimizer = make(list(model.parameters()))
    for k in range(steps):
        optimizer.zero_grad()
        loss(k).backward()
        spoil(list(model.parameters()), k)
        try:
            optimizer.step()
        except Exception as error:
            return k, type(error).__name__
    return steps, None


def nan_at_five(parameters, k):
    if k == 5:
        parameters[2].grad[3, 3] = torch.nan


def no_gradient_of_one(parameters, k):
    parameters[2].grad.zero_()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "spoil", "expected"),
    [
        (EIGEN, nan_at_five, "PreconditionerValueError"),
        # an all-zero factor has no inverse root: tolerated three times in a row
        (types.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0), no_gradient_of_one,
         "ValueError"),
        # a factor of rank one and 1e-12: the peer's iteration overflows
        (types.CoupledNewtonConfig(), lambda *_: None, "PreconditionerValueError"),
    ],
    ids=["nan", "tolerated", "overflow"],
)  # fmt: skip
def test_failures_are_the_peers(config, spoil, expected):
    frequency = {"precondition_frequency": 1, "start_preconditioning_step": 1, "epsilon": 1e-12}
    make = maker(config, dtype=torch.float32, **frequency)
    alone = outcome(make, spoil)
    with ours.enable():
        on_kernels = outcome(make, spoil)
    assert alone == on_kernels
    assert alone[1] == expected
    if expected == "ValueError":
        assert alone[0] == 3


@pytest.mark.filterwarnings("ignore")
def test_a_root_that_its_dtype_cannot_hold_fails_as_the_peers():
    """1/epsilon is 1e6 where a null space is inverted, and float16 ends at 65504."""
    make = maker(dtype=torch.float32, inv_factor_matrix_dtype=torch.float16,
                 inverse_exponent_override={1: 1.0})  # fmt: skip
    alone = outcome(make, lambda *_: None)
    with ours.enable():
        assert outcome(make, lambda *_: None) == alone == (2, "PreconditionerValueError")


@pytest.mark.filterwarnings("ignore")
def test_failures_of_the_kernel_config_are_counted_as_the_peers():
    """Three refreshes in a row keep the old root of what does not converge, the fourth raises."""
    often = {"precondition_frequency": 1, "start_preconditioning_step": 1}
    narrow = kernel_config(method="newton", ridge=0.0, design_floor=0.1)
    with ours.enable():
        for config, expected in ((narrow, (3, "ValueError")), (kernel_config(), (12, None))):
            assert outcome(maker(config, dtype=torch.float32, **often), lambda *_: None) == expected


def test_a_success_resets_the_count_of_failures(monkeypatch):
    refresh, counts = ours._refresh, []

    def after_three(blocks, bias_correction):
        for block in blocks:
            block._failed_amortized_computation_counter = 3
        refresh(blocks, bias_correction)
        counts.extend(block._failed_amortized_computation_counter for block in blocks)

    monkeypatch.setattr(ours, "_refresh", after_three)
    run(maker(), "mlp", torch.float64, within=ours.enable, steps=range(6))
    assert counts
    assert not any(counts)


# Switching


def namespace():
    owners = {pkgutil.resolve_name(r.owner) for r in ours.INTEGRATION._replacements}
    return {owner: dict(vars(owner)) for owner in owners}


def test_switched_off_nothing_is_left():
    before = namespace()
    with ours.enable(), ours.enable():
        assert namespace() != before
    assert namespace() == before
    with pytest.raises(NotImplementedError):
        matrix_functions.matrix_inverse_root(torch.eye(2), Fraction(2), kernel_config())


@pytest.mark.parametrize("what", ["field", "signature", "name"])
def test_another_version_is_refused(monkeypatch, what):
    before = namespace()
    with monkeypatch.context() as patch:
        if what == "field":
            block = dataclasses.make_dataclass("Block", ["factor_matrices"])
            patch.setattr(lists, "RootInvShampooKroneckerFactorsUnwrapped", block)
        elif what == "signature":
            patch.setattr(lists, "matrix_inverse_root", lambda A, p: A)
        else:
            patch.delattr(lists.BaseShampooPreconditionerList, "_update_factor_matrices")
        with pytest.raises(UnsupportedPeer, match=r"^distributed_shampoo: "):
            ours.enable()
    assert namespace() == before


def test_threads_train_side_by_side():
    """Each switches on and off by itself, in the middle of the other's steps."""
    before, found, kinds = namespace(), {}, (PLAIN, KL, PLAIN, KL)
    start = threading.Barrier(len(kinds))

    def train(i):
        start.wait()
        for _ in range(3):
            found[i] = parameters_after(maker(kind=kinds[i]), enabled=True)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert namespace() == before
    for i, kind in enumerate(kinds):
        alone = parameters_after(maker(kind=kind), enabled=False)
        assert (found[i] - alone).norm() <= 1e-9 * alone.norm()


def parameters_after(make, enabled):
    parameters, _ = trained(make, enabled, [(12, 8), (8, 8), (12, 8), (5,)], steps=8)
    return torch.cat([p.detach().flatten() for p in parameters])
