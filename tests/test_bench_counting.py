"""What benchmarks count: operations of a step, bytes of a state, the peak of a call."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import counting

OPTIMIZERS = counting.optimizers()


def test_views_are_not_counted():
    A = torch.randn(4, 6)
    with counting.CountOperations() as counted:
        A.mT.flatten(0, 1).view(2, 12)  # the copy that flatten makes of a transposed matrix
        A + A
    assert counted.total == 2


def test_operations_of_a_step_do_not_grow_with_layers():
    """20 layers fill all of the ten turns in which roots are refreshed; 60 add nothing."""
    layer = [(6, 4), (4, 6), (5,)]
    few, many = (counting.operations(OPTIMIZERS["ours"], n * layer) for n in (20, 60))
    assert many <= 1.02 * few
    adamw = [counting.operations(OPTIMIZERS["AdamW"], n * layer) for n in (20, 60)]
    assert adamw[1] > 2 * adamw[0]  # the loop over tensors that it takes on a CPU


@pytest.mark.parametrize("fake", [False, True])
def test_adamw_keeps_two_numbers_a_parameter_and_a_step_a_tensor(fake):
    shapes = [(30, 20), (20,)]
    found = counting.bytes_a_parameter(torch.optim.AdamW, shapes, fake=fake)
    assert found == pytest.approx(8 + 2 * 4 / 620)


def test_ours_keeps_moments_statistics_and_roots():
    m, n = 24, 16
    found = counting.bytes_a_parameter(OPTIMIZERS["ours"], [(m, n)], fake=False)
    floats = 2 * m * n + 2 * (m * m + n * n)
    assert 4 * floats <= found * m * n <= 4 * floats + 64  # and step counts


def test_planned_bytes_are_those_of_the_state():
    shapes = [(24, 16), (16,), (3, 40, 8)]
    found = counting.bytes_a_parameter(OPTIMIZERS["ours"], shapes, fake=False)
    assert counting.planned_bytes_a_parameter(shapes) == pytest.approx(found, rel=1e-6)
    one_side = counting.planned_bytes_a_parameter(shapes, p=(2, None))
    assert one_side < counting.planned_bytes_a_parameter(shapes, root_dtype=torch.bfloat16) < found


def test_storage_that_is_shared_counts_once():
    A = torch.zeros(10)
    storages = counting._storages({"a": A[:5], "b": [A[5:], (A,)], "c": 3})
    assert len(storages) == 3
    assert len({s.data_ptr() for s in storages}) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_of_a_call_is_what_it_holds_at_once():
    count = 2**24  # 64 MiB; two at once

    def call():
        return torch.ones(count) + torch.ones(count)  # the sum is the third

    found = counting._peak_here(call, 1) / 2**20
    assert 3 * 64 - 4 <= found <= 3 * 64 + 32


def test_a_failing_peak_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ((what, by, why),) = counting.peaks()
    assert (what, by) == ("everything", "failed")
    assert why == "no message"
