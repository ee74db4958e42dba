"""The table of tiles: what is selected, when a sum is split, what a row needs."""

import pytest

pytest.importorskip("triton")

from shampoo_kernels.kernels import table

GRAM = table.Row("sm_90", "gram_ema_", ("16-bit",), 2048, "descriptor", 64, 64, 4, 4, split=1024)


def test_rows_are_selected_by_n_and_k(monkeypatch):
    """The first that serves; a row for long sums stands after one with a limit on k."""
    short = GRAM._replace(k=1000, block=32)
    monkeypatch.setattr(table, "ROWS", (short, GRAM, GRAM._replace(n=1 << 31, block=128)))
    select = table.select
    assert select("sm_90", "gram_ema_", "16-bit", 64, 1000, True).block == 32
    assert select("sm_90", "gram_ema_", "16-bit", 64, 1001, True).block == 64
    assert select("sm_90", "gram_ema_", "16-bit", 2049, 1000, True).block == 128
    with pytest.raises(LookupError):
        select("sm_90", "gram_ema_", "16-bit", 64, 1000, False)


def test_when_a_sum_is_split():
    """Few tiles and a long sum, never a remainder, never more programs than processors."""
    assert table.splits(GRAM, 1, 64, 8192) == 8
    assert table.splits(GRAM, 1, 512, 8192) == 2
    assert table.splits(GRAM, 1, 1024, 8192) == 1
    assert table.splits(GRAM, 64, 64, 8192) == 2
    assert table.splits(GRAM, 1, 64, 1024) == 1
    assert table.splits(GRAM, 1, 64, 8191) == 1
    assert table.splits(GRAM, 0, 64, 8192) == 1
    assert table.splits(GRAM._replace(split=0), 1, 64, 8192) == 1
    assert table.splits(GRAM._replace(split=4096), 1, 64, 8192) == 2
    assert table.splits(GRAM._replace(target="gfx942", block=32), 1, 512, 8192) == 2
    for k in range(64, 20000, 64):
        splits = table.splits(GRAM, 1, 64, k)
        assert k % (64 * splits) == 0 or splits == 1


def test_only_gram_sums_are_split():
    assert {row.op for row in table.ROWS if row.split} == {"gram_ema_"}


def test_every_row_fits_into_shared_memory():
    for row in table.ROWS:
        for mode in row.modes:
            assert table.shared_bytes(row, mode) <= table.SHARED[row.target], row
