"""Samplers: gradients of chosen layers of a model, one per example or per batch.

Every sampler is a choice of the gradient of the loss by the model's output (the cotangent), which
the chain rule takes back to the layers; so real labels, labels drawn from the model and the exact
expectation over all labels differ in one small function.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shampoo_kernels.ops import common
from shampoo_kernels.study.gradients import Gradients, Unmeasurable
from shampoo_kernels.study.layers import Layer, find_layers
from shampoo_kernels.study.pullback import pull_back

LOSSES = ("cross_entropy", "squared")
LABELS = ("real", "sampled", "expected")
Loss = str | Callable[[Tensor, Tensor], Tensor]
_OP = "sample"


def sample(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    loss: Loss = "cross_entropy",
    labels: str = "real",
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    chunk: int = 64,
    max_bytes: int = 2 << 30,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Gradients]:
    """Gradients of the chosen layers over `inputs`, at the model's present weights.

    With batch_size=1 there is one gradient G per example; with labels="expected", one per example
    and label, scaled such that the plain mean E[ggᵀ] over all of them is the Gauss-Newton matrix
    exactly. With batch_size=B, one gradient G_B of the mean loss per batch of B consecutive
    examples (a shorter rest is left out): B E[G_B G_Bᵀ] = E[GGᵀ] + (B-1) E[G] E[G]ᵀ over
    independent examples, so that labels drawn from the model, where E[G] = 0, are unbiased for
    Gauss-Newton at every B, and real labels are not.

    The model is in eval mode meanwhile (batch norm with its running statistics, no dropout), so
    that examples do not mix; nothing of it changes. Labels to be ignored have no place here: leave
    such examples out, or give a function as loss.

    Args:
        model: takes `inputs`, gives one tensor (N, *, C): scores or predictions, C last.
        inputs: (N, *). targets: for labels="real"; classes (N, *) or values (N, *, C).
        layers: names of modules ("fc1") or of parameters; None: every matrix that requires grad
            and has no side longer than 8192.
        loss: "cross_entropy" (mean over positions, if any), "squared" (half the sum of squares, the
            mean over positions), or, for real labels, a function (outputs (1, *), targets (1, *))
            -> scalar.
        labels: "real"; "sampled" from the model (softmax, or a unit normal around the output);
            "expected": exact, for outputs (N, C), with C backward passes.
        batch_size: B. generator: of the sampled labels, on the device of the inputs.
        chunk: examples in one forward and backward pass.
        max_bytes: of the gradients of one layer; more is an error. Linear layers, and convolutions
            with few positions, keep (N, m) and (N, n) instead of (N, m, n).
        dtype: float64 or float32: of the measurements, not of the model.

    Returns: {layer: Gradients}, for `measure`, `cosine`, ...

    Raises:
        TypeError, ValueError: what does not fit, no such layer, a layer that has no gradient, or
        one that is not finite; the layer is named.
    """
    found = find_layers(_OP, model, layers)
    _check(found, inputs, targets, loss, labels, batch_size, chunk, dtype)

    def cotangents(outputs: Tensor, start: int) -> Tensor:
        wanted = None if targets is None else targets[start : start + len(outputs)]
        return cotangents_of(outputs, wanted, loss, labels, generator, found)

    return pull_back(
        model, found, inputs, cotangents, batch_size=batch_size, chunk=chunk, max_bytes=max_bytes,
        dtype=dtype,
    )  # fmt: skip


def cotangents_of(
    outputs: Tensor,
    targets: Tensor | None,
    loss: Loss,
    labels: str,
    generator: torch.Generator | None,
    layers: Sequence[Layer],
) -> Tensor:
    """(N, K, *, C): the gradient of the loss by the outputs (N, *, C); K is 1, or C if expected."""
    if not bool(outputs.isfinite().all()):
        raise Unmeasurable(
            f'{_OP}: layer "{layers[0].name}": the output of the model must be finite, '
            "got NaN or infinity"
        )
    if callable(loss):
        one = torch.func.grad(lambda o, t: loss(o[None], t[None]))
        return torch.func.vmap(one)(outputs, targets).unsqueeze(1)
    if labels == "expected" and outputs.ndim != 2:
        raise ValueError(
            f'{_OP}: labels="expected" needs outputs (N, C), got {tuple(outputs.shape)} '
            f'(layer "{layers[0].name}")'
        )
    of_loss = _squared if loss == "squared" else _cross_entropy
    given = of_loss(outputs, targets, labels, generator)
    positions = outputs[0, ..., 0].numel()
    return given if labels == "expected" else given.unsqueeze(1) / positions


def _squared(
    outputs: Tensor, targets: Tensor | None, labels: str, generator: torch.Generator | None
) -> Tensor:
    """Of half the sum of squares: f - y, where y is the target, f plus noise, or f plus √C e_c."""
    if labels == "expected":
        classes = outputs.shape[-1]
        every = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
        return (classes**0.5 * every).expand(len(outputs), -1, -1)
    if targets is None:
        return torch.empty_like(outputs).normal_(generator=generator)
    common.check_shape(_OP, "targets", targets, tuple(outputs.shape))
    return outputs - targets


def _cross_entropy(
    outputs: Tensor, targets: Tensor | None, labels: str, generator: torch.Generator | None
) -> Tensor:
    """p - e_s for the label s; for all labels, each with the root of C times its probability."""
    classes, chances = outputs.shape[-1], outputs.softmax(-1)
    if labels == "expected":
        every = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
        return (classes * chances).sqrt().unsqueeze(-1) * (chances.unsqueeze(1) - every)
    if targets is None:
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        targets = drawn.view(outputs.shape[:-1])
    common.check_dtype(_OP, "targets", targets, (torch.int64,))
    common.check_shape(_OP, "targets", targets, tuple(outputs.shape[:-1]))
    smallest, largest = int(targets.min()), int(targets.max())
    if smallest < 0 or largest >= classes:
        raise ValueError(
            f"{_OP}: targets must be classes from 0 to {classes - 1}, "
            f"got {smallest if smallest < 0 else largest}"
        )
    return chances - F.one_hot(targets, classes).to(chances)


def _check(
    layers: Sequence[Layer],
    inputs: Tensor,
    targets: Tensor | None,
    loss: Loss,
    labels: str,
    batch_size: int,
    chunk: int,
    dtype: torch.dtype,
) -> None:
    where = f'{_OP}: layer "{layers[0].name}"'
    common.check_tensors(_OP, "targets", inputs=inputs, targets=targets)
    common.check_option(_OP, "labels", labels, LABELS)
    common.check_option(_OP, "dtype", dtype, common.MASTERS)
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(
            f"{where}: loss must be {common.words(LOSSES)} or a function, got {loss!r}"
        )
    if callable(loss) and labels != "real":
        raise ValueError(
            f'{where}: labels="{labels}" needs a loss that is a likelihood, '
            f"{common.words(LOSSES)}, got a function"
        )
    if (labels == "real") != (targets is not None):
        need = "needs targets" if targets is None else "takes no targets"
        raise ValueError(f'{where}: labels="{labels}" {need}')
    if targets is not None and len(targets) != len(inputs):
        raise ValueError(
            f"{where}: targets must be ({len(inputs)}, *) as the inputs, got {tuple(targets.shape)}"
        )
    for name, value in (("batch_size", batch_size), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {value}")
    if labels == "expected" and batch_size > 1:
        raise ValueError(f'{where}: labels="expected" needs batch_size=1, got {batch_size}')
