"""The steps that a small matrix may leave out, and which matrices the one-launch kernels take."""

import math
import types

import pytest
import torch

from shampoo_kernels.ops import roots, small
from shampoo_kernels.schedules import in_squares, reaches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("floor", [1e-2, 1e-6])
def test_a_matrix_within_reach_of_a_step_may_start_there(floor, p, dtype):
    """Whatever step it starts at, every eigenvalue within reach ends where the schedule does."""
    steps = roots.schedule("newton", floor, p, dtype)
    reach = reaches(steps, floor, p)
    assert len(reach) == len(steps)
    assert reach[-1] > 0
    tolerance = 1e-7 if dtype == torch.float32 else 1e-14
    for start, away in enumerate(reach):
        for M in (1 - away, 1 - away / 3, 1.0, 1 + away / 3, 1 + away):
            s = M ** (1 / p)
            for step in steps[start:]:
                s *= sum(c * s ** (p * k) for k, c in enumerate(step))
            assert abs(s - 1) <= 1.01 * tolerance + 4e-15, (start, M)


def test_steps_with_reach_are_the_schedule():
    table = roots.steps_with_reach(1e-4, 3, torch.float32)
    steps = roots.schedule("newton", 1e-4, 3, torch.float32)
    assert table.shape == (len(steps), 6)
    assert table[0, 5] == math.inf
    for row, step in zip(table.tolist(), steps, strict=True):
        assert row[: len(step)] == list(in_squares(step))
        assert not any(row[len(step) : 5])
    assert (table[1:, 5].diff() <= 0).all()


def test_forms():
    """Every n has one; float64 has no tensor cores; none is measured, which the rows say."""
    assert [form.most_n for form in small.FORMS] == sorted(form.most_n for form in small.FORMS)
    assert small.FORMS[-1].most_n == small.MOST_N
    assert not any(form.measured for form in small.FORMS)
    for n in range(1, small.MOST_N + 1):
        assert not small.tensor_cores(n, torch.float64)
    assert {small.tensor_cores(n, torch.float32) for n in (32, 128)} == {False, True}


def test_nothing_on_a_cpu_goes_to_them():
    A = torch.eye(8)[None]
    assert not small.takes_root(A)
    assert not small.takes_basis(A)
    assert not small.takes_power(A, 16)


@pytest.mark.parametrize(
    ("n", "dtype", "vectors", "kilobytes"),
    [(1024, torch.float32, 16, 99), (1024, torch.float64, 16, 163), (9, torch.float64, 40, 99)],
)
def test_power_iterations_that_fit(monkeypatch, n, dtype, vectors, kilobytes):
    """n vectors at most count; 16, and 1024 rows, are what a thread block holds."""

    def takes(n, vectors, limit=kilobytes << 10):
        monkeypatch.setattr(small, "_limit", lambda device: limit)
        A = types.SimpleNamespace(shape=(4, n, n), device=None, is_cuda=True, numel=lambda: 4,
                                  element_size=lambda: dtype.itemsize)  # fmt: skip
        return small.takes_power(A, vectors)

    assert takes(n, vectors)
    assert not takes(n, vectors, limit=n * 16 * dtype.itemsize + small._STATIC)
    assert not takes(1025, vectors)
    assert not takes(n + 16, max(vectors, 17))
