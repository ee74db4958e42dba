"""bench/gpu_both_sides.py in the interpreter: the bits of one call of gram_ema_ a side."""

import sys
from pathlib import Path

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import torch
from interpreted import form  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import gpu_both_sides

from shampoo_kernels.kernels import gram_ema


@pytest.mark.parametrize("form", ["descriptor"], indirect=True)
@pytest.mark.parametrize(("m", "n"), [(32, 40), (72, 8), (104, 48)])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_bits_of_one_launch_a_side(form, m, n, beta):  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(2, m, n, generator=generator).to(torch.bfloat16)
    stats = [torch.randn(2, k, k, generator=generator) for k in (m, n)]
    stats = [(stat + stat.mT) if beta else torch.full_like(stat, torch.nan) for stat in stats]
    expected = [stat.clone() for stat in stats]
    gpu_both_sides.both_sides_(*stats, G, beta, 0.3)
    for stat, side in zip(expected, (G, G.mT), strict=True):
        gram_ema.accumulate_(stat, side[:, None], None, beta, 0.3, "highest")
    assert all(torch.equal(x, y) for x, y in zip(stats, expected, strict=True))
