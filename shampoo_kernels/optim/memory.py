"""How much memory the state of Shampoo takes, before there is any."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shampoo_kernels.optim.layout import MOMENTS
from shampoo_kernels.optim.shampoo import Shampoo
from shampoo_kernels.optim.stacks import cut_parameter, state_dtype
from shampoo_kernels.optim.state import state_shapes

_STEP_BYTES = 4  # float32, as in torch.optim


@dataclass(frozen=True)
class StateBytes:
    """Bytes of `moments`, `statistics`, `roots` (or bases), `other` (counts, eigenvalues)."""

    moments: int
    statistics: int
    roots: int
    other: int

    @property
    def total(self) -> int:
        return self.moments + self.statistics + self.roots + self.other


def state_bytes(params: nn.Module | Iterable[Any], **options: Any) -> StateBytes:
    """The memory that the state of `Shampoo(params, **options)` will take.

    Nothing is allocated, and parameters on the meta device will do. Exact for the state, all on the
    devices of the parameters (but "step", 4 bytes each, on the CPU); a step takes temporaries on
    top, of the size of some blocks. Frozen parameters take nothing.

    Args:
        params: a model, parameters, or param groups, such as those of `split_params`.
        options: as in `Shampoo`.

    Raises:
        ValueError: an option that is not allowed.
    """
    given = params.parameters() if isinstance(params, nn.Module) else params
    sizes = dict.fromkeys(("moments", "statistics", "roots", "other"), 0)
    for group in Shampoo(given, **options).param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                for kind, size in _of_parameter(parameter, group):
                    sizes[kind] += size
    return StateBytes(**sizes)


def _of_parameter(parameter: Tensor, group: dict) -> Iterable[tuple[str, int]]:
    dtype = state_dtype(parameter.dtype)
    for name, shape in state_shapes(parameter, cut_parameter(parameter, group), group).items():
        kind = name.partition(".")[0]
        count = math.prod(shape)
        if name == "step":
            yield "other", _STEP_BYTES
        elif kind in MOMENTS:
            yield "moments", count * dtype.itemsize
        elif kind in ("left", "right"):
            yield "statistics", count * dtype.itemsize
        elif kind.endswith(("_root", "_basis")):
            yield "roots", count * (group["root_dtype"] or dtype).itemsize
        else:
            yield "other", count * dtype.itemsize
