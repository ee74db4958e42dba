"""What every op shares: the torch.library fragment, the checks, and their words."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.ops.straight import plain, unobserved

PRECISIONS = ("highest", "high", "medium")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASTERS = (torch.float64, torch.float32)

_LIBRARY = torch.library.Library("shampoo_kernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `torch.ops.shampoo_kernels.<schema>` once for every device, with its fake.

    The implementation asks the chooser for a backend; implementation and fake make the same checks,
    so that an op called directly is as safe as the public function in front of it. Autocast does
    not reach into it: what precision an op computes in is its contract.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    _LIBRARY.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"shampoo_kernels::{name}", fake, lib=_LIBRARY)


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def _without_autocast(implementation: Callable) -> Callable:
    """The same function of (tensor, ...) outside of autocast, which costs a look where off."""

    @functools.wraps(implementation)
    def run(first: Tensor, *args, **kwargs):
        device = "cpu" if first.is_cpu else first.device.type
        if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
            return implementation(first, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return implementation(first, *args, **kwargs)

    return run


def describe(tensor: Tensor) -> str:
    """`(2, 3) float32`, as the errors print a tensor."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def words(options: tuple) -> str:
    """`"left" or "right"`, as the errors print a choice."""
    return " or ".join(f'"{o}"' if isinstance(o, str) else str(o) for o in options)


def check_option(op: str, name: str, given: object, options: tuple) -> None:
    if not isinstance(given, type(options[0])) or given not in options:
        raise ValueError(f"{op}: {name} must be {words(options)}, got {given!r}")


def check_integer(op: str, name: str, given: object, least: int | None = None) -> int:
    """`given` as an int: any integer of 64 bits but a bool."""
    if isinstance(given, bool) or not isinstance(given, (Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(given).__name__}")
    number = int(given)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name} must fit into 64 bits, got an int that does not")
    if least is not None and number < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {number}")
    return number


def check_number(op: str, name: str, given: object, expected: str = "a number") -> float:
    """`given` as a float: any real number but a bool; NaN and Inf pass."""
    if type(given) is float:  # spares the usual case the question of what a number is
        return given
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{op}: {name} must be {expected}, got {type(given).__name__}")
    try:
        if isinstance(given, Fraction):  # Dynamo of torch 2.11 cannot trace float(Fraction)
            return given.numerator / given.denominator
        return float(given)
    except OverflowError:
        raise ValueError(
            f"{op}: {name} must be {expected} in the range of a float, "
            f"got a larger {type(given).__name__}"
        ) from None


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {describe(tensor)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], *why: object) -> None:
    """`why` is said after the shape; a tensor in it stands for its own shape."""
    if tensor.shape != shape:
        said = " ".join(str(tuple(x.shape) if isinstance(x, Tensor) else x) for x in why)
        expected = f"{tuple(shape)} {said}".rstrip()
        raise ValueError(f"{op}: {name} must be {expected}, got {tuple(tensor.shape)}")


def check_same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {other.device}")


def check_square(op: str, name: str, tensor: Tensor, batched: bool = True) -> None:
    """(B, n, n) where an op takes stacks, (*, n, n) where a public function does."""
    right_ndim = tensor.ndim == 3 if batched else tensor.ndim >= 2
    if not right_ndim or tensor.shape[-1] != tensor.shape[-2]:
        expected = "(B, n, n)" if batched else "(*, n, n)"
        raise ValueError(f"{op}: {name} must be {expected}, got {tuple(tensor.shape)}")


def as_tensors(op: str, **arrays: Any) -> list[Any]:
    """Public functions that return: arrays of other libraries as tensors on the same memory.

    What is no array, None included, passes through, for `check_tensors` to judge.
    """
    return [
        x if isinstance(x, Tensor) or not hasattr(x, "__dlpack__") else _from_dlpack(op, name, x)
        for name, x in arrays.items()
    ]


def _from_dlpack(op: str, name: str, array: Any) -> Tensor:
    kind = type(array).__name__
    # What torch takes without a word, and what it ends the process over (both seen in 2.13).
    if not getattr(getattr(array, "flags", None), "writeable", True):
        raise ValueError(f"{op}: {name} must not be a read-only {kind}: a tensor has no such state")
    if min(getattr(array, "strides", None) or (0,)) < 0:
        raise ValueError(f"{op}: {name} must have no negative strides, got a {kind} that does")
    try:
        return torch.from_dlpack(array)
    except Exception as error:  # each library has its own
        raise TypeError(
            f"{op}: {name} must be a tensor or an array that DLPack can hand over, "
            f"got {kind}: {error}"
        ) from error


def check_tensors(op: str, *optional: str, **tensors: object) -> bool:
    """Public functions: every argument is a tensor that needs no gradient, or None if optional.

    True where they may go straight to the op's implementation (straight.py).
    """
    straight = unobserved()
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be a strided tensor, got layout {layout}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, and nothing here is differentiable: "
                f"detach it, or call under torch.no_grad()"
            )
        straight = straight and plain(tensor)
    return straight


def stack(tensor: Tensor, inner: int = 2) -> Tensor:
    """(*, m, n) -> (B, m, n), `inner` last dimensions kept; a view where possible, else a copy."""
    if tensor.ndim == inner + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-inner]), *tensor.shape[-inner:])


def unstack(result: Tensor, shape: torch.Size) -> Tensor:
    """(B, ...) -> the shape of the caller's batch dimensions; a view takes longer than a look."""
    return result if result.shape == shape else result.reshape(shape)


def stack_view(op: str, name: str, tensor: Tensor) -> Tensor:
    """`stack` for a tensor that is written to: a view, or an error."""
    if not torch.compiler.is_compiling() and (tensor.is_neg() or tensor.is_conj()):
        bit = "conjugate" if tensor.is_conj() else "negative"
        raise ValueError(f"{op}: {name} is written in place and must not have the {bit} bit set")
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


def empty_like(A: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of A's shape; half as long as `new_empty` of a shape."""
    return torch.empty_like(A, dtype=dtype, memory_format=torch.contiguous_format)


def mirror_lower(A: Tensor) -> Tensor:
    """The symmetric matrices whose lower triangles A holds; the upper ones are not read."""
    return A.tril() + A.tril(-1).mT
