"""The compiled extension, or one line that says why it is absent. Importing this never raises.

lib: the module `shampoo_kernels._C`, whose import registers `torch.ops.shampoo_kernels_native.*`.
why_not: None when lib is there.
facts: what the build left behind (_build.json); empty when the package was never built.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C, which finds its symbols in the libraries that torch has loaded

NOT_BUILT = (
    "not built: this is a source tree; `pip install torch 'setuptools>=77' ninja pybind11`, then "
    "`pip install --no-build-isolation -e .` build it"
)


def _read_facts() -> dict[str, Any]:
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _load(facts: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    if not facts:
        return None, NOT_BUILT
    if not facts["native"]:
        return None, f"not built: {facts['why_not']}"
    try:
        return importlib.import_module("shampoo_kernels._C"), None
    except (ImportError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        built = f"built with torch {facts['torch']}, this is torch {torch.__version__}"
        return None, f"does not load: {message} ({built})"


def isa() -> str | None:
    """The instruction set of the native product, None without native kernels."""
    return None if lib is None else lib.isa()


def multiplies_bfloat16() -> bool:
    """Whether the native product multiplies bfloat16 by instructions of its own, which are faster
    than those of float32."""
    return lib is not None and lib.multiplies_bfloat16()


facts = _read_facts()
lib, why_not = _load(facts)
