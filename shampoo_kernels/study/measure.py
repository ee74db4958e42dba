"""One layer measured: every approximation against H, with norms, scales and the theory's bound."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from shampoo_kernels.study.approximations import ITERATED, approximations, tolerance
from shampoo_kernels.study.gradients import Gradients, as_gradients
from shampoo_kernels.study.kronecker import optimal_kronecker
from shampoo_kernels.study.spectrum import cosine_bound, singular_values


@dataclass(frozen=True)
class Measurement:
    """How close approximations P of one layer come to H = E[ggᵀ]; Frobenius norms.

    `scales`: c with c P nearest to H, in units of the c that gives c P the trace of H. The relative
    distance that remains is the sine to the cosine.
    """

    layer: str
    shape: tuple[int, int]
    gradients: int  # that H is made of
    cosines: dict[str, float]
    scales: dict[str, float]
    converged: dict[str, bool]  # of those that are iterated for; a False one is not settled yet
    norm: float  # ‖H‖
    trace: float  # tr H = E‖G‖²
    spectrum: "Spectrum | None"

    def row(self) -> dict[str, Any]:
        """Flat, for a table."""
        m, n = self.shape
        row: dict[str, Any] = {"layer": self.layer, "m": m, "n": n, "gradients": self.gradients}
        row |= {"norm": self.norm, "trace": self.trace}
        row |= {f"cosine_{name}": value for name, value in self.cosines.items()}
        row |= {f"scale_{name}": value for name, value in self.scales.items()}
        row |= {f"converged_{name}": value for name, value in self.converged.items()}
        return row | ({} if self.spectrum is None else asdict(self.spectrum))


@dataclass(frozen=True)
class Spectrum:
    """Of the rearranged H: what the theory makes its promise for Shampoo² of."""

    sigma1: float
    sigma2: float  # of all matrices
    sigma2_symmetric: float  # of symmetric ones: where the power steps from the identity live
    alpha: float  # trace of the leading left factor at unit norm, 1 to sqrt(m)
    beta: float  # the same on the right, 1 to sqrt(n)
    bound: float  # the cosine of Shampoo² is at least this
    bound_by_shape: float  # the same with alpha = beta = 1
    converged_spectrum: bool  # sigma1, sigma2 and the factors that alpha and beta are the traces of


def measure(
    truth: Tensor | Gradients,
    statistics: Tensor | Gradients | None = None,
    *,
    names: Sequence[str] | None = None,
    spectrum: bool = False,
) -> Measurement:
    """The cosine between H and each approximation, and what belongs to it.

    Args:
        truth: the gradients (N, m, n) that H = E[ggᵀ] is made of, or what `sample` returns.
        statistics: gradients of the same shape that the approximations are made of, where these are
            others (batch gradients, real labels, ...); "optimal" is always made of the truth.
        names: which approximations, keys of `NAMES`; default: all that the gradients allow.
        spectrum: also sigma_1, sigma_2 and the lower bound: as long as all the rest, or longer.

    Raises:
        TypeError, ValueError: as `cosine` and `approximations`; statistics of another shape.
    """
    truth = as_gradients("measure", truth)
    made_of = truth if statistics is None else as_gradients("measure", statistics)
    if made_of.shape != truth.shape:
        raise ValueError(
            f"measure: statistics must be of gradients {truth.shape} as the truth, "
            f"got {made_of.shape}"
        )
    found = approximations(made_of, names)
    if made_of is not truth and "optimal" in found:
        found |= approximations(truth, ["optimal"])
    inners = {name: P.inner(truth) for name, P in found.items()}
    return Measurement(
        layer=truth.layer,
        shape=truth.shape,
        gradients=truth.count,
        cosines={name: inners[name] / (P.norm * truth.norm) for name, P in found.items()},
        scales={
            name: inners[name] * P.trace / (P.norm**2 * truth.trace) for name, P in found.items()
        },
        converged={name: found[name].converged for name in ITERATED if name in found},
        norm=truth.norm * truth.scale**2,
        trace=truth.trace * truth.scale**2,
        spectrum=_spectrum(truth) if spectrum else None,
    )


def _spectrum(grads: Gradients) -> Spectrum:
    values = singular_values(grads, tol=tolerance(grads))
    best = optimal_kronecker(grads, tol=tolerance(grads))
    traces = float(best.left.trace()), float(best.right.trace())
    sigmas = values.first, values.symmetric[1]
    norm = grads.norm * grads.scale**2
    return Spectrum(
        sigma1=values.first,
        sigma2=values.second,
        sigma2_symmetric=values.symmetric[1],
        alpha=traces[0],
        beta=traces[1],
        bound=cosine_bound(*sigmas, norm, grads.shape, traces=traces),
        bound_by_shape=cosine_bound(*sigmas, norm, grads.shape),
        converged_spectrum=values.converged and best.converged,
    )
