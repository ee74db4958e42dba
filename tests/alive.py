"""Watching torch's own operations: bytes alive, as a GPU's allocator would count them, and
operations that would make the host wait for a GPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Inside `with`: .peak, the most bytes that new storages held at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, new=False)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, new=True)
        return out

    def _meet(self, tensor, new):
        if not hasattr(tensor, "untyped_storage"):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known[key] = weakref.finalize(storage, self._forget, key, size if new else 0)
        if new:
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key, size):
        self.now -= size
        del self.known[key]


class NoWaiting(TorchDispatchMode):
    """Inside `with`: what gives the host a number, or a shape that depends on numbers, raises."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.is_nonzero,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.FORBIDDEN, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))
