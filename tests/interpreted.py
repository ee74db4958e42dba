"""Import this before anything else: Triton kernels run in the interpreter, in this process.

conftest.py keeps the modules that import it out of an ordinary run, where other tests want triton
as it is; test_interpreted.py runs them in a process of their own.
"""

import os
import sys

if os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton is already imported, and not for the interpreter"
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

from shampoo_kernels.kernels import table


@pytest.fixture(params=["descriptor", "pointer"])
def form(request, monkeypatch):
    """Both forms of the kernels, on tiles of 32 x 32 so that few elements make many tiles."""

    def select(target, op, mode, n, k, descriptors):
        form = "descriptor" if descriptors and request.param == "descriptor" else "pointer"
        return table.Row(target, op, (mode,), n, form, 32, 32, 4, 2)

    monkeypatch.setattr(table, "select", select)
    monkeypatch.setattr(table, "target", lambda device: "sm_90")
    return request.param
