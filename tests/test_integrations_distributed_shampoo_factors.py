"""Distributed Shampoo's factors: accumulated in stacks they are what the peer accumulates."""

import math

import pytest
import torch
from meta_shampoo import (
    CORRECTED,
    EIGEN,
    EIGENDECOMPOSED,
    EIGENDECOMPOSED_KL,
    EIGH,
    KL,
    PLAIN,
    factors,
    lists,
    maker,
    peer,
    switched,
)

from shampoo_kernels.integrations import _distributed_shampoo_factors as stacks

KINDS = [PLAIN, KL, EIGENDECOMPOSED, EIGENDECOMPOSED_KL, CORRECTED]
# Every order, twice the same, a square, where sides are mixed up unseen, and a scalar.
SHAPES = [(7,), (5, 9), (9, 5), (5, 9), (6, 6), (4, 3, 6), (4, 3, 6), (2, 3, 4, 5), ()]
UNMERGED = peer.SingleDeviceDistributedConfig(target_parameter_dimensionality=math.inf)


def short(kind):
    return kind.__name__.removesuffix("PreconditionerConfig") if isinstance(kind, type) else None


def trained(enabled, make, steps=4, dtype=torch.float64, shapes=SHAPES):
    """The peer's blocks after gradients of their own scales."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    with switched(enabled):
        optimizer = make(parameters)
        for _ in range(steps):
            for i, p in enumerate(parameters):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad = (noise * (i + 1)).to(dtype)
            parameters[1].grad = None  # a block without a gradient is left out
            optimizer.step()
    return factors(optimizer, parameters)


def of_kind(kind, dtype=torch.float64, **rest):
    """One dimension of the tensors of order 3 has no factor; factors have conditions below 1e6."""
    left_out = ("ignored_basis_change_dims", {3: [1]}) if kind is CORRECTED else (
        "inverse_exponent_override", {3: {1: 0.0}})  # fmt: skip
    often = {"precondition_frequency": 2, "start_preconditioning_step": 2, "epsilon": 1e-2}
    rest = dict([left_out]) | often | rest
    config = EIGEN if issubclass(kind, PLAIN) else EIGH
    return maker(
        config, kind, dtype, distributed_config=UNMERGED, max_preconditioner_dim=64, **rest
    )


def error(found, expected):
    """Relative to the largest entry of each factor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS, ids=short)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "square"])
@pytest.mark.parametrize("most", [1 << 22, 100], ids=["whole", "in parts"])
def test_factors_agree(kind, packed, most, monkeypatch):
    """After the same gradients, of which the later ones meet roots."""
    monkeypatch.setattr(stacks, "_STACK", most)
    make = of_kind(kind, use_symmetric_packing=packed)
    found, expected = ([f for block in trained(enabled, make) for f in block.factor_matrices]
                       for enabled in (True, False))  # fmt: skip
    assert {f.ndim for f in found} == {1 if packed else 2}
    assert len(found) == 1 + 4 * 2 + 2 * 2 + 4  # of every order; a scalar has none
    if not packed:
        assert all(torch.equal(f, f.mT) for f in found)
    # KL: of roots, which differ by rounding in two ways of computing them.
    assert error(found, expected) <= (1e-9 if kind in (KL, EIGENDECOMPOSED_KL) else 1e-14 * 4 * 60)


@pytest.mark.parametrize("kind", KINDS, ids=short)
def test_no_product_is_left_to_the_peer(kind, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the peer accumulates by itself")

    with switched(True):
        monkeypatch.setattr(torch, "tensordot", refuse)
        parameters = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
        preconditioner = of_kind(kind)(parameters)._per_group_state_lists[0][
            "shampoo_preconditioner_list"
        ]
        preconditioner._update_factor_matrices(
            masked_grad_list=[torch.ones_like(p) for p in parameters]
        )


def test_an_accumulation_of_the_users_is_left_alone(monkeypatch):
    """A subclass that says what its factors are made of."""

    class Doubled(lists.RootInvShampooPreconditionerList):
        def _compute_outer_product_list(self, *args, **options):
            return tuple(2 * x for x in super()._compute_outer_product_list(*args, **options))

    plain = trained(True, of_kind(PLAIN), steps=1)
    module = peer.distributed_shampoo
    monkeypatch.setattr(module, "RootInvShampooPreconditionerList", Doubled)
    for mine, once in zip(trained(True, of_kind(PLAIN), steps=1), plain, strict=True):
        for found, half in zip(mine.factor_matrices, once.factor_matrices, strict=True):
            torch.testing.assert_close(found, 2 * half, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", [PLAIN, KL], ids=short)
def test_bfloat16_gradients_are_summed_in_float32(kind):
    def first(enabled):
        # A product of two bfloat16 numbers is exact in float32, and the peer rounds sums to 16 bits
        parameter = torch.zeros(8, 16, dtype=torch.bfloat16, requires_grad=True)
        with switched(enabled):
            optimizer = maker(kind=kind, dtype=torch.float32, betas=(0.9, 1.0))([parameter])
            if kind is KL:  # the roots of a KL-Shampoo's first step are identities
                assert torch.equal(root(optimizer, parameter), torch.eye(16))
            parameter.grad = gradient.clone()
            optimizer.step()
        return factors(optimizer, [parameter])[0].factor_matrices[0].double()

    def root(optimizer, parameter):
        return stacks.unpack(factors(optimizer, [parameter])[0].inv_factor_matrices[1][None])[0]

    gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = gradient.double() @ gradient.double().mT
    truth = full[*torch.triu_indices(8, 8)]
    assert (first(True) - truth).abs().max() <= 16 * 2.0**-24 * truth.abs().max()
    assert (first(False) - truth).abs().max() > 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_roots_of_another_dtype_than_the_gradients(dtype):
    """KL in float32 with roots that are kept wider or narrower."""
    make = of_kind(KL, torch.float32, inv_factor_matrix_dtype=dtype)
    found, expected = ([f for block in trained(enabled, make, dtype=torch.float32)
                        for f in block.factor_matrices] for enabled in (True, False))  # fmt: skip
    unit = 2.0**-24 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert {f.dtype for f in found} == {torch.float32}
    assert error(found, expected) <= 1e3 * unit


def test_the_temporary_does_not_grow_with_the_number_of_blocks(monkeypatch):
    sizes = []
    real = stacks.gram_ema_

    def watched(stat, *args, **options):
        sizes.append(stat.numel())
        return real(stat, *args, **options)

    monkeypatch.setattr(stacks, "gram_ema_", watched)
    monkeypatch.setattr(stacks, "_STACK", 4 * 64**2)
    trained(True, of_kind(PLAIN), steps=1, shapes=[(64, 64)] * 12)
    assert len(sizes) == 2 * 3
    assert max(sizes) == 4 * 64**2
