"""The Triton kernels. Importing this package needs no triton, importing what is in it does."""

import functools
import importlib.util

import torch


@functools.cache
def why_not() -> str | None:
    """None where the kernels can run, else one line that says what is missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (a CUDA build of torch brings it along)"
    return None if torch.cuda.is_available() else "there is no CUDA device"
