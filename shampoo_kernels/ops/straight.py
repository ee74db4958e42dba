"""When a public function may call its op's implementation itself.

torch's dispatcher costs 3 µs in front of an implementation in Python, more than a product of two
32 x 32 blocks. Where it would do nothing but call it, the public functions spare themselves the
way. Everything that looks at calls or changes them on that way still gets them: torch.compile,
modes and subclasses, transforms, autocast, tracing and the profiler.
"""

import torch
from torch import Tensor

try:
    from torch._C import (
        _get_tracing_state,
        _is_any_autocast_enabled,
        _is_torch_function_mode_enabled,
        _len_torch_dispatch_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # a torch that calls them something else: all calls go through its dispatcher
    _ASKABLE = False
else:
    _ASKABLE = True

_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved() -> bool:
    """Does nothing want to see or change what this thread calls?"""
    return not (
        torch.compiler.is_compiling()
        or not _ASKABLE
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or peek_interpreter_stack() is not None
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def plain(tensor: Tensor) -> bool:
    """Is it only memory on a CPU or a GPU, which any kernel may read as it lies there?"""
    return type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()
