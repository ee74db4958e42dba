"""csrc/cuda as plain C++20 on threads (csrc/emulate): builds its programs, plain or with a fault
planted or under a sanitizer, and talks to them in raw arrays."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("clang++")
DTYPES = {torch.float32: "float", torch.float64: "double"}
PLAIN = ("-O2",)
THREADS = ("-O1", "-g1", "-fsanitize=thread")
ADDRESSES = ("-O1", "-g1", "-fsanitize=address")

needs_compiler = pytest.mark.skipif(
    CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources"
)


def build(folder: Path, name: str, flags: tuple[str, ...] = PLAIN, csrc: Path = CSRC) -> Path:
    """The program of csrc/emulate/<name>.cpp."""
    program = folder / name
    includes = [f"-I{csrc / 'emulate'}", f"-I{csrc}"]
    source = str(csrc / f"emulate/{name}.cpp")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [CXX, "-std=c++20", "-pthread", *flags, *warnings, *includes, source]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def planted(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of csrc with the first `right` of csrc/cuda/<file> made `wrong`."""
    csrc = folder / "csrc"
    for part in ("cuda", "emulate"):
        shutil.copytree(CSRC / part, csrc / part)
    for header in CSRC.glob("*.h"):
        shutil.copy(header, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert right in text, f"{file} has changed: plant the fault elsewhere"
    (csrc / "cuda" / file).write_text(text.replace(right, wrong, 1))
    return csrc


def raw(*tensors: Tensor | None) -> bytes:
    return b"".join(t.contiguous().numpy().tobytes() for t in tensors if t is not None)


def start(program: Path, dtype: torch.dtype, sizes, data: bytes) -> subprocess.CompletedProcess:
    command = [str(program), DTYPES[dtype], *(str(int(size)) for size in sizes)]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(command, input=data, capture_output=True, env=environment)


def call(program: Path, dtype: torch.dtype, sizes, data: bytes, *shapes) -> list[Tensor]:
    """What the program writes: one tensor per (dtype, shape)."""
    result = start(program, dtype, sizes, data)
    assert result.returncode == 0, result.stderr.decode()
    output, tensors = bytearray(result.stdout), []
    for kind, shape in shapes:
        size = kind.itemsize * torch.Size(shape).numel()
        part, output = output[:size], output[size:]
        empty = torch.empty(shape, dtype=kind)
        tensors.append(torch.frombuffer(part, dtype=kind).view(shape) if size else empty)
    assert not output, f"{len(output)} bytes too many"
    return tensors
