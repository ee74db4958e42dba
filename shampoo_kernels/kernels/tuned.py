"""Measured rows of table.py, written by bench/tune.py; none have been measured yet."""

ROWS: tuple[tuple, ...] = ()
