"""As bench_integrations, for peers that come from a checkout of their repository.

Each is found by its variable, SHAMPOO_KERNELS_PEER_DISTRIBUTED_SHAMPOO and so on, and skipped
without. Errors are against the peer's own float64 run; SOAPs have none of their own, and their
errors would be those of a null space.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import types
import typing
import warnings
from pathlib import Path

import pytest
import torch
from peer_runs import CYCLE, MATRICES, VECTORS, Run

from shampoo_kernels import inverse_root


def checkout(peer: str) -> None:
    """Make the peer importable, or skip."""
    variable = f"SHAMPOO_KERNELS_PEER_{peer.upper()}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no checkout of {peer}")
    if os.environ[variable] not in sys.path:
        sys.path.append(os.environ[variable])


def distributed_shampoo(package, parameters, config, block):
    return package.DistributedShampoo(
        parameters,
        betas=(0.9, 0.95),
        epsilon=1e-6,
        max_preconditioner_dim=block,
        precondition_frequency=CYCLE,
        start_preconditioning_step=CYCLE,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
        preconditioner_config=config(parameters[0].dtype),
    )


def by_roots(package, solver):
    """A config for the dtype of the parameters; factors of rank one fail in Newton."""

    def config(dtype):
        return package.RootInvShampooPreconditionerConfig(
            amortized_computation_config=solver,
            factor_matrix_dtype=dtype,
            inv_factor_matrix_dtype=dtype,
        )

    return config


def compare(versus, make, integration, case, own=None):
    """own: how the optimizer with ours in it is made, where otherwise than the peer's; errors are
    then each against its own formula."""
    starts = {
        "the peer alone": functools.partial(Run, make, MATRICES, contextlib.nullcontext),
        "ours": functools.partial(Run, own or make, MATRICES, integration.enable),
    }
    truths = {name: start(dtype=torch.float64).way() for name, start in starts.items()}
    runs, errors = {}, {}
    for name, start in starts.items():
        exact = truths[name if own else "the peer alone"]
        runs[name] = start()
        errors[name] = (runs[name].way() - exact).norm() / exact.norm()
    versus(runs.pop("ours"), runs, case=f"{case}, {CYCLE} steps", errors=errors)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("solver", ["EigenConfig", "CoupledNewtonConfig", "KernelRootInvConfig"])
def bench_distributed_shampoo(versus, solver, block):
    """The last is a config of ours, which damps otherwise, against the peer with its default."""
    checkout("distributed_shampoo")
    package = pytest.importorskip("distributed_shampoo")
    from distributed_shampoo.preconditioner import matrix_functions_types

    from shampoo_kernels.integrations import distributed_shampoo as integration

    def maker(config):
        config = by_roots(package, config)
        return functools.partial(distributed_shampoo, package, config=config, block=block)

    case, own = f"Distributed Shampoo, {solver}, blocks of {block}", None
    if solver == "KernelRootInvConfig":
        own = maker(integration.KernelRootInvConfig())
        solver, case = "EigenConfig", f"{case} against EigenConfig"
    make = maker(getattr(matrix_functions_types, solver)())
    compare(versus, make, integration, case, own)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["Eigendecomposed", "EigenvalueCorrected"])
def bench_distributed_shampoo_in_a_basis(versus, kind, block):
    checkout("distributed_shampoo")
    package = pytest.importorskip("distributed_shampoo")
    from shampoo_kernels.integrations import distributed_shampoo as integration

    def config(dtype):
        name = f"{kind}ShampooPreconditionerConfig"
        return getattr(package, name)(factor_matrix_dtype=dtype)

    make = functools.partial(distributed_shampoo, package, config=config, block=block)
    compare(versus, make, integration, f"Distributed Shampoo, {kind}, blocks of {block}")


def bench_soap(versus):
    checkout("soap")
    package = pytest.importorskip("soap")
    from shampoo_kernels.integrations import soap as integration

    def make(parameters):
        return package.SOAP(parameters, precondition_frequency=CYCLE)

    start = functools.partial(Run, make, MATRICES + VECTORS)
    alone, ours = start(contextlib.nullcontext), start(integration.enable)
    versus(ours, {"the peer alone": alone}, case=f"SOAP, {CYCLE} steps")


@pytest.mark.parametrize("name", ["SOAP", "SOAP, KL", "KlSoapV3", "REKLS"])
def bench_emerging_soap(versus, name):
    """Bases anew in every step, as that package has it; no errors, as of SOAP."""
    checkout("emerging_optimizers")
    pytest.importorskip("absl", reason="Emerging-Optimizers needs absl-py")
    if sys.version_info < (3, 12):  # of the peer's 3.12 syntax only the registry cannot be read
        registry = types.ModuleType("emerging_optimizers.registry")
        registry.register_optimizer = lambda name: lambda cls: cls
        sys.modules.setdefault("emerging_optimizers.registry", registry)
        typing.override = lambda function: function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what the peer imports of it
        from emerging_optimizers.legacy_soap import rekls, soap
        from emerging_optimizers.shampoo import soap_v3

    from shampoo_kernels.integrations import emerging_optimizers as integration

    # Three compiled lines of clipping, which is off: they would cost the warm-up a minute.
    clip = soap._clip_update_rms_in_place
    soap._clip_update_rms_in_place = getattr(clip, "__wrapped__", clip)
    make = {
        "SOAP": functools.partial(soap.SOAP, lr=3e-3),
        "SOAP, KL": functools.partial(soap.SOAP, lr=3e-3, use_kl_shampoo=True),
        "KlSoapV3": functools.partial(soap_v3.KlSoapV3, lr=3e-3),
        "REKLS": functools.partial(rekls.REKLS, lr=3e-3),
    }[name]
    start = functools.partial(Run, make, MATRICES)
    alone, ours = start(contextlib.nullcontext), start(integration.enable)
    case = f"Emerging-Optimizers' {name}, {CYCLE} steps"
    versus(ours, {"the peer alone": alone}, case=case)


def spectrum(n, p):
    """Eight matrices of condition 1e4 in float32, and their inverse p-th roots in float64."""
    Q = torch.linalg.qr(torch.randn(8, n, n, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, -4, n, dtype=torch.float64) @ Q.mT).float()
    values, vectors = torch.linalg.eigh(A.double())
    return A, vectors * values[:, None] ** (-1 / p) @ vectors.mT


@pytest.mark.parametrize("n", [64, 256])
def bench_scaled_cans(versus, n):
    """The function that NVIDIA's package gives its users, loaded from its one file."""
    checkout("emerging_optimizers")
    folder = Path(os.environ["SHAMPOO_KERNELS_PEER_EMERGING_OPTIMIZERS"])
    file = folder / "emerging_optimizers/legacy_soap/matrix_root_inverse_utils.py"
    spec = importlib.util.spec_from_file_location("scaled_cans", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    A, truth = spectrum(n, 2)

    def ours():
        return inverse_root(A, 2, ridge=0, design_floor=1e-7, method="newton").root

    def alone():
        return module.mat_root_inv_via_scaled_cans(A)

    errors = {name: (f().double() - truth).norm() / truth.norm()
              for name, f in (("ours", ours), ("the peer alone", alone))}  # fmt: skip
    versus(ours, {"the peer alone": alone}, case=f"scaled CANS, p = 2, 8 of {n}", errors=errors)


@pytest.mark.parametrize("method", ["EVD", "CN", "NDB"])
def bench_dash_invertor(versus, method):
    """The invertor alone: the package around it wants CUDA extensions of other optimizers."""
    checkout("ista_dash")
    if "ista_daslab_optimizers" not in sys.modules:
        parent = types.ModuleType("ista_daslab_optimizers")
        folder = Path(os.environ["SHAMPOO_KERNELS_PEER_ISTA_DASH"])
        parent.__path__ = [str(folder / "ista_daslab_optimizers")]
        sys.modules["ista_daslab_optimizers"] = parent
        sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    from ista_daslab_optimizers import dash
    from ista_daslab_optimizers.dash.invertors import DashRootInvertor

    from shampoo_kernels.integrations import ista_dash as integration

    config = dash.DashConfig(inv_root_method=dash.DashInverseRootMethodType[method])
    A, truth = spectrum(128, 4)
    out = torch.empty_like(A)

    def alone():
        DashRootInvertor.invert(A, out, config, 4)
        return out

    def ours():
        with integration.enable():
            return alone()

    errors = {name: (f().double() - truth).norm() / truth.norm()
              for name, f in (("ours", ours), ("the peer alone", alone))}  # fmt: skip
    case = f"DASH's {method} as it comes, p = 4, 8 of 128"
    versus(ours, {"the peer alone": alone}, case=case, errors=errors)
