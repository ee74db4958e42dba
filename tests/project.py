"""setup.py in a small source tree of its own, for the tests of what it builds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")
SWITCHES = ("SHAMPOO_KERNELS_NATIVE", "SHAMPOO_KERNELS_CUDA", "CXX", "CUDA_HOME", "CUDA_PATH")

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

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
