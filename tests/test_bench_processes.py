"""What the benchmark counts of a step shared by several processes, against the shapes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import processes

pytestmark = pytest.mark.skipif(not processes.available(), reason="torch has no gloo here")
# Six blocks of one shape, which two ranks can halve; vectors, which all of them keep.
SHAPES = [(24, 16)] * 6 + [(24,)]


def test_what_two_ranks_keep_and_send():
    (alone,) = processes.shares(SHAPES, 1)
    both = processes.shares(SHAPES, 2)
    assert alone.kept == 6 * 2 * 4 * (24**2 + 16**2)
    assert [share.kept for share in both] == [alone.kept // 2] * 2
    assert alone.sent == 0
    assert [share.sent for share in both] == [3 * 4 * 24 * 16] * 2
    assert all(share.collectives == 1 for share in both)
    assert processes.work(SHAPES, 2) == 0.5


def test_a_rank_that_fails_is_told():
    with pytest.raises(RuntimeError, match="a rank failed: TypeError"):
        processes.shares([("no", "shape")], 2)


def test_collectives_whose_traffic_is_not_known_are_refused():
    def func():
        raise AssertionError

    func._schema = type("Schema", (), {"name": "c10d::allreduce_"})
    with pytest.raises(NotImplementedError, match="what"):
        processes._own_part(func, ())
