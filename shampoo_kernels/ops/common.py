"""What every op shares: the torch.library fragment, the checks, and their words."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

PRECISIONS = ("highest", "high", "medium")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASTERS = (torch.float64, torch.float32)

_LIBRARY = torch.library.Library("shampoo_kernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `torch.ops.shampoo_kernels.<schema>` once for every device, with its fake.

    The implementation asks the chooser for a backend; implementation and fake make the same checks,
    so that an op called directly is as safe as the public function in front of it.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shampoo_kernels::{name}", fake, lib=_LIBRARY)


def describe(tensor: Tensor) -> str:
    """`(2, 3) float32`, as the errors print a tensor."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def words(options: tuple) -> str:
    """`"left" or "right"`, as the errors print a choice."""
    return " or ".join(f'"{o}"' if isinstance(o, str) else str(o) for o in options)


def check_option(op: str, name: str, given: object, options: tuple) -> None:
    if given not in options:
        raise ValueError(f"{op}: {name} must be {words(options)}, got {given!r}")


def check_integer(op: str, name: str, given: object) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(given).__name__}")


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {describe(tensor)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple, why: str = "") -> None:
    if tuple(tensor.shape) != tuple(shape):
        why = f" {why}" if why else ""
        raise ValueError(f"{op}: {name} must be {tuple(shape)}{why}, got {tuple(tensor.shape)}")


def check_same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device}, got {other.device}")


def check_apart(op: str, name: str, written: Tensor, **read: Tensor | None) -> None:
    """What is written must not be what is read (implementations only: a fake has no memory)."""
    for other_name, other in read.items():
        if other is not None and written.numel() and other.data_ptr() == written.data_ptr():
            raise ValueError(f"{op}: {name} is written in place and must not be {other_name}")


def check_square(op: str, name: str, tensor: Tensor, batched: bool = True) -> None:
    """(B, n, n) where an op takes stacks, (*, n, n) where a public function does."""
    right_ndim = tensor.ndim == 3 if batched else tensor.ndim >= 2
    if not right_ndim or tensor.shape[-1] != tensor.shape[-2]:
        expected = "(B, n, n)" if batched else "(*, n, n)"
        raise ValueError(f"{op}: {name} must be {expected}, got {tuple(tensor.shape)}")


def check_tensors(op: str, *optional: str, **tensors: object) -> None:
    """Public functions: every argument is a tensor that needs no gradient, or None if optional."""
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, and nothing here is differentiable: "
                f"detach it, or call under torch.no_grad()"
            )


def stack(tensor: Tensor, inner: int = 2) -> Tensor:
    """(*, m, n) -> (B, m, n), `inner` last dimensions kept; a view where possible, else a copy."""
    if tensor.ndim == inner + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-inner]), *tensor.shape[-inner:])


def stack_view(op: str, name: str, tensor: Tensor) -> Tensor:
    """`stack` for a tensor that is written to: a view, or an error."""
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{op}: {name} is written in place and must not be an expanded tensor")
    if tensor.ndim == 3:
        return tensor
    if tensor.ndim == 2:
        return tensor.unsqueeze(0)
    try:
        return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} is written in place, so its batch dimensions must fold into one view, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        ) from None


def mirror_lower(A: Tensor) -> Tensor:
    """The symmetric matrices whose lower triangles A holds; the upper ones are not read."""
    return A.tril() + A.tril(-1).mT
