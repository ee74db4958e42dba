"""How good the Kronecker approximation of a layer is: measurements, not part of any optimizer.

`sample` makes gradients of the layers of a model, `GradientHistory` keeps those of a training run;
`measure` compares every approximation of H = E[ggᵀ] with it; `KroneckerProbe` does all that along
the training of your own model.
"""

from shampoo_kernels.study.approximations import NAMES, approximations, fixed_point
from shampoo_kernels.study.factored import FactoredGradients
from shampoo_kernels.study.gradients import DenseGradients, Gradients, Unmeasurable
from shampoo_kernels.study.history import GradientHistory
from shampoo_kernels.study.kronecker import (
    Cosines,
    OptimalKronecker,
    cosine,
    cosines,
    optimal_kronecker,
    power_steps,
)
from shampoo_kernels.study.layers import layer_names
from shampoo_kernels.study.measure import Measurement, Spectrum, measure
from shampoo_kernels.study.probe import KroneckerProbe
from shampoo_kernels.study.sampling import sample
from shampoo_kernels.study.spectrum import SingularValues, cosine_bound, singular_values

__all__ = [
    "NAMES",
    "Cosines",
    "DenseGradients",
    "FactoredGradients",
    "GradientHistory",
    "Gradients",
    "KroneckerProbe",
    "Measurement",
    "OptimalKronecker",
    "SingularValues",
    "Spectrum",
    "Unmeasurable",
    "approximations",
    "cosine",
    "cosine_bound",
    "cosines",
    "fixed_point",
    "layer_names",
    "measure",
    "optimal_kronecker",
    "power_steps",
    "sample",
    "singular_values",
]
