"""The chooser: what serves what, the two ways to override it, and what it says when it cannot."""

import functools
import math
import subprocess
import sys
import threading
import types

import pytest
import torch

import shampoo_kernels
from shampoo_kernels import chooser, kernels, native
from shampoo_kernels.__main__ import main

built = pytest.mark.skipif(native.lib is None, reason=f"no extension: {native.why_not}")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SHAMPOO_KERNELS_BACKEND", raising=False)


@built
def test_every_row_of_the_table_is_chosen_for_its_dtypes_alone():
    for row in chooser.TABLE:
        if chooser.why_absent(row) is not None:
            continue
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            expected = row.backend if dtype in row.dtypes and row.measured else "reference"
            assert chooser.choose(row.op, row.device, dtype) == expected


@pytest.mark.parametrize("op", chooser.OPS)
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu", "meta"])
def test_other_devices_take_the_reference(op, device):
    assert chooser.choose(op, device, torch.float32) == "reference"


@built
def test_overrides_nest_and_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("SHAMPOO_KERNELS_BACKEND", "reference")
    assert chooser.choose("gram_ema_", "cpu", torch.float32) == "reference"
    with shampoo_kernels.use_backend("native"):
        assert chooser.choose("gram_ema_", "cpu", torch.float32) == "native"
        assert chooser.choose("gram_ema_", "cpu", torch.float64) == "reference"
        with shampoo_kernels.use_backend("reference"):
            assert chooser.choose("gram_ema_", "cpu", torch.float32) == "reference"
    assert chooser.choose("gram_ema_", "cpu", torch.float32) == "reference"


@built
def test_an_override_holds_in_its_own_thread():
    seen = []
    with shampoo_kernels.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(chooser.choose("gram_ema_", "cpu", torch.float32))
        )
        thread.start()
        thread.join()
    assert seen == ["native"]


@built
def test_the_override_reaches_the_kernel():
    """The native op is called, and is not called under an override."""
    calls = []
    original = torch.ops.shampoo_kernels_native.eigenvalue_bound
    A = torch.eye(3)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.ops.shampoo_kernels_native,
            "eigenvalue_bound",
            lambda A: calls.append(1) or original(A),
        )
        shampoo_kernels.eigenvalue_bound(A)
        assert calls == [1]
        with shampoo_kernels.use_backend("reference"):
            shampoo_kernels.eigenvalue_bound(A)
        assert calls == [1]


@pytest.mark.parametrize("name", ["fastest", "", None])
def test_unknown_names(name):
    with (
        pytest.raises(ValueError, match="backend must be one of reference, native, triton"),
        shampoo_kernels.use_backend(name),
    ):
        pass


def test_triton_serves_where_it_is_asked_for(monkeypatch):
    """Not measured yet, so never by default; float64 and other ops take the reference."""
    monkeypatch.setattr(kernels, "why_not", lambda: None)
    rows = [row for row in chooser.TABLE if row.backend == "triton"]
    assert {row.op for row in rows} == {
        "gram_ema_", "kronecker_power_step", "inverse_root", "precondition", "eigenvalue_bound",
        "power_iteration",
    }  # fmt: skip
    for row in rows:
        assert chooser.choose(row.op, "cuda", torch.float32) == "reference"
        assert "not measured yet" in shampoo_kernels.backends()[row.op]["cuda"].reason
        with shampoo_kernels.use_backend("triton"):
            assert chooser.choose(row.op, "cuda", torch.float32) == "triton"
            assert chooser.choose(row.op, "cuda", torch.float64) == "reference"
            assert chooser.choose(row.op, "cpu", torch.float32) == "reference"
            assert shampoo_kernels.backends()[row.op]["cuda"].backend == "triton"
        with shampoo_kernels.use_backend("native"):
            assert chooser.choose(row.op, "cuda", torch.float32) == "reference"
    monkeypatch.setenv("SHAMPOO_KERNELS_BACKEND", "triton")
    assert chooser.choose("gram_ema_", "cuda", torch.float32) == "triton"
    assert chooser.choose("orthogonalize", "cuda", torch.float32) == "reference"


def test_cuda_cpp_serves_where_it_is_asked_for(monkeypatch):
    """As Triton's rows; a second kernel of an op on a device is found behind the first."""
    rows = [row for row in chooser.TABLE if (row.backend, row.device) == ("native", "cuda")]
    assert {row.op for row in rows} == {
        "eigenvalue_bound", "inverse_root", "power_iteration", "orthogonal_iteration", "pack",
    }  # fmt: skip
    monkeypatch.setattr(chooser, "why_absent", lambda row: None)
    monkeypatch.setattr(chooser, "_check_present", lambda *_: None)
    for row in rows:
        assert not row.measured
        assert chooser.choose(row.op, "cuda", torch.float32) == "reference"
        assert "native is not measured yet" in shampoo_kernels.backends()[row.op]["cuda"].reason
        with shampoo_kernels.use_backend("native"):
            assert chooser.choose(row.op, "cuda", torch.float32) == "native"
            served = shampoo_kernels.backends()[row.op]["cuda"]
            assert served.backend == "native"
            assert "not measured" in served.reason
        with shampoo_kernels.use_backend("triton"):
            assert chooser.choose(row.op, "cuda", torch.float64) == "reference"


@pytest.mark.parametrize("op", ["inverse_root", "power_iteration"])
def test_what_cuda_cpp_does_not_take_goes_to_triton(monkeypatch, op):
    """Once both are measured: small matrices are CUDA C++'s where it is built, the rest Triton's,
    and everything where it is not."""
    rows = [row._replace(measured=True) for row in chooser.TABLE if (row.op, row.device) ==
            (op, "cuda")]  # fmt: skip
    monkeypatch.setitem(chooser._ROWS, (op, "cuda"), rows)
    monkeypatch.setattr(chooser, "why_absent", lambda row: None)
    monkeypatch.setattr(chooser, "_check_present", lambda *_: None)
    choose = functools.partial(chooser.choose, op, "cuda")
    assert choose(torch.float32) == "native"
    assert choose(torch.float32, but="native") == "triton"
    assert choose(torch.float64, but="native") == "reference"
    with shampoo_kernels.use_backend("native"):
        assert choose(torch.float32, but="native") == "reference"
    with shampoo_kernels.use_backend("triton"):
        assert choose(torch.float32) == "triton"
    monkeypatch.setattr(
        chooser, "why_absent", lambda row: "no" if row.backend == "native" else None
    )
    assert choose(torch.float32) == "triton"


@pytest.mark.parametrize(("method", "fits", "expected"), [
    ("newton", True, "native"), ("newton", False, "triton"), ("product", True, "triton"),
    ("eigh", True, "triton"),  # which it leaves to torch
])  # fmt: skip
def test_small_roots_on_a_gpu_are_cuda_cpps(monkeypatch, method, fits, expected):
    from shampoo_kernels.ops import inverse_root, roots

    found = []
    A = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    monkeypatch.setattr(inverse_root, "choose_for", lambda op, A, but=None:
                        "native" if but is None else "triton")  # fmt: skip
    monkeypatch.setattr(inverse_root.small, "takes_root", lambda A: fits)
    monkeypatch.setattr(roots, "compute", lambda method, backend, *_: found.append(backend))
    inverse_root.compute_(None, None, None, A, 2.0, method=method)
    assert found == [expected]


@built
def test_cuda_cpp_that_is_not_there_says_why():
    row = next(row for row in chooser.TABLE if (row.backend, row.device) == ("native", "cuda"))
    why = chooser.why_absent(row)
    if native.lib.build_facts()["cuda_archs"]:
        assert (why is None) == torch.cuda.is_available()
    else:
        assert why.startswith("CUDA C++ is not built: ")


def test_the_package_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import shampoo_kernels, torch\n"
        "shampoo_kernels.gram_ema_(torch.zeros(2, 2), torch.ones(2, 3), 0.0, 1.0, side='left')\n"
        "assert not any(m.startswith('shampoo_kernels.kernels.') for m in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_backend_that_is_absent_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no GPU")
    with (
        pytest.raises(RuntimeError, match="triton backend is absent: there is no GPU"),
        shampoo_kernels.use_backend("triton"),
    ):
        pass
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "why_not", "no compiler was found")
    with (
        pytest.raises(RuntimeError, match="native backend is absent: no compiler was found"),
        shampoo_kernels.use_backend("native"),
    ):
        pass
    assert chooser.choose("gram_ema_", "cpu", torch.float32) == "reference"
    assert "no compiler was found" in shampoo_kernels.backends()["gram_ema_"]["cpu"].reason


def test_backends_names_every_op_and_device():
    table = shampoo_kernels.backends()
    assert set(table) == set(chooser.OPS)
    for row in table.values():
        assert set(row) == {"cpu", "cuda", "other"}
        assert all(served.backend in chooser.BACKENDS and served.reason for served in row.values())


@built
def test_results_do_not_depend_on_the_choice_beyond_rounding():
    grad = torch.randn(3, 20, 30)
    stats = []
    for name in ("reference", "native"):
        with shampoo_kernels.use_backend(name):
            stats.append(shampoo_kernels.gram_ema_(torch.zeros(3, 20, 20), grad, 0, 1, side="left"))
    bound = 30 * 2.0**-24 * (grad.abs() @ grad.abs().mT) * math.sqrt(2)
    assert ((stats[0] - stats[1]).abs() <= bound).all()


def test_a_wrong_environment_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("SHAMPOO_KERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="SHAMPOO_KERNELS_BACKEND must be one of"):
        shampoo_kernels.eigenvalue_bound(torch.eye(2))
    assert main(["info"]) == 1
    assert "SHAMPOO_KERNELS_BACKEND must be one of" in capsys.readouterr().err
