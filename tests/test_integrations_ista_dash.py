"""DASH of IST-DASLab: on these kernels it does what it does alone."""

import importlib.metadata
import sys
import types

import pytest
import torch
from checkouts import checkout
from peers import check_agreement

PACKAGE = "ista_daslab_optimizers"
PATH = checkout("ista_dash")
# The package imports CUDA extensions of its other optimizers, and a logger; DASH needs neither.
parent = types.ModuleType(PACKAGE)
parent.__path__ = [str(PATH / PACKAGE)]
sys.modules[PACKAGE] = parent
sys.modules.setdefault("wandb", types.ModuleType("wandb"))

from ista_daslab_optimizers import dash as peer  # noqa: E402
from ista_daslab_optimizers.dash import invertors  # noqa: E402

from shampoo_kernels.integrations import ista_dash as ours  # noqa: E402
from shampoo_kernels.integrations._patching import UnsupportedPeer  # noqa: E402

METHODS = {method.name: method for method in peer.DashInverseRootMethodType}
HEURISTICS = {heuristic.name: heuristic for heuristic in peer.DashEvdHeuristic}
OWNERS = (invertors.DashRootInvEVD, invertors.DashRootInvCoupledNewton,
          invertors.DashRootInvNewtonDB, invertors.DashRootInvChebyshev)  # fmt: skip
UNIT = 2.0**-24


def config(method="EVD", heuristic="SHAMPOO", **options):
    options = {"eps_inv_root": 1e-6, "inv_root_freq": 3, "block_size": 8} | options
    return peer.DashConfig(
        inv_root_method=METHODS[method], evd_heuristic=HEURISTICS[heuristic], **options
    )


class Layerwise(peer.DashLayerwise):
    """DashLayerwise, as vectors of several lengths want it."""

    def sync_params(self):
        """Called at this commit, but DashGpu alone has it."""


def maker(cfg):
    """On the vectors and matrices of a model; the rest, which the peer refuses, stands still."""
    return lambda parameters: Layerwise(
        [p for p in parameters if p.ndim <= 2], lr=3e-3, weight_decay=0.0, config=cfg
    )


# Enough steps, from a scale that is not random, that the peer's iteration arrives.
ARRIVES = {
    "matrix_scaling_type": peer.DashMatrixScalingType.FRO, "newton_steps": 60,
    "eps_inv_root": 1e-3, "cn_tolerance": 1e-6,
}  # fmt: skip
CONFIGS = {
    "evd": config(),
    "evd-abs-add": config(heuristic="ABS_ADD"),
    "cn": config("CN", **ARRIVES),
    "ndb": config("NDB", **ARRIVES),
    "chebyshev": config("CBSHV"),
}


@pytest.mark.parametrize("model", ["mlp", "conv", "gpt"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_agree(model, name, capsys):
    check_agreement(ours.INTEGRATION, maker(CONFIGS[name]), model, torch.float32)


@pytest.mark.parametrize("model", ["mlp", "gpt"])
@pytest.mark.parametrize("name", ["evd", "evd-abs-add"])
def test_parameters_agree_in_float64(model, name, capsys):
    check_agreement(ours.INTEGRATION, maker(CONFIGS[name]), model, torch.float64)


def blocks(condition, n=32, count=4):
    stack = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        stack.append(Q * torch.logspace(0, -condition, n, dtype=torch.float64) @ Q.mT)
    return torch.stack(stack).float()


def invert(A, cfg, root, enabled):
    out = torch.empty_like(A)
    torch.manual_seed(0)
    if not enabled:
        return out, invertors.DashRootInvertor.invert(A, out, cfg, root)
    with ours.enable():
        return out, invertors.DashRootInvertor.invert(A, out, cfg, root)


@pytest.mark.parametrize("method", ["EVD", "CN", "NDB"])
@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("condition", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("steps", [10, 30])
def test_roots_are_as_close_to_the_truth_as_the_peers(method, root, condition, steps):
    """Of the peer's own formula, (A + eps I)^(-1/root), 2 eps for EVD, in float64."""
    cfg = config(method, eps_inv_root=1e-8, newton_steps=steps)
    A = blocks(condition)
    eye = torch.eye(A.shape[1])
    values, vectors = torch.linalg.eigh((A + (2e-8 if method == "EVD" else 1e-8) * eye).double())
    truth = vectors * values[:, None] ** (-1 / root) @ vectors.mT
    errors = [float((invert(A, cfg, root, enabled)[0].double() - truth).norm() / truth.norm())
              for enabled in (True, False)]  # fmt: skip
    model = 4 * UNIT * 10 ** (condition / 2) * 32**0.5
    # EVD is LAPACK on both sides, and a LAPACK of the same name differs a bit.
    assert errors[0] <= max(1.5 * errors[1] if method == "EVD" else errors[1], model)


@pytest.mark.parametrize("method", ["EVD", "CN", "NDB"])
def test_a_block_is_by_itself(method):
    """The peer's iteration stops for all blocks at once, and starts from random numbers."""
    cfg = config(method)
    A = torch.cat([blocks(1, count=1), blocks(5, count=1)])
    both, _ = invert(A, cfg, 4, True)
    again, _ = invert(A[:1], cfg, 4, True)
    assert torch.equal(both[0], again[0])


@pytest.mark.parametrize("method", ["CN", "NDB"])
def test_zero_and_rank_deficient_blocks(method):
    G = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    A = torch.stack([torch.zeros(32, 32), G @ G.mT])
    roots, _ = invert(A, config(method, eps_inv_root=1e-6), 4, True)
    assert roots.isfinite().all()
    torch.testing.assert_close(roots[0], torch.eye(32) * 1e-6**-0.25, rtol=1e-5, atol=1e-5)


def test_one_large_block_is_decomposed_by_all_cores():
    """By the peer's own call: a core per block leaves the others idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        A = blocks(4, n=129, count=2)
        pair, one = (invert(x, config(), 4, True)[0] for x in (A, A[:1]))
        assert torch.equal(one, invert(A[:1], config(), 4, False)[0])
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(one[0], pair[0])
    assert (one[0] - pair[0]).norm() <= 4 * UNIT * 1e2 * 129**0.5 * pair[0].norm()


def outcome(A, cfg, enabled):
    try:
        return invert(A, cfg, 4, enabled)[0]
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("method", ["EVD", "CN", "NDB"])
def test_failures_are_the_peers(method):
    """NaN is an exception of EVD and NaN by iteration, in that block alone."""
    sick = blocks(1, count=2)
    sick[1, 0, 0] = torch.nan
    found, alone = (outcome(sick, config(method), enabled) for enabled in (True, False))
    if isinstance(alone, str):
        assert found == alone
    else:
        assert found[1].isnan().any()
        assert alone[1].isnan().any()
        assert found[0].isfinite().all()
    for root in (3, 8):
        if method != "EVD":
            with pytest.raises(RuntimeError), ours.enable():
                invertors.DashRootInvertor.invert(sick, sick.clone(), config(method), root)


@pytest.mark.parametrize(
    ("method", "heuristic"), [("EVD", "ABS"), ("EVD", "RELU"), ("CBSHV", "SHAMPOO")]
)
def test_what_stays_the_peers(method, heuristic):
    A = blocks(4)
    cfg = config(method, heuristic, eps_inv_root=1e-3)
    (found, ranks), (alone, peers_ranks) = (invert(A, cfg, 4, enabled) for enabled in (True, False))
    assert torch.equal(found, alone)
    if heuristic == "RELU":
        assert torch.equal(ranks, peers_ranks)
        assert (ranks < 32).all()


def test_switched_off_nothing_is_left():
    before = [dict(vars(owner)) for owner in OWNERS]
    with ours.enable(), ours.enable():
        assert [dict(vars(owner)) for owner in OWNERS] != before
    assert [dict(vars(owner)) for owner in OWNERS] == before


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0")
    with pytest.raises(UnsupportedPeer, match=r"ista-daslab-optimizers 1\.1\.15, got 1\.2\.0"):
        ours.enable()
    ours.enable(any_version=True).disable()
    monkeypatch.setattr(
        invertors.DashRootInvEVD, "_matrix_root_inv_evd", staticmethod(lambda inp, out: None)
    )
    with pytest.raises(UnsupportedPeer, match="must take"):
        ours.enable(any_version=True)
