"""The layers of a model by name, and how the gradient of each can be taken example by example."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_SIDE = 8192  # as in Shampoo, whose longer sides have no factor


class Layer(NamedTuple):
    """One weight of at least two dimensions; its gradient is the matrix (m, n) of G.flatten(1)."""

    name: str  # "fc1" for the weight of a module, else the parameter's own name
    parameter: str  # "fc1.weight"
    weight: nn.Parameter
    module: nn.Linear | nn.Conv2d | None  # where G = sum_t δ_t a_tᵀ of its outputs and inputs

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel()


def layer_names(model: nn.Module) -> list[str]:
    """The names that `find_layers` knows, in the order of the parameters."""
    return [name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim > 1]


def find_layers(op: str, model: nn.Module, names: str | Sequence[str] | None) -> list[Layer]:
    """Layers by the name of the module or of the parameter.

    None: every matrix that requires grad and has sides of at most LONGEST_SIDE, so that the
    factors of an embedding do not fill the memory unasked.

    Raises ValueError naming the layer: there is none, it is a vector, or it does not require grad.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if names is None:
        named = [(name, _weight(parameters, name)[1]) for name in layer_names(model)]
        names = [
            name
            for name, weight in named
            if weight.requires_grad and max(len(weight), weight[0].numel()) <= LONGEST_SIDE
        ]
    found = []
    for name in [names] if isinstance(names, str) else names:
        if name not in parameters and f"{name}.weight" not in parameters:
            known = ", ".join(layer_names(model)) or "none"
            raise ValueError(f'{op}: there is no layer "{name}"; the model has: {known}')
        parameter, weight = _weight(parameters, name)
        if weight.ndim < 2:
            raise ValueError(
                f'{op}: layer "{name}" must have a weight of at least two dimensions, '
                f"got {tuple(weight.shape)}"
            )
        if not weight.requires_grad:
            raise ValueError(f'{op}: layer "{name}" has no gradient: it does not require grad')
        found.append(Layer(name, parameter, weight, _factoring(model, parameter)))
    if not found:
        raise ValueError(
            f"{op}: the model has no layer with a matrix that requires grad and has sides of at "
            f"most {LONGEST_SIDE}"
        )
    return found


def _weight(parameters: dict[str, nn.Parameter], name: str) -> tuple[str, nn.Parameter]:
    parameter = name if name in parameters else f"{name}.weight"
    return parameter, parameters[parameter]


def _factoring(model: nn.Module, parameter: str) -> nn.Linear | nn.Conv2d | None:
    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    if leaf != "weight":
        return None
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.padding_mode != "zeros":
        return None
    return None if isinstance(module.padding, str) else module


def as_factors(module: nn.Module | None, act: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a call of the module as (N, T, n) and (N, T, m)."""
    if isinstance(module, nn.Conv2d):
        unfolded = F.unfold(act, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return unfolded.mT, delta.flatten(2).mT
    return act.reshape(len(act), -1, act.shape[-1]), delta.reshape(len(delta), -1, delta.shape[-1])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: no dropout, and no batch norm that mixes examples; then as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def capturing(layers: Sequence[Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inside, forwards of the modules of these layers fill {layer: [(input, probe), ...]}.

    The probe is a zero that is added to the output: its gradient is that of the output, whatever
    works in place on the output later. The caller empties the lists.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}

    def hook_of(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            calls[name].append((args[0].detach(), probe))
            return output + probe

        return hook

    handles = [
        layer.module.register_forward_hook(hook_of(layer.name))
        for layer in layers
        if layer.module is not None
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
