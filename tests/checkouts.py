"""Peers that are used from a checkout of their repository, not installed; skipped without one."""

import os
import sys
from pathlib import Path

import pytest


def checkout(peer: str) -> Path:
    """The folder in SHAMPOO_KERNELS_PEER_<PEER>, importable; else the test module is skipped."""
    variable = f"SHAMPOO_KERNELS_PEER_{peer.upper()}"
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout of {peer}", allow_module_level=True)
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"{variable} is no folder: {folder}")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    return path
