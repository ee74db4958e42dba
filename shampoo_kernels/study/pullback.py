"""Back from the model's output to its layers: the chain rule, one gradient per example or batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shampoo_kernels.study.collecting import Collector
from shampoo_kernels.study.gradients import Gradients
from shampoo_kernels.study.layers import Layer, as_factors, capturing, evaluating

_OP = "sample"


def pull_back(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Tensor,
    cotangents: Callable[[Tensor, int], Tensor],
    *,
    batch_size: int = 1,
    chunk: int = 64,
    max_bytes: int = 2 << 30,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Gradients]:
    """As `sample`, cotangents(outputs of examples from `start`, start) -> (N, K, *outputs)."""
    examples = len(inputs) // batch_size * batch_size
    if examples == 0:
        raise ValueError(f"{_OP}: batch_size {batch_size} needs as many inputs, got {len(inputs)}")
    found = [Collector(layer, examples // batch_size, max_bytes) for layer in layers]
    with evaluating(model), torch.enable_grad():
        factored = [
            each
            for each in found
            if batch_size == 1 and _factors_are_right(model, each.layer, inputs)
        ]
        dense = [each for each in found if each not in factored]
        for part in inputs[:examples].split(chunk if batch_size == 1 else batch_size):
            with capturing([each.layer for each in factored]) as calls:
                outputs = _outputs(model, part)
                given = cotangents(outputs.detach(), found[0].next * batch_size)
                pairs = _factors([each.layer for each in factored], calls, outputs, given)
            for each in factored:
                each.add_factors(*pairs[each.layer.name])
            if batch_size > 1:
                weights = _of_weights(
                    [each.layer for each in dense], outputs, given[:, 0] / batch_size
                )
                for each, grad in zip(dense, weights, strict=True):
                    each.add(grad[None, None])
            elif dense:
                every = _per_example(model, [each.layer for each in dense], part, given)
                for each in dense:
                    each.add(every[each.layer.parameter])
    return {each.layer.name: each.gradients(dtype) for each in found}


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or len(outputs) != len(inputs):
        what = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{_OP}: the model must give one tensor (N, *, C) for inputs {tuple(inputs.shape)}, "
            f"got {what}"
        )
    return outputs


def _factors(
    layers: Sequence[Layer],
    calls: dict[str, list[tuple[Tensor, Tensor]]],
    outputs: Tensor,
    cotangents: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (delta (N, K, T, m), act (N, T, n))}; the calls of a module lie side by side in T."""
    if not layers:
        return {}
    probes = [probe for layer in layers for _, probe in calls[layer.name]]
    deltas = [
        torch.autograd.grad(outputs, probes, given, retain_graph=True, allow_unused=True)
        for given in cotangents.unbind(1)
    ]
    found, position = {}, 0
    for layer in layers:
        acts, ours = [], []
        for act, probe in calls[layer.name]:
            given = [d[position] if d[position] is not None else 0 * probe for d in deltas]
            pairs = [as_factors(layer.module, act, delta.detach()) for delta in given]
            acts.append(pairs[0][0])
            ours.append(torch.stack([delta for _, delta in pairs], 1))
            position += 1
        found[layer.name] = torch.cat(ours, 2), torch.cat(acts, 1)
    return found


def _factors_are_right(model: nn.Module, layer: Layer, inputs: Tensor) -> bool:
    """Whether δ and a, summed over the calls of the module, are autograd's gradient of the weight.

    They are not where the weight is also used elsewhere (tied, or read by other code).
    """
    inputs = inputs[:4]
    with capturing([layer]) as calls:
        outputs = _outputs(model, inputs)
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(outputs.shape, generator=generator).to(outputs)
        (expected,) = _of_weights([layer], outputs, given)
        if not calls[layer.name]:
            return False
        delta, act = _factors([layer], calls, outputs, given.unsqueeze(1))[layer.name]
    made = torch.einsum("btm,btn->mn", delta[:, 0].double(), act.double())
    difference = made - expected.flatten(1).double()
    return bool(difference.norm() <= 1e-2 * expected.double().norm())


def _of_weights(layers: Sequence[Layer], outputs: Tensor, given: Tensor) -> list[Tensor]:
    """The gradients of the weights, summed over the examples; the graph stays."""
    weights = [layer.weight for layer in layers]
    grads: Sequence[Tensor | None] = [None] * len(weights)
    if outputs.requires_grad:
        grads = torch.autograd.grad(outputs, weights, given, retain_graph=True, allow_unused=True)
    found = []
    for layer, grad in zip(layers, grads, strict=True):
        if grad is None:
            raise ValueError(
                f'{_OP}: layer "{layer.name}" has no gradient: the output does not depend on it'
            )
        found.append(grad)
    return found


def _per_example(
    model: nn.Module, layers: Sequence[Layer], inputs: Tensor, cotangents: Tensor
) -> dict[str, Tensor]:
    """{parameter: (N, K, *shape)} by torch.func, for weights of any module."""
    weights = {layer.parameter: layer.weight.detach() for layer in layers}

    def gradients(example: Tensor, given: Tensor) -> dict[str, Tensor]:
        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, (example[None],))[0]

        back = torch.func.vjp(outputs, weights)[1]
        return torch.func.vmap(lambda one: back(one)[0])(given)

    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
        return torch.func.vmap(gradients)(inputs, cotangents)
