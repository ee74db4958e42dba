"""What is counted, not timed: operations of a step, bytes of a state, the peak of a process.

python bench/counting.py prints what every call of PEAKS needs beyond its inputs, result included.
"""

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import cases
import restated
import rivals
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_kernels import Shampoo, gram_ema_, inverse_root, precondition, state_bytes

CYCLE = 10  # steps between two roots


class CountOperations(TorchDispatchMode):
    """How many torch operations run inside, views left out: they compute nothing."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


def optimizers() -> dict[str, Callable]:
    """Every optimizer that is compared, with new roots or bases every CYCLE steps."""
    found: dict[str, Callable] = {
        "ours": lambda own: Shampoo(own, refresh_every=CYCLE),
        "AdamW": torch.optim.AdamW,
    }
    if (package := rivals.package("pytorch_optimizer")) is not None:
        found["DASH"] = lambda own: package.DASH(own, precondition_frequency=CYCLE)
        found["SOAP"] = lambda own: package.SOAP(own, precondition_frequency=CYCLE)
    return found


def parameters(shapes: Sequence[Sequence[int]], gradient=torch.randn_like) -> list[nn.Parameter]:
    own = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    for parameter in own:
        parameter.grad = gradient(parameter)
    return own


def operations(make: Callable, shapes: Sequence[Sequence[int]]) -> float:
    """Torch operations a step, mean over one cycle after the state is there."""
    optimizer = make(parameters(shapes))
    optimizer.step()
    with CountOperations() as counted:
        for _ in range(CYCLE):
            optimizer.step()
    return counted.total / CYCLE


def bytes_a_parameter(make: Callable, shapes: Sequence[Sequence[int]], *, fake: bool) -> float:
    """Bytes of the state tensors after two steps, over the number of parameters.

    `fake`: with tensors that have shapes and no memory, for optimizers that never look at a number;
    else with gradients of zero, which make a complete state and cost no roots.
    """
    with FakeTensorMode() if fake else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DASH asks tensors without memory where it lies
        return _state_bytes(make, shapes) / cases.count(shapes)


def planned_bytes_a_parameter(shapes: Sequence[Sequence[int]], **options: object) -> float:
    """The same of a variant of ours, before there is a state."""
    own = [nn.Parameter(torch.empty(*shape, device="meta")) for shape in shapes]
    return state_bytes(own, **options).total / cases.count(shapes)


def _state_bytes(make: Callable, shapes: Sequence[Sequence[int]]) -> int:
    optimizer = make(parameters(shapes, torch.zeros_like))
    for _ in range(2):
        optimizer.step()
    return sum({id(s): s.nbytes() for s in _storages(dict(optimizer.state))}.values())


def _storages(value: object) -> list[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()]
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [storage for one in inner for storage in _storages(one)]  # type: ignore[union-attr]
    return []


def _step(name: str) -> Callable[[], Callable[[], object]]:
    def prepare():
        optimizer = optimizers()[name](parameters(cases.transformer_layer(WIDTH)))
        optimizer.step()  # the state is not part of it
        return optimizer.step

    return prepare


def _gram(call: Callable) -> Callable[[], Callable[[], object]]:
    def prepare():
        stat, grad = torch.zeros(BLOCKS, N, N), torch.randn(BLOCKS, N, N).bfloat16()
        return lambda: call(stat, grad)

    return prepare


def _root(call: Callable) -> Callable[[], Callable[[], object]]:
    def prepare():
        A, shift = cases.spectrum(BLOCKS, N, 1e4), torch.full((BLOCKS, 1, 1), 1e-4)
        return lambda: call(A, shift)

    return prepare


def _precondition(call: Callable) -> Callable[[], Callable[[], object]]:
    def prepare():
        grad, left, right = (torch.randn(BLOCKS, N, N) for _ in range(3))
        return lambda: call(grad, left, right)

    return prepare


QUICK = os.environ.get("QUICK") == "1"
BLOCKS, N, WIDTH = (8, 256, 64) if QUICK else (16, 512, 256)
_GRAM, _ROOT, _PRECONDITION, _STEPS = (
    f"gram_ema_, {BLOCKS} x {N}², bfloat16",
    f"inverse_root, {BLOCKS} x {N}², p = 2",
    f"precondition, {BLOCKS} x {N}²",
    f"{CYCLE} steps, a layer of width {WIDTH}",
)
# (what, by what) -> prepare() -> the call that is measured
PEAKS: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {
    (_GRAM, "ours"): _gram(lambda s, g: gram_ema_(s, g, 0.95, 0.05, side="left")),
    (_GRAM, "a cast and baddbmm_"): _gram(
        lambda s, g: s.baddbmm_(g.float(), g.float().mT, beta=0.95, alpha=0.05)
    ),
    (_ROOT, "ours, newton"): _root(
        lambda A, shift: inverse_root(A, 2, ridge=1e-4, method="newton")
    ),
    (_ROOT, "ours, eigh"): _root(lambda A, shift: inverse_root(A, 2, ridge=1e-4, method="eigh")),
    (_ROOT, "torch.linalg.eigh"): _root(lambda A, shift: restated.eigh_root(A, 2, shift)),
    (_PRECONDITION, "ours"): _precondition(precondition),
    (_PRECONDITION, "bmm, bmm, sum"): _precondition(
        lambda g, left, right: ((X := (left @ g) @ right), X.square().sum((1, 2)))
    ),
    **{(_STEPS, name): _step(name) for name in ("ours", "AdamW", "DASH")},
}


def peaks() -> list[tuple[str, str, float | str]]:
    """(what, by what, MiB above what was resident before the call), measured in processes of their
    own, which start without threads and memory of others."""
    # Freed memory goes back at once, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, str(Path(__file__))]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        why = (found.stderr.strip().splitlines() or ["no message"])[-1]
        return [("everything", "failed", why)]
    return json.loads(found.stdout.splitlines()[-1])


def _peak_in_a_child(key: tuple[str, str]) -> float | str:
    """MiB, or why there is no number; forked before this process has used a thread."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            torch.manual_seed(0)
            text = json.dumps(_peak_here(PEAKS[key](), CYCLE if key[0] == _STEPS else 1) / 2**20)
        except Exception as error:
            text = json.dumps(f"failed: {type(error).__name__}: {error}"[:200])
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text) if text else "failed: the process was killed"


def _peak_here(call: Callable[[], object], calls: int) -> int:
    """The highest resident set since the mark was taken, less what was resident. Linux only.

    What libraries and threads keep from one call to the next is not counted: it is there before.
    """
    call()  # libraries, threads and their buffers
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free but resident would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(calls):
        call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # which torch.optim imports in a first step; and
    optimizers()  # the packages: once, not in every child
    print(json.dumps([(*key, _peak_in_a_child(key)) for key in PEAKS]))
