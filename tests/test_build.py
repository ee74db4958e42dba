"""setup.py on a small source tree: what it builds, what it leaves out, and what it says then."""

import json
import re
import shutil

import pytest
from project import Project, needs_compiler, needs_sources

from shampoo_kernels import native

pytestmark = needs_sources


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
