"""What bench/gpu_*.py need to run without a GPU: a CPU for their device, the reference for their
backend, and a torch.cuda that does nothing."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import emulated_product
import pytest
import torch

from shampoo_kernels.kernels import table

BENCH = Path(__file__).resolve().parents[1] / "bench"
# Where one of these files has a DEVICE or a BACKEND, it is replaced: else a test would meet CUDA.
REPLACED = {"DEVICE": "cpu", "BACKEND": "reference", "COMPILER": "eager"}


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self): ...
    def synchronize(self): ...

    def elapsed_time(self, end):
        return 0.5


class Stream:
    def synchronize(self): ...
    def wait_stream(self, other): ...


class Graph:
    """What is called under `torch.cuda.graph` has run already; a replay does nothing more."""

    def replay(self): ...


class Cuda:
    """The part of torch.cuda that these files use, on a CPU."""

    Event, Stream, CUDAGraph = Event, Stream, Graph

    def __getattr__(self, name):
        def nothing(*arguments, **options):
            return 0

        known = ("synchronize", "set_sync_debug_mode", "reset_peak_memory_stats", "empty_cache",
                 "memory_allocated", "max_memory_allocated", "current_device")  # fmt: skip
        if name not in known or not hasattr(torch.cuda, name):
            raise AttributeError(name)
        return nothing

    def is_available(self):
        return True

    def current_stream(self):
        return Stream()

    def mem_get_info(self):
        return 1 << 40, 1 << 40

    def get_device_name(self):
        return "no GPU"

    def stream(self, stream):
        assert isinstance(stream, Stream)
        return contextlib.nullcontext()

    def graph(self, graph, stream):
        assert isinstance(graph, Graph)
        assert isinstance(stream, Stream)
        return contextlib.nullcontext()


class Torch:
    """torch with another torch.cuda."""

    cuda = Cuda()

    def __getattr__(self, name):
        return getattr(torch, name)


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # for what it imports from there
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch", Torch())
    for attribute, value in REPLACED.items():
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, value)
    return module


@pytest.fixture
def checks(monkeypatch):
    """gpu_checks.py and the files that it runs, small, by the emulated product kernel."""
    load("gpu_matrices", monkeypatch)
    products = load("gpu_checks_products", monkeypatch)
    monkeypatch.setattr(products, "RACE", (70, 16, 3))
    monkeypatch.setattr(products, "WIDE_OFFSETS", (128, 3))
    monkeypatch.setattr(products, "product", emulated_product.product)
    roots = load("gpu_checks_roots", monkeypatch)
    monkeypatch.setattr(roots, "SIZES", (33,))
    monkeypatch.setattr(roots, "BOUND_SIZES", (1, 33))
    monkeypatch.setattr(roots, "WORKSPACE", (40, 4))
    load("gpu_checks_graphs", monkeypatch)
    monkeypatch.setattr(table, "target", lambda device: "sm_90")
    return load("gpu_checks", monkeypatch)


@pytest.fixture
def bench(checks, monkeypatch):
    timing = load("gpu_timing", monkeypatch)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1 << 14)
    monkeypatch.setattr(timing, "COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "RATED_N", 16)
    return load("gpu_bench", monkeypatch)
