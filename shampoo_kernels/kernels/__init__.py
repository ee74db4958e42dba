"""The Triton kernels. Importing this package needs no triton, importing what is in it does.

why_not: None where they can run, else one line.
"""

import importlib.util

import torch

PACKAGED = "triton is not installed (a CUDA build of torch brings it along)"


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return PACKAGED
    return None if torch.cuda.is_available() else "there is no CUDA device"


why_not = _why_not()
