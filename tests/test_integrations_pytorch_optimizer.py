"""pytorch_optimizer with these kernels in it: the peer's own runs, states and formulas."""

import pytest
import torch
from peers import DTYPES, MODELS, check_agreement, check_state, need

from shampoo_kernels.integrations import pytorch_optimizer as integration

need(integration.INTEGRATION)
import pytorch_optimizer as peer  # noqa: E402

OPTIMIZERS = {
    "DASH, eigh": lambda p: peer.DASH(p, inverse_root_method="eigh", precondition_frequency=3),
    "ScalableShampoo, svd": lambda p: peer.ScalableShampoo(
        p, start_preconditioning_step=2, preconditioning_compute_steps=3, use_svd=True
    ),
    "Shampoo": lambda p: peer.Shampoo(p, preconditioning_compute_steps=3),
    "SOAP": lambda p: peer.SOAP(p, precondition_frequency=3),
}
# Iterations that stop early by default, here run to their limit.
CONVERGED = {
    "DASH, Newton": lambda p: peer.DASH(p, newton_steps=60, precondition_frequency=3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_agrees_with_the_peer(optimizer, name, dtype):
    check_agreement(integration.INTEGRATION, OPTIMIZERS[optimizer], name, dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", CONVERGED)
def test_agrees_with_the_limit_of_the_peers_iteration(optimizer, name):
    check_agreement(integration.INTEGRATION, CONVERGED[optimizer], name, torch.float64)


@pytest.mark.parametrize("optimizer", {**OPTIMIZERS, **CONVERGED})
def test_state(optimizer):
    check_state(integration.INTEGRATION, {**OPTIMIZERS, **CONVERGED}[optimizer], "mlp")
