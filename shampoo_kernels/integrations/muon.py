"""torch.optim.Muon: its Newton-Schulz steps by `orthogonalize`, with its own coefficients.

    from shampoo_kernels.integrations import muon

    muon.enable()  # or for a while: with muon.enable(): ...

The steps are the same polynomial, which is deliberately not the polar factor. On a CPU that
multiplies bfloat16 itself they run in bfloat16 as torch's do, in about two thirds of the
multiplications, and a little closer to what the formula says. `enable(precision="highest")`, and
other CPUs, run them in float32: thousands of times closer, and on a CPU of the first kind slower
than torch's. Gradients in float64 are computed in float64.

The update comes in the gradient's dtype, not in bfloat16. With bfloat16 gradients and
nesterov=False torch's normalises the momentum buffer itself; this does not. What stays torch's own:
devices other than a CPU, where the two have not been compared, an `eps` other than Muon's 1e-7, and
in bfloat16 matrices of at most 256 entries, which cost more to call than to compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.ops.orthogonalize import orthogonalize

VERSIONS = ("2.11", "2.12", "2.13")
PRECISIONS = ("medium", "highest")
_EPS = 1e-7  # of `orthogonalize` too
_TINY = 256


def _newton_schulz(original: Callable[..., Any], precision: str) -> Callable[..., Any]:
    def _zeropower_via_newtonschulz(
        grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
    ) -> Tensor:
        ours = grad.device.type == "cpu" and grad.ndim == 2 and eps == _EPS and 0 < ns_steps < 100
        narrow = precision == "medium" and grad.dtype != torch.float64
        if not ours or (narrow and grad.numel() <= _TINY):
            return original(grad, ns_coefficients, ns_steps, eps)
        return orthogonalize(
            grad, coefficients=ns_coefficients, steps=ns_steps, precision=precision
        )

    return _zeropower_via_newtonschulz


def _integration(precision: str) -> Integration:
    replacement = Replacement(
        "torch.optim._muon",
        "_zeropower_via_newtonschulz",
        functools.partial(_newton_schulz, precision=precision),
        "(grad, ns_coefficients, ns_steps, eps)",
    )
    return Integration("torch.optim.Muon", [replacement], distribution="torch", versions=VERSIONS)


INTEGRATIONS = {precision: _integration(precision) for precision in PRECISIONS}
INTEGRATION = INTEGRATIONS["medium"]


def enable(*, precision: str = "medium", any_version: bool = False) -> Enabled:
    """Put these kernels into torch.optim.Muon, in this process: see `Integration.enable`.

    Args:
        precision: "medium", bfloat16 where that is fast, or "highest", float32 everywhere. Where
            both are enabled the later one serves, and has to end first.

    Raises ValueError: another precision.
    """
    if precision not in PRECISIONS:
        expected = " or ".join(map(repr, PRECISIONS))
        raise ValueError(f"muon.enable: precision must be {expected}, got {precision!r}")
    return INTEGRATIONS[precision].enable(any_version=any_version)
