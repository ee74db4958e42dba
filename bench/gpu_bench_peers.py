"""Ten steps of other packages' optimizers on a GPU, with these kernels in them and without: rows of
gpu_bench.py, for the peers that are installed there."""

import contextlib
import functools
from collections.abc import Callable

import gpu_timing as timing
import torch
from gpu_timing import eager, milliseconds
from peer_runs import CYCLE, PEERS, package_of

from shampoo_kernels.integrations._patching import UnsupportedPeer


def bench_peer(name: str, rate: dict[str, float]) -> dict:
    """Errors as in bench_integrations: of the way that the parameters went, against float64."""
    peer = PEERS[name]
    integration, package = package_of(peer.module)
    start = functools.partial(peer.run, package, device=timing.DEVICE)
    exactly = integration.enable if peer.inexact else contextlib.nullcontext
    truth = start(exactly, dtype=torch.float64, **peer.exact).way()
    runs = {"ours": start(integration.enable), "the peer alone": start(contextlib.nullcontext)}
    errors = {
        which: ((run.way() - truth).norm() / truth.norm()).item() for which, run in runs.items()
    }
    found = milliseconds({which: [eager(run)] for which, run in runs.items()}, rounds=5)
    return {
        "case": f"{name}, {CYCLE} steps",
        "milliseconds": found,
        "floor": None,
        "error": errors.pop("ours"),
        "errors": errors,
    }


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    return [(bench_peer, (name,)) for name, peer in PEERS.items() if _is_here(peer.module)]


def _is_here(module: str) -> bool:
    try:
        package_of(module)
    except UnsupportedPeer:
        return False
    return True
