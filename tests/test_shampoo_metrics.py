"""What metrics() counts."""

import math

import pytest
import torch
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.optim import factors
from shampoo_kernels.optim.metrics import NAMES


def counts(optimizer):
    return {name: value.item() for name, value in optimizer.metrics().items()}


def test_before_a_step_all_are_zero():
    assert counts(Shampoo(parameters((3, 3)))) == dict.fromkeys(NAMES, 0)


@pytest.mark.parametrize("options", [{}, SOAP], ids=str)
def test_blocks_roots_and_what_was_skipped(options):
    W, b, late = parameters((8, 7), (5,), (6, 4))
    optimizer = Shampoo([W, b, late], block_size=4, refresh_every=2, **options)
    grads = list(gradients((8, 7), 4, torch.float32))
    bad = grads[0].clone()
    bad[5, 1] = math.nan  # one block of four
    nan = torch.full((5,), math.inf)
    train(optimizer, [(W, [bad, bad, *grads[:2]]), (b, [nan, *gradients((5,), 3, torch.float32)])])
    found = counts(optimizer)
    assert found["skipped_gradients"] == 2 + 1
    assert found["blocks"] == 4
    assert found["blocks_without_root"] == 0
    assert found["roots_converged"] == 8
    train(optimizer, [(late, [torch.zeros(6, 4)])])
    assert counts(optimizer)["blocks"] == 4 + 2
    assert counts(optimizer)["blocks_without_root"] == 2


def test_a_failed_root_is_counted_and_the_old_one_kept(monkeypatch):
    W, V = parameters((6, 6), (6, 6))
    optimizer = Shampoo([W, V], refresh_every=1)
    grads = gradients((6, 6), 2, torch.float32)
    train(optimizer, [(W, grads[:1]), (V, grads[:1])])
    kept = optimizer.state[W]["left_root.0"].clone()
    real = factors.compute_

    def spoiled(root, residual, status, A, *rest, **options):
        A = A.clone()
        A[0] = math.nan
        return real(root, residual, status, A, *rest, **options)

    monkeypatch.setattr(factors, "compute_", spoiled)
    train(optimizer, [(W, grads[1:]), (V, grads[1:])])
    found = counts(optimizer)
    assert (found["roots_converged"], found["roots_kept_previous"]) == (2, 2)
    assert torch.equal(optimizer.state[W]["left_root.0"], kept)


def test_metrics_are_no_part_of_the_state_and_change_nothing():
    runs = []
    for asked in (False, True):
        (W,) = parameters((6, 4))
        optimizer = Shampoo([W], refresh_every=2)
        for grad in gradients((6, 4), 4, torch.float32):
            train(optimizer, [(W, [grad])])
            if asked:
                optimizer.metrics()
        runs.append((W.detach(), optimizer.state_dict()["state"][0].keys()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_parameter_without_gradient_in_this_step_is_counted_all_the_same():
    W, V = parameters((6, 4), (6, 4))
    optimizer = Shampoo([W, V])
    grads = gradients((6, 4), 2, torch.float32)
    train(optimizer, [(W, grads[:1]), (V, grads[:1])])
    before = counts(optimizer)
    train(optimizer, [(W, [None]), (V, grads[1:])])
    assert counts(optimizer) == before
