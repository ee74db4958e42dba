"""The optimizers that are compared: one entry each.

Every method gets the same split. Hidden matrices run the method at the learning rate that is
searched; embeddings, first and last layers, norms and biases run AdamW at OTHERS_LR. The entry
"AdamW" is the exception: the whole model at the searched rate, as most users run it.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shampoo_kernels import Shampoo

BASELINES = ("AdamW", "AdamW, split")  # the better of these is what the others are measured against
OTHERS_LR = 3e-3
BETAS = (0.9, 0.95)
REFRESH = 10

Parameters = list[nn.Parameter]
Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """`make(hidden, lr=..., weight_decay=..., **options)` is the optimizer of the hidden matrices.

    `make` is a function that a worker process can import; with split=False it gets all parameters.
    `rates` is where the search for the learning rate starts.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    split: bool = True

    def optimizers(
        self, hidden: Parameters, others: Parameters, lr: float, weight_decay: float
    ) -> Optimizers:
        if not self.split:
            return [self.make([*hidden, *others], lr=lr, weight_decay=weight_decay, **self.options)]
        return [
            self.make(hidden, lr=lr, weight_decay=weight_decay, **self.options),
            adamw(others, lr=OTHERS_LR, weight_decay=weight_decay),
        ]


def adamw(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    """torch's fastest on a CPU."""
    return torch.optim.AdamW(parameters, betas=BETAS, fused=True, **options)


def muon(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    """Its step has the root mean square of AdamW's, so that their learning rates compare."""
    return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **options)


def peer(parameters: Parameters, *, cls: str, **options: Any) -> torch.optim.Optimizer:
    """The class of that name from pytorch_optimizer, with its own defaults."""
    make = getattr(importlib.import_module("pytorch_optimizer"), cls)
    return make(parameters, precondition_frequency=REFRESH, **options)


def shampoo(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    return Shampoo(parameters, betas=BETAS, refresh_every=REFRESH, **options)


# A variant is one line: Method("Shampoo, p = 4", shampoo, RATES, {"p": 4}).
RATES = (6e-3, 1.2e-2, 2.4e-2)
METHODS = (
    Method("AdamW", adamw, (3e-3, 6e-3, 1.2e-2), split=False),
    Method("AdamW, split", adamw, RATES),
    Method("Muon", muon, RATES),
    Method("SOAP", peer, RATES, {"cls": "SOAP"}),
    Method("DASH", peer, RATES, {"cls": "DASH"}),
    Method("Shampoo", shampoo, RATES),
    Method("Shampoo, KL", shampoo, RATES, {"statistic": "kl"}),
    Method("Shampoo, eigenbasis", shampoo, RATES, {"application": "soap", "graft": None}),
    Method("Shampoo, p = 4", shampoo, RATES, {"p": 4}),
)
QUICK = ("AdamW", "Shampoo")


def named(names: Sequence[str]) -> list[Method]:
    """The methods of these names; ValueError for one that there is not."""
    known = {method.name: method for method in METHODS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--methods: no {', '.join(unknown)}; there are {'; '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
