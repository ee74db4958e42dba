"""torch.optim.Muon: its Newton-Schulz steps by `orthogonalize`, with its own coefficients.

    from shampoo_kernels.integrations import muon

    muon.enable()  # or for a while: with muon.enable(): ...

The steps are the same polynomial, which is deliberately not the polar factor, in float32 (float64
for float64) in place of bfloat16: thousands of times closer to what the formula says, and slower on
CPUs that multiply bfloat16 themselves. The update comes in the gradient's dtype, not in bfloat16.
With bfloat16 gradients and nesterov=False torch's normalises the momentum buffer itself; this does
not. An `eps` other than Muon's 1e-7 takes torch's own way.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.ops.orthogonalize import orthogonalize

VERSIONS = ("2.13",)
_EPS = 1e-7  # of `orthogonalize` too


def _newton_schulz(original: Callable[..., Any]) -> Callable[..., Any]:
    def _zeropower_via_newtonschulz(
        grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
    ) -> Tensor:
        if eps != _EPS or not 0 < ns_steps < 100 or grad.ndim != 2:
            return original(grad, ns_coefficients, ns_steps, eps)
        return orthogonalize(grad, coefficients=ns_coefficients, steps=ns_steps)

    return _zeropower_via_newtonschulz


INTEGRATION = Integration(
    "torch.optim.Muon",
    [
        Replacement(
            "torch.optim._muon",
            "_zeropower_via_newtonschulz",
            _newton_schulz,
            "(grad, ns_coefficients, ns_steps, eps)",
        )
    ],
    distribution="torch",
    versions=VERSIONS,
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into torch.optim.Muon, in this process: see `Integration.enable`."""
    return INTEGRATION.enable(any_version=any_version)
