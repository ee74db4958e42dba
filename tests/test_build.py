"""setup.py on a small source tree: what it builds, what it leaves out, and what it says then."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shampoo_kernels import native

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")
SWITCHES = ("SHAMPOO_KERNELS_NATIVE", "SHAMPOO_KERNELS_CUDA", "CXX", "CUDA_HOME", "CUDA_PATH")

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
pytestmark = needs_sources

MODULE = """
#include <Python.h>
#include "answer.h"
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", answer());
  return module;
}
"""
ANSWER = '#include "answer.h"\nint answer() { return ANSWER; }\n'
AVX2 = "#if !defined(__AVX2__) || !defined(__FMA__)\n#error no AVX2\n#endif\n"


class Project:
    """A copy of setup.py beside a module of two files."""

    def __init__(self, root: Path):
        self.root = root
        self.package = root / "shampoo_kernels"
        for path, text in {
            "csrc/bindings.cpp": MODULE,
            "csrc/answer.h": "#define ANSWER 42\nint answer();\n",
            "csrc/cpu/answer.cpp": ANSWER,
            "csrc/cpu/nothing_avx2.cpp": AVX2,
            "shampoo_kernels/__init__.py": "",
            "shampoo_kernels/py.typed": "",
            "README.md": "",
            "LICENSE": "",
        }.items():
            self.write(path, text)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, root)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {k: v for k, v in os.environ.items() if k not in SWITCHES}
        command = [sys.executable, "setup.py", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=kept | environment, capture_output=True, text=True
        )

    def build(self, **environment: str) -> str:
        """Builds in place; returns everything that was printed."""
        result = self.run("build_ext", "--inplace", **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    @property
    def facts(self) -> dict:
        return json.loads((self.package / "_build.json").read_text())

    def answer(self) -> int:
        code = "import torch, shampoo_kernels._C as C; print(C.answer)"
        command = [sys.executable, "-c", code]
        return int(subprocess.check_output(command, cwd=self.root, text=True))


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@needs_compiler
def test_builds_again_only_what_changed(project):
    first = project.build()
    assert first.count(" -c ") == 3
    assert project.answer() == 42
    assert project.facts["native"] is True
    assert project.facts["why_not"] is None

    assert "no work to do" in project.build()

    project.write("csrc/answer.h", "#define ANSWER 43\nint answer();\n")
    again = project.build()
    assert again.count(" -c ") == 2, "the AVX2 file does not include the header"
    assert project.answer() == 43


def test_native_0_makes_a_pure_wheel_that_says_so(project):
    pytest.importorskip("setuptools.command.bdist_wheel")
    result = project.run("bdist_wheel", SHAMPOO_KERNELS_NATIVE="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (project.root / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, project.root / "unpacked", "zip")
    unpacked = project.root / "unpacked/shampoo_kernels"
    assert sorted(p.name for p in unpacked.iterdir()) == ["__init__.py", "_build.json", "py.typed"]
    facts = json.loads((unpacked / "_build.json").read_text())
    assert facts["native"] is False
    assert facts["why_not"] == "SHAMPOO_KERNELS_NATIVE=0 was set"


def test_no_compiler_is_said_and_is_no_error(project):
    output = project.build(CXX="/nonexistent/c++")
    reason = "no C++ compiler (tried /nonexistent/c++): install one, or set CXX"
    assert f"shampoo_kernels: no native kernels: {reason}\n" in output
    assert project.facts == {"native": False, "why_not": reason, "cuda_why_not": reason}


@needs_compiler
def test_a_failing_compile_is_said_and_leaves_no_library(project):
    project.build()
    project.write("csrc/cpu/answer.cpp", "int answer() { return FORTY_TWO; }\n")
    project.build()
    why_not = project.facts["why_not"]
    assert re.fullmatch(r"the build failed: \S*answer\.cpp:1:\d+: error: .*FORTY_TWO.*", why_not)
    assert not list((project.root / "build").glob("lib*/shampoo_kernels/*.so"))


def test_a_compiler_that_says_nothing_still_leaves_a_reason(project):
    project.build(CXX="false")
    why_not = project.facts["why_not"]
    assert re.fullmatch(r"the build failed: FAILED: (\[code=1\] )?\S+\.cpp\.o ?", why_not)


def test_old_setuptools_is_refused_with_the_command_that_helps(project):
    project.write("old/sitecustomize.py", "import setuptools as s; s.__version__ = '65.5.0'")
    result = project.run("build_ext", PYTHONPATH=str(project.root / "old"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "setuptools 65.5.0 is too old: pip install 'torch>=2.11' 'setuptools>=77' ninja" in line


@needs_compiler
def test_forced_means_forced(project):
    project.write("csrc/cpu/answer.cpp", "int answer() { return FORTY_TWO; }\n")
    for environment, words in [
        ({"SHAMPOO_KERNELS_NATIVE": "1"}, "no native kernels: the build failed"),
        ({"SHAMPOO_KERNELS_NATIVE": "1", "CXX": "/nonexistent/c++"}, "no C++ compiler"),
        ({"SHAMPOO_KERNELS_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "no nvcc in /nonexistent/bin"),
        ({"SHAMPOO_KERNELS_CUDA": "1", "SHAMPOO_KERNELS_NATIVE": "0"}, "NATIVE=0 was set"),
        ({"SHAMPOO_KERNELS_NATIVE": "yes"}, "must be 0, 1 or unset, got 'yes'"),
    ]:
        result = project.run("build_ext", "--inplace", **environment)
        assert result.returncode != 0, environment
        last = result.stderr.strip().splitlines()[-1]
        assert words in last
        assert "Traceback" not in result.stderr


@needs_compiler
@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_an_old_torch_is_refused_in_one_line(project, version):
    project.write("old/torch/__init__.py", "raise ImportError('setup.py must not import torch')")
    project.write("old/torch/version.py", f"__version__ = '{version}'\n")
    result = project.run("build_ext", "--inplace", PYTHONPATH=str(project.root / "old"))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert f"torch {version} in " in last
    assert "too old: pip install 'torch>=2.11' 'setuptools>=77' ninja pybind11 first" in last


@needs_nvcc
@needs_compiler
def test_cuda_on_any_torch(project):
    kernel = "__global__ void nothing() {}\n"
    kernel += "int answer() { nothing<<<1, 1>>>(); return cudaGetLastError() != cudaSuccess; }\n"
    project.write("csrc/cuda/answer.cu", kernel)
    (project.root / "csrc/cpu/answer.cpp").unlink()
    output = project.build(SHAMPOO_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX")
    for code in ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"):
        assert f"-gencode=arch={code}" in output
    assert project.facts["cuda_why_not"] is None
    assert project.answer() in (0, 1), "imports; where there is no driver, the launch fails"


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_cuda_kernels_do_not_spill(tmp_path, arch):
    known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()
    if f"compute_{arch.rstrip('a')}" not in known:
        pytest.skip(f"{NVCC} is too old for sm_{arch}")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    assert sources
    for source in sources:
        cubin = tmp_path / f"{source.stem}.cubin"
        command = [NVCC, "-cubin", "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}"]
        command += ["-Xptxas", "-v", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert cubin.read_bytes().startswith(b"\x7fELF")
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
        assert used, "ptxas reports each kernel"
        assert set(used) == {("0", "0")}


def test_native_is_the_library_or_the_reason():
    assert (native.lib is None) != (native.why_not is None)
    if native.lib is not None:
        built = native.lib.build_facts()
        assert built["torch_target"] == "2.11"
        assert (native.facts["cuda_why_not"] is None) == bool(built["cuda_archs"])
        assert native.lib.isa() in native.lib.isas()


def test_native_says_why_not_in_one_line(monkeypatch):
    def fails(name):
        raise ImportError("libtorch_cpu.so: undefined\n  symbol: aoti")

    assert native._load({}) == (None, native.NOT_BUILT)
    lib, why_not = native._load({"native": False, "why_not": "no C++ compiler"})
    assert (lib, why_not) == (None, "not built: no C++ compiler")
    monkeypatch.setattr(native.importlib, "import_module", fails)
    lib, why_not = native._load({"native": True, "torch": "2.12.1"})
    assert lib is None
    assert re.fullmatch(
        r"does not load: libtorch_cpu.so: undefined symbol: aoti"
        r" \(built with torch 2.12.1, this is torch \S+\)",
        why_not,
    )
