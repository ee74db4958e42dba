"""Ten steps of other packages' optimizers, with these kernels in them and without.

Random gradients, another one in every step, on the matrices and vectors of a small GPT; roots and
bases are computed anew once in the ten. The errors are of the way that the parameters went in the
first ten steps, against the peer's own formula in float64: for DASH, ScalableShampoo and Muon,
which stop short of theirs, with ours in them, which the tests hold to it. SOAP's begin with
eigenvectors that rounding decides, with ours or without. HeavyBall runs without torch.compile. Muon
multiplies in bfloat16: where the CPU does that itself, ours in float32 is slower.
"""

import contextlib
import functools

import pytest
import torch
from conftest import QUICK
from peer_runs import CYCLE, PEERS, package_of

from shampoo_kernels import orthogonal_iteration
from shampoo_kernels.integrations._patching import UnsupportedPeer


def or_skip(module: str):
    try:
        return package_of(module)
    except UnsupportedPeer as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(PEERS)[::3] if QUICK else PEERS)
def bench_integrations(versus, name):
    peer = PEERS[name]
    integration, package = or_skip(peer.module)
    start = functools.partial(peer.run, package)
    alone, ours = start(contextlib.nullcontext), start(integration.enable)
    exactly = integration.enable if peer.inexact else contextlib.nullcontext
    truth = start(exactly, dtype=torch.float64, **peer.exact).way()
    errors = {
        which: (run.way() - truth).norm() / truth.norm()
        for which, run in (("ours", ours), ("the peer alone", alone))
    }
    case = f"{name}, {CYCLE} steps"
    # Runs in float32 part from their float64 with ours or without: rounding decides SOAP's bases.
    versus(ours, {"the peer alone": alone}, case=case, errors=errors, accepted=1.0)


@pytest.mark.parametrize("n", [96] if QUICK else [128, 512])
def bench_qr_step(versus, n):
    """HeavyBall's QR step, which the integration leaves as it is, by `orthogonal_iteration`."""
    _, package = or_skip("heavyball")
    grads = torch.randn(4, n, 2 * n)
    A = grads @ grads.mT / n
    Q = torch.linalg.qr(torch.randn(4, n, n)).Q
    bases = [Q.clone()]
    versus(
        lambda: orthogonal_iteration(A, Q),
        {"the peer alone": lambda: package.utils.get_orthogonal_matrix_QR([A], bases)},
        case=f"HeavyBall's QR step, 4 of {n}: not switched on",
    )
