"""Builds `shampoo_kernels._C` from csrc/ with ninja. Finds torch, never imports it.

Environment:
    SHAMPOO_KERNELS_NATIVE  0: build nothing (a pure wheel). 1: what cannot be built is an error.
                            Default: what cannot be built is left out, and `info` says why.
    SHAMPOO_KERNELS_CUDA    1: build the CUDA C++ too, or fail. 0: do not.
                            Default: build it when the torch found has CUDA and nvcc is there.
    TORCH_CUDA_ARCH_LIST    default: 8.0;9.0a;10.0a+PTX, as far as nvcc knows them
    CXX, CUDA_HOME, NVCC_CCBIN, MAX_JOBS   as everywhere
"""

import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# With torch in the list, pip takes the setuptools that this torch accepts.
REQUIREMENTS = "pip install 'torch>=2.11' 'setuptools>=77' ninja pybind11"
TORCH_ADVICE = f"{REQUIREMENTS} first, and if this comes again add --no-build-isolation"
if int(setuptools.__version__.split(".")[0]) < 77:  # they cannot read pyproject.toml
    sys.exit(f"shampoo_kernels: setuptools {setuptools.__version__} is too old: {REQUIREMENTS}")

FLAGS = "-O3 -std=c++20 -I$csrc"
CXX_FLAGS = f"{FLAGS} -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mprefer-vector-width=512"
ISA_FLAGS = {"_avx2": AVX2, "_avx512": f"{AVX2} {AVX512}"}  # by the end of the file's name
NVCC_FLAGS = f"{FLAGS} -Xcompiler -fPIC,-fvisibility=hidden"
RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc -MMD -MF $out.d $nvcc_flags -Xptxas -v -c $in -o $out >$out.txt 2>&1 $
      || { cat $out.txt; exit 1; }
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $link
"""


class CannotBuild(Exception):
    """One line: why not, and what would help."""


def switch(name: str) -> bool | None:
    values = {"": None, "0": False, "1": True}
    if (value := os.environ.get(name, "")) not in values:
        sys.exit(f"{name} must be 0, 1 or unset, got {value!r}")
    return values[value]


WANT_NATIVE, WANT_CUDA = switch("SHAMPOO_KERNELS_NATIVE"), switch("SHAMPOO_KERNELS_CUDA")


def leave_out(what: str, reason: CannotBuild, wanted: bool | None) -> str:
    line = f"shampoo_kernels: no {what}: {reason}"
    if wanted:
        sys.exit(line)
    print(line, file=sys.stderr)
    return str(reason)


class Torch(NamedTuple):
    root: Path
    version: str
    has_cuda: bool

    @staticmethod
    def find() -> "Torch":
        """The torch of the environment; pip's build isolation hides it from sys.path only."""
        venv = Path(sys.prefix, "pyvenv.cfg")
        closed = venv.exists() and "system-site-packages = true" not in venv.read_text()
        prefixes = [sys.prefix] if closed else [sys.prefix, sys.base_prefix]
        hidden = [*site.getsitepackages(prefixes), site.getusersitepackages()]
        spec = importlib.util.find_spec("torch")
        spec = spec or importlib.machinery.PathFinder.find_spec("torch", hidden)
        if spec is None or spec.origin is None:
            sys.exit(f"shampoo_kernels: found no torch to build against: {TORCH_ADVICE}")
        root = Path(spec.origin).parent
        text = (root / "version.py").read_text()
        version = re.search(r"__version__ = '(.*?)'", text)[1]
        if [int(x) for x in re.findall(r"\d+", version)[:2]] < [2, 11]:
            sys.exit(f"shampoo_kernels: torch {version} in {root} is too old: {TORCH_ADVICE}")
        return Torch(root, version, has_cuda=bool(re.search(r"^cuda\b.*= '", text, re.M)))


class Cuda(NamedTuple):
    nvcc: str
    lib: str
    archs: list[str]

    @staticmethod
    def find() -> "Cuda":
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        path = f"{home}/bin" if home else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
        if (nvcc := shutil.which("nvcc", path=path)) is None:
            raise CannotBuild(f"no nvcc in {path}: install the CUDA toolkit, or set CUDA_HOME")
        # nvcc may be a wrapper or a link: it knows itself where its libraries are.
        folders = re.findall(r'"-L(.*?)"', run([nvcc, "-dryrun", "-x", "cu", os.devnull]))
        lib = next((x for x in folders if Path(x, "libcudart_static.a").exists()), None)
        if lib is None:
            raise CannotBuild(f"{nvcc} has no libcudart_static.a: install CUDA's cudart-dev")
        archs = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
        if archs == [""]:
            known = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))
            archs = [x for x in ("8.0", "9.0a", "10.0a") if re.sub(r"\D", "", x) in known]
            archs[-1] += "+PTX"
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be like 8.0;9.0a+PTX, got {arch!r}")
        return Cuda(nvcc, lib, archs)

    def codes(self) -> str:
        real = [arch.removesuffix("+PTX").replace(".", "") for arch in self.archs]
        codes = [f"arch=compute_{x},code=sm_{x}" for x in real]
        # PTX of an "a" or "f" target does not run on later GPUs: that of the plain one does.
        ptx = [re.sub(r"\D", "", arch) for arch in self.archs if arch.endswith("+PTX")]
        codes += [f"arch=compute_{x},code=compute_{x}" for x in ptx]
        return " ".join(f"-gencode={code}" for code in codes)


def run(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        lines = result.stdout.strip().splitlines() or ["no output"]
        # The compiler's first error, or else ninja's word on the step that failed.
        patterns = "error:|undefined|fatal", "^FAILED:"
        found = [x for pattern in patterns for x in lines if re.search(pattern, x)]
        raise CannotBuild(f"the build failed: {(found or lines[-1:])[0].strip()}")
    return result.stdout


def find_compiler() -> str:
    if (here := sysconfig.get_platform()) != "linux-x86_64":
        raise CannotBuild(f"the native kernels are for linux-x86_64, this is {here}")
    names = [os.environ.get("CXX")] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise CannotBuild(f"no C++ compiler (tried {', '.join(names)}): install one, or set CXX")
    return compiler


def quote(path: str | Path) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def ninja_file(target: str, compiler: str, torch: Torch, cuda: Cuda | None) -> str:
    pybind11 = importlib.util.find_spec("pybind11")  # most builds of torch carry a copy too
    includes = [Path(pybind11.submodule_search_locations[0], "include")] if pybind11 else []
    includes += [torch.root / "include", Path(sysconfig.get_path("include"))]
    # Headers found by -isystem are not tracked: torch's version in the command line stands in.
    flags = [CXX_FLAGS, STABLE_ABI, f"-DSHAMPOO_TORCH='\"{torch.version}\"'"]
    flags += [f"-isystem {quote(path)}" for path in includes]
    # Linking torch keeps the stream function of a CUDA torch in reach; a CPU torch lacks it, so
    # it is a weak symbol, and on weak symbols alone the linker would drop the library.
    link = ["-Wl,--no-as-needed", f"-L{quote(torch.root / 'lib')}", "-ltorch_cpu -ltorch -lc10"]
    link += ["-Wl,-rpath,'$$ORIGIN/../torch/lib' -pthread"]
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    lines = [f"cxx = {compiler}", f"csrc = {quote(CSRC)}"]
    if cuda:
        flags += [f"-DSHAMPOO_CUDA -DSHAMPOO_CUDA_ARCHS='\"{';'.join(cuda.archs)}\"'"]
        flags += [f"-isystem {quote(cuda.lib)}/../include"]
        link += [f"-L{quote(cuda.lib)} -lcudart_static -lrt -ldl -lpthread"]
        lines += [f"nvcc = {quote(cuda.nvcc)}", f"nvcc_flags = {NVCC_FLAGS} {cuda.codes()}"]
        sources += [*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")]
    lines += [f"flags = {' '.join(flags)}", f"link = {' '.join(link)}", RULES]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.relative_to(CSRC)}.o")
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {objects[-1]}: {rule} " + re.sub(r"([ :$])", r"$\1", str(source)))
        lines += [f"  isa = {isa}" for end, isa in ISA_FLAGS.items() if source.stem.endswith(end)]
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


def compile_all(target: Path, compiler: str, torch: Torch, cuda: Cuda | None) -> None:
    """Objects stay in build/: the next build compiles what has changed."""
    kind = "cuda" if cuda else "cpu"
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(target.name, compiler, torch, cuda))
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    jobs = os.environ.get("MAX_JOBS")
    print(run([*ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]))
    if cuda:  # registers, shared memory and spills of every kernel, as ptxas tells them
        reports = sorted(folder.glob("cuda/*.cu.o.txt"))
        (folder / "ptxas.txt").write_text("".join(report.read_text() for report in reports))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / target.name, target)


class BuildExtension(build_ext):
    """Also writes _build.json into the package: why something is left out, for `info`."""

    def run(self) -> None:
        self.facts = {"native": False, "why_not": WHY_NOT, "cuda_why_not": WHY_NOT}
        package = Path("" if self.inplace else self.build_lib, "shampoo_kernels")
        super().run()
        (package / "_build.json").write_text(json.dumps(self.facts, indent=2) + "\n")

    def build_extensions(self) -> None:
        torch, cuda = Torch.find(), None
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.unlink(missing_ok=True)  # build/ may hold that of an earlier build
        try:
            if WANT_CUDA is False:
                raise CannotBuild("SHAMPOO_KERNELS_CUDA=0 was set")
            if WANT_CUDA is None and not torch.has_cuda:
                raise CannotBuild(f"torch {torch.version} has no CUDA")
            cuda = Cuda.find()
            compile_all(target, COMPILER, torch, cuda)
        except CannotBuild as reason:
            cuda, self.facts["cuda_why_not"] = None, leave_out("CUDA C++", reason, WANT_CUDA)
        try:
            if cuda is None:
                compile_all(target, COMPILER, torch, None)
        except CannotBuild as reason:
            self.facts["why_not"] = leave_out("native kernels", reason, WANT_NATIVE)
        else:
            self.facts |= {"native": True, "torch": torch.version}


class Build(build):
    # build_ext runs when there is nothing to compile too: it writes _build.json.
    sub_commands = [("build_py", build.has_pure_modules), ("build_ext", None)]


COMPILER = WHY_NOT = None
try:
    if WANT_NATIVE is False:
        raise CannotBuild("SHAMPOO_KERNELS_NATIVE=0 was set")
    COMPILER = find_compiler()
except CannotBuild as reason:
    WHY_NOT = leave_out("native kernels", reason, WANT_NATIVE or WANT_CUDA)

setup(
    ext_modules=[Extension("shampoo_kernels._C", [], optional=True)] if COMPILER else [],
    cmdclass={"build": Build, "build_ext": BuildExtension},
)
