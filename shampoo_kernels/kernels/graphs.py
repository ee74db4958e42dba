"""A refresh of a stack as a CUDA graph: captured at the first call of its kind, replayed after.

A refresh launches 20 to 40 kernels on the same buffers with the same numbers, of which only the
entries of the stack change. Where a launch costs more than its kernel (small blocks, few of them),
replaying saves the host's part. Off unless SHAMPOO_KERNELS_GRAPHS=1 says otherwise: not measured
yet. Never used inside somebody else's capture, which then simply contains the launches. A capture
waits for the device, a replay does not.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_VARIABLE = "SHAMPOO_KERNELS_GRAPHS"
_MOST_GRAPHS = 32
# A graph keeps copies of its inputs and outputs; larger stacks gain nothing from one, because their
# kernels outlast their launches. Not measured yet.
_MOST_BYTES = 256 << 20

Function = Callable[[list[Tensor], list[Tensor]], None]


class Graph(Protocol):
    def replay(self) -> None: ...


class _Captured(NamedTuple):
    graph: Graph
    inputs: list[Tensor]
    outputs: list[Tensor]


class Device:
    """What a cache asks of CUDA; the tests have their own."""

    def __init__(self) -> None:
        self._pools: dict[Hashable, Any] = {}

    def key(self, on: Tensor) -> Hashable:
        """Graphs of one stream are replayed one after another, so they may share their memory."""
        return on.device, torch.cuda.current_stream(on.device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capture(self, function: Callable[[], None], on: Tensor) -> Graph:
        """`function` as a graph, after a run that compiles what there is to compile: compiling and
        loading kernels cannot be captured."""
        key = self.key(on)
        with torch.cuda.device(on.device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                function()
            current.wait_stream(side)
            graph, pool = torch.cuda.CUDAGraph(), self._pools.get(key)
            # thread_local: what other threads do meanwhile is theirs (a data loader pinning memory)
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                function()
            self._pools[key] = graph.pool()
        return graph


class Cache:
    """Graphs by what they were captured for, the least recently used of them dropped."""

    def __init__(self, device: Device, most: int = _MOST_GRAPHS):
        self.device, self.most = device, most
        self.graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self, name: Hashable, function: Function, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """function(inputs, outputs), which writes outputs, by a graph.

        Args:
            name: all that `function` depends on beside shapes, dtypes and device of the tensors.
            function: launches work that is the same at every call, keeps no tensor that it makes,
                and does not synchronise. It sees static copies of inputs and outputs.
            inputs, outputs: on one device; outputs may be inputs.
        """
        likeness = tuple((tuple(x.shape), x.dtype) for x in (*inputs, *outputs))
        key = (name, likeness, self.device.key(inputs[0]))
        with self._lock:
            found = self.graphs.pop(key, None)
            if found is None:
                found = self._capture(function, inputs, outputs)
            self.graphs[key] = found
            while len(self.graphs) > self.most:
                self.graphs.popitem(last=False)
            for static, given in zip(found.inputs, inputs, strict=True):
                static.copy_(given)
            found.graph.replay()
            for given, static in zip(outputs, found.outputs, strict=True):
                given.copy_(static)

    def _capture(
        self, function: Function, inputs: list[Tensor], outputs: list[Tensor]
    ) -> _Captured:
        static = [torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in inputs]
        results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in outputs]
        graph = self.device.capture(lambda: function(static, results), static[0])
        return _Captured(graph, static, results)


cache = Cache(Device())


def wanted(A: Tensor) -> bool:
    """Shall the refresh of this stack be a graph?"""
    asked = os.environ.get(_VARIABLE) == "1" and A.numel() > 0 and A.nbytes <= _MOST_BYTES
    return asked and not cache.device.capturing()
