"""Which kernel serves which call: a pure function of op, device and dtype over one table."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from shampoo_kernels import kernels, native

BACKENDS = ("reference", "native", "triton")


class Row(NamedTuple):
    op: str
    device: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    what: str
    measured: bool = True  # else it serves only where its backend is asked for by name


class Served(NamedTuple):
    """One cell of `backends()`: the backend in use, and why not a faster one."""

    backend: str
    reason: str


MASTERS = (torch.float32, torch.float64)

# The reference serves every op, device and dtype that no row names.
TABLE = (
    Row("gram_ema_", "cpu", "native", (torch.float32,), "symmetric product"),
    Row("kronecker_power_step", "cpu", "native", (torch.float32,), "symmetric product"),
    Row("precondition", "cpu", "native", (torch.float32,), "product"),
    Row("power_iteration", "cpu", "native", MASTERS, "a block per thread"),
    Row("orthogonal_iteration", "cpu", "native", MASTERS, "product and LAPACK QR per block"),
    Row("orthogonalize", "cpu", "native", (torch.float32,), "symmetric and full products"),
    Row("eigenvalue_bound", "cpu", "native", (torch.float32, torch.float64), "one pass per block"),
    Row(
        "inverse_root",
        "cpu",
        "native",
        (torch.float32, torch.float64),
        "products or one LAPACK call a block",
    ),
    Row("pack", "cpu", "native", (torch.float32,), "all pieces in one call, moments too"),
    Row("gram_ema_", "cuda", "triton", (torch.float32,), "symmetric product", False),
    Row("kronecker_power_step", "cuda", "triton", (torch.float32,), "symmetric product", False),
    Row("inverse_root", "cuda", "native", MASTERS, "newton to n = 128 in one launch", False),
    Row("inverse_root", "cuda", "triton", (torch.float32,), "iterations in half products", False),
    Row("precondition", "cuda", "triton", (torch.float32,), "norm in the product", False),
    Row("eigenvalue_bound", "cuda", "native", MASTERS, "one launch", False),
    Row("power_iteration", "cuda", "native", MASTERS, "to n = 1024 in one launch", False),
    Row("orthogonal_iteration", "cuda", "native", MASTERS, "to n = 128 in one launch", False),
    Row(
        "pack", "cuda", "native", (torch.float32,), "all pieces in few launches, moments too", False
    ),
    Row("eigenvalue_bound", "cuda", "triton", (torch.float32,), "one launch a stack", False),
    Row("power_iteration", "cuda", "triton", (torch.float32,), "up to 32 vectors at once", False),
)
OPS = (
    "gram_ema_",
    "inverse_root",
    "eigenvalue_bound",
    "power_iteration",
    "orthogonal_iteration",
    "kronecker_power_step",
    "precondition",
    "orthogonalize",
    "pack",  # internal: what an optimizer does around the others (ops/pack.py, ops/moments.py)
)

_ROWS: dict[tuple[str, str], list[Row]] = {}
for _row in TABLE:
    _ROWS.setdefault((_row.op, _row.device), []).append(_row)

_VARIABLE = "SHAMPOO_KERNELS_BACKEND"
# Of a variable that is not set os.environ.get makes an exception, 0.5 µs in every call of an op;
# the dict behind it, where there is one, answers in 0.03.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
_KEY = _VARIABLE if _ENVIRONMENT is os.environ else os.environ.encodekey(_VARIABLE)
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def choose(op: str, device: str, dtype: torch.dtype, but: str | None = None) -> str:
    """The backend that serves `op` on tensors of this device type and dtype; `but`: not that one,
    which does not take this shape.

    An override (`use_backend`, or SHAMPOO_KERNELS_BACKEND) is a preference: an op that the named
    backend does not have takes the reference. A backend that is absent altogether raises.
    """
    wanted = _override.get()
    if wanted is None and (wanted := _variable()) is not None:
        _check_present(wanted, _VARIABLE)
    for row in _ROWS.get((op, device), ()):
        if dtype in row.dtypes and row.backend != but:
            asked = row.measured if wanted is None else wanted == row.backend
            if asked and why_absent(row) is None:
                return row.backend
    return "reference"


def choose_for(
    op: str, tensor: torch.Tensor, dtype: torch.dtype | None = None, but: str | None = None
) -> str:
    """`choose` for the device of `tensor`, and its dtype where none is given."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    return choose(op, device, dtype or tensor.dtype, but)


def _variable() -> str | None:
    """SHAMPOO_KERNELS_BACKEND as it is now; None where it is empty or not set."""
    return (os.environ.get(_VARIABLE) or None) if _KEY in _ENVIRONMENT else None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend, "reference", "native" or "triton", inside a `with` block of this thread.

    Raises ValueError for another name, RuntimeError where that backend is absent (the reason said).
    """
    _check_present(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def why_absent(row: Row) -> str | None:
    """Why the kernel of this row cannot run here, or None where it can."""
    if row.backend == "triton":
        return kernels.why_not()
    if native.lib is None:
        return native.why_not
    if row.device == "cuda":
        if not native.lib.build_facts()["cuda_archs"]:
            return f"CUDA C++ is not built: {native.facts['cuda_why_not']}"
        return None if torch.cuda.is_available() else "there is no CUDA device"
    if row.op == "inverse_root" and not native.lib.has_lapack():
        return "this torch exports no LAPACK (ssyevd_), so blocks go through torch.linalg.eigh"
    return None


def backends() -> dict[str, dict[str, Served]]:
    """What serves every op on every kind of device, and why not something faster.

    Returns {op: {device: Served(backend, reason)}}, the device being "cpu", "cuda" or "other".
    """
    return {op: {d: _served(op, d) for d in ("cpu", "cuda", "other")} for op in OPS}


def _served(op: str, device: str) -> Served:
    rows = _ROWS.get((op, device), [])
    overridden = _override.get() is not None or _variable() is not None
    reasons = []
    for row in rows:
        absent = why_absent(row)
        if absent is not None:
            reasons.append(f"{row.backend} is absent: {absent}")
        elif choose(op, device, row.dtypes[0]) == row.backend:
            names = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
            unmeasured = ", not measured" * (not row.measured)
            return Served(row.backend, f"{row.what}, {names}{unmeasured}")
        elif row.measured or overridden:
            reasons.append(f"{row.backend} is overridden")
        else:
            reasons.append(f"{row.backend} is not measured yet: ask for it by name")
    return Served("reference", "; ".join(reasons) or "no other kernel of this op yet")


def _check_present(name: str, source: str = "backend") -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and native.lib is None:
        raise RuntimeError(f"the native backend is absent: {native.why_not}")
    if name == "triton" and kernels.why_not() is not None:
        raise RuntimeError(f"the triton backend is absent: {kernels.why_not()}")
