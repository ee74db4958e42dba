"""Other packages, where they are installed; where not, their rows are left out and that is said."""

import functools
import importlib
import warnings
from types import ModuleType

PACKAGES = {"pytorch_optimizer": "4.1.0", "heavyball": "3.2.1", "torch_optimizer": "0.3.0"}
_missing: dict[str, str] = {}


@functools.cache
def package(name: str) -> ModuleType | None:
    """The module, or None: `left_out` then has a line about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except ImportError as error:
        _missing[name] = str(error)
        return None
    if name == "heavyball":
        module.utils.compile_mode = None  # a compiler is not part of what is compared
    return module


def left_out() -> list[str]:
    return [
        f"{name} cannot be imported ({why}): its rows are left out; "
        f"pip install {name.replace('_', '-')}=={PACKAGES[name]}"
        for name, why in sorted(_missing.items())
    ]
