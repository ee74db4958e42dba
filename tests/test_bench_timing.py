"""How benchmarks are timed: turns, medians, quartiles. No test asserts a time."""

import pytest

from shampoo_kernels.commands._timing import in_turn, rounds_for, summary, timed


def test_summary_is_the_median_and_the_quartiles():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert summary([7.0]) == (7.0, 7.0, 7.0, 1)


def test_one_slow_round_does_not_move_the_median():
    assert summary([1.0] * 8 + [1000.0]).median == 1.0


@pytest.mark.parametrize(
    ("once", "budget", "rounds"), [(0.1, 1.0, 10), (5.0, 1.0, 3), (1e-6, 1.0, 200), (0.0, 1.0, 200)]
)
def test_rounds_fill_the_budget_within_the_limits(once, budget, rounds):
    assert rounds_for(once, budget, 3, 200) == rounds


def test_functions_take_turns_and_every_other_round_runs_backwards():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = in_turn(functions, 1.0, fewest=1, most=4)
    assert {times.rounds for times in found.values()} == {4}
    assert "".join(calls[6:]) == "abc" + "cba" + "abc" + "cba"  # after the warm-up and an estimate
    assert all(0 <= t.q1 <= t.median <= t.q3 for t in found.values())


def test_a_device_is_waited_for_before_and_after():
    events = []
    timed(lambda: events.append("call"), wait=lambda: events.append("wait"))
    assert events == ["wait", "call", "wait"]
