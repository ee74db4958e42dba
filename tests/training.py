"""Parameters, gradients and steps for the tests of optimizers."""

import torch
from torch import nn

SOAP = {"application": "soap", "graft": None}

# One of every kind of option that changes what a step does or what the state holds.
VARIANTS = {
    "default": {},
    "sum": {"shampoo_beta": 1.0},
    "frobenius": {"statistic": "frobenius"},
    "kl": {"statistic": "kl", "scale": None},
    "kl, trace": {"statistic": "kl", "graft": None},
    "one-sided kl": {"statistic": "kl", "p": (2, None)},
    "p=3": {"p": 3, "root_method": "newton"},
    "pseudo-inverse": {"p": 3, "rank_rtol": 1e-6},
    "one-sided": {"p": (2, None)},
    "least squares": {"scale": "least_squares", "graft": None},
    "original": {"p": 4, "scale": None, "shampoo_beta": 1.0, "graft": "adagrad"},
    "soap": SOAP,
    "soap by eigh": {**SOAP, "basis_method": "eigh"},
    "one-sided soap": {**SOAP, "p": (None, 2)},
    "kl soap": {**SOAP, "statistic": "kl"},
    "frobenius soap": {**SOAP, "statistic": "frobenius"},
    "rmsprop": {"graft": "rmsprop"},
    "sgd": {"graft": "sgd"},
    "no graft": {"graft": None},
    "together": {"refresh": "together"},
    "level": {"refresh": "level"},
    "adaptive": {"refresh_tolerance": 0.3},
    "adaptive soap": {**SOAP, "refresh_tolerance": 0.3},
    "coupled": {"decoupled_weight_decay": False, "maximize": True},
    "clipped": {"max_update_rms": 0.5, "nesterov": True},
    "bfloat16 roots": {"root_dtype": torch.bfloat16},
    "bfloat16 bases": {**SOAP, "root_dtype": torch.bfloat16},
}


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(shape, steps, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, *shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def train(optimizer, pairs):
    """pairs: (parameter, its gradient in each step, None for a missing one)."""
    for step in range(len(pairs[0][1])):
        for parameter, grads in pairs:
            parameter.grad = None if grads[step] is None else grads[step].clone()
        optimizer.step()
