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
    blocks_of,
    lists,
    maker,
    peer,
    switched,
    trained,
    types,
)

from shampoo_kernels.integrations import _distributed_shampoo_factors as stacks

KINDS = [PLAIN, KL, EIGENDECOMPOSED, EIGENDECOMPOSED_KL, CORRECTED]
# Every order, twice the same, a square, where sides are mixed up unseen, and a scalar.
SHAPES = [(7,), (5, 9), (9, 5), (5, 9), (6, 6), (4, 3, 6), (4, 3, 6), (2, 3, 4, 5), ()]
UNMERGED = peer.SingleDeviceDistributedConfig(target_parameter_dimensionality=math.inf)


def short(kind):
    return kind.__name__.removesuffix("PreconditionerConfig") if isinstance(kind, type) else None


def factors(enabled, make, shapes=SHAPES, steps=4, dtype=torch.float64):
    """After gradients for all but one."""
    blocks = blocks_of(*trained(make, enabled, shapes, steps, dtype, without=[1]))
    return [factor for block in blocks for factor in block.factor_matrices]


def of_kind(kind, dtype=torch.float64, **rest):
    """One dimension of the tensors of order 3 has no factor; factors have conditions below 1e6."""
    left_out = ("ignored_basis_change_dims", {3: [1]}) if kind is CORRECTED else (
        "inverse_exponent_override", {3: {1: 0.0}})  # fmt: skip
    often = {"precondition_frequency": 2, "start_preconditioning_step": 2, "epsilon": 1e-2}
    rest = dict([left_out]) | often | rest
    config = rest.pop("amortized_computation_config", EIGEN if issubclass(kind, PLAIN) else EIGH)
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
    found, expected = (factors(enabled, make) for enabled in (True, False))
    assert {f.ndim for f in found} == {1 if packed else 2}
    assert len(found) == 1 + 4 * 2 + 2 * 2 + 4  # of every order; a scalar has none
    if not packed:
        assert all(torch.equal(f, f.mT) for f in found)
    # KL: of roots, which differ by rounding in two ways of computing them.
    assert error(found, expected) <= (1e-9 if kind in (KL, EIGENDECOMPOSED_KL) else 1e-14 * 4 * 60)


def test_factors_agree_where_the_peer_damps_eigenvalues():
    """KL, damped after the decomposition; by default that is before it."""
    config = types.EighEigendecompositionConfig(
        rank_deficient_stability_config=types.PerturbationConfig(perturb_before_computation=False)
    )
    make = of_kind(EIGENDECOMPOSED_KL, amortized_computation_config=config)
    assert error(*(factors(enabled, make) for enabled in (True, False))) <= 1e-9


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

    half = factors(True, of_kind(PLAIN), steps=1)
    module = peer.distributed_shampoo
    monkeypatch.setattr(module, "RootInvShampooPreconditionerList", Doubled)
    found = factors(True, of_kind(PLAIN), steps=1)
    assert error(found, [2 * f for f in half]) <= 1e-14 * 60


@pytest.mark.parametrize("kind", [PLAIN, KL], ids=short)
def test_bfloat16_gradients_are_summed_in_float32(kind):
    def first(enabled):
        # A product of two bfloat16 numbers is exact in float32, and the peer rounds sums to 16 bits
        parameter = torch.zeros(8, 16, dtype=torch.bfloat16, requires_grad=True)
        with switched(enabled):  # the roots of a KL-Shampoo's first step are identities
            optimizer = maker(kind=kind, dtype=torch.float32, betas=(0.9, 1.0))([parameter])
            parameter.grad = gradient.clone()
            optimizer.step()
        return blocks_of([parameter], optimizer)[0].factor_matrices[0].double()

    gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = gradient.double() @ gradient.double().mT
    truth = full[*torch.triu_indices(8, 8)]
    assert (first(True) - truth).abs().max() <= 16 * 2.0**-24 * truth.abs().max()
    assert (first(False) - truth).abs().max() > 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roots_that_are_kept_in_16_bits(dtype):
    """KL in float32, where the peer multiplies in 16 bits: some roundings of each entry."""
    make = of_kind(KL, torch.float32, inv_factor_matrix_dtype=dtype)
    found, expected = (factors(enabled, make, dtype=torch.float32) for enabled in (True, False))
    assert {f.dtype for f in found} == {torch.float32}
    assert error(found, expected) <= 8 * torch.finfo(dtype).eps


def test_roots_in_float64_multiply_in_float64():
    """In float32 this one would be singular, and nothing would be left of the gradient."""
    G = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    make = of_kind(KL, torch.float32, inv_factor_matrix_dtype=torch.float64, betas=(0.9, 1.0))
    parameter = torch.zeros_like(G, requires_grad=True)
    with switched(True):
        optimizer = make([parameter])
        (block,) = blocks_of([parameter], optimizer)
        block.inv_factor_matrices[1].copy_(
            torch.tensor([1e9 + 1, -1e9, 1e9 + 1], dtype=torch.float64)
        )
        parameter.grad = G.clone()
        optimizer.step()
    assert torch.equal(block.factor_matrices[0], (G @ G.mT)[*torch.triu_indices(3, 3)])


def test_the_temporary_does_not_grow_with_the_number_of_blocks(monkeypatch):
    sizes = []
    real = stacks.gram_ema_

    def watched(stat, *args, **options):
        sizes.append(stat.numel())
        return real(stat, *args, **options)

    monkeypatch.setattr(stacks, "gram_ema_", watched)
    monkeypatch.setattr(stacks, "_STACK", 4 * 64**2)
    trained(of_kind(PLAIN), True, [(64, 64)] * 12, steps=1)
    assert len(sizes) == 2 * 3
    assert max(sizes) == 4 * 64**2
