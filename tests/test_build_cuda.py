"""The CUDA C++ without a GPU: that it builds on any torch, what ptxas made of it (registers, shared
memory, no spills), and that the tensor-core instructions are where they should be."""

import functools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from project import NVCC, ROOT, Project, needs_compiler, needs_nvcc, needs_sources

from shampoo_kernels.ops import small

pytestmark = [needs_sources, needs_nvcc]

REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor


class Intended(NamedTuple):
    """Threads of a block, most registers of a thread, bytes of static shared memory."""

    threads: int
    registers: int
    static_shared: int


# By a part of the mangled name. Registers are what leaves the blocks that shared memory admits: 255
# for one block, 128 where several small ones are to run beside each other.
KERNELS = {
    "eigenvalue_bound_kernelIf": Intended(256, 128, 8320),
    "eigenvalue_bound_kernelId": Intended(256, 128, 8320),
    "inverse_root_kernelIfNS_11FfmaProductIfLi4": Intended(128, 128, 1216),
    "inverse_root_kernelIfNS_11FfmaProductIfLi8": Intended(128, 255, 1216),
    "inverse_root_kernelIdNS_11FfmaProductIdLi4": Intended(288, 168, 1280),
    "inverse_root_kernelIfNS_10MmaProduct": Intended(384, 168, 1216),
    "power_iteration_kernelIfLi1": Intended(256, 128, 4352),
    "power_iteration_kernelIfLi4": Intended(256, 255, 4352),
    "power_iteration_kernelIdLi1": Intended(256, 168, 4352),
    "power_iteration_kernelIdLi4": Intended(256, 255, 4352),
    "orthogonal_iteration_kernelIf": Intended(128, 128, 1088),
    "orthogonal_iteration_kernelId": Intended(128, 128, 2176),
    "11pack_kernel": Intended(256, 64, 0),
    "unpack_apply_kernelIf": Intended(256, 64, 0),
    "unpack_apply_kernelId": Intended(256, 64, 0),
    "write_table_kernel": Intended(256, 32, 0),
    "chunk_squares_kernel": Intended(256, 64, 128),
    "moments_kernelIf": Intended(256, 72, 128),
    "moments_kernelId": Intended(256, 96, 128),
    "sum_chunks_kernelINS_5Piece": Intended(256, 32, 0),
    "sum_chunks_kernelINS_11MomentPiece": Intended(256, 32, 0),
}
ARCHS = [
    pytest.param("80", marks=pytest.mark.slow), "90a", pytest.param("100a", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(arch) -> {name of the .cu file: (cubin, what ptxas -v said)}, two nvcc at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()

    @functools.cache
    def compile_all(arch: str) -> dict[str, tuple[Path, str]]:
        if f"compute_{arch.rstrip('a')}" not in known:
            pytest.skip(f"{NVCC} is too old for sm_{arch}")
        waiting, found = sorted((ROOT / "csrc/cuda").glob("*.cu")), {}
        while waiting:
            pair, waiting = waiting[:2], waiting[2:]
            running = {source: start(source, folder / f"{source.stem}.{arch}", arch)
                       for source in pair}  # fmt: skip
            for source, process in running.items():
                said = process.communicate()[0]
                assert process.returncode == 0, said
                found[source.stem] = folder / f"{source.stem}.{arch}", said
        return found

    return compile_all


def start(source: Path, cubin: Path, arch: str) -> subprocess.Popen:
    command = [NVCC, "-cubin", "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}"]
    command += ["-Xptxas", "-v", str(source), "-o", str(cubin)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def usage(said: str) -> dict[str, tuple[int, int, int, int]]:
    """{kernel: (registers, static shared memory, stack, spilled bytes)} from ptxas -v."""
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?"
    )
    return {
        name: (int(registers), int(shared or 0), int(stack), int(spilled))
        for name, stack, spilled, registers, shared in re.findall(
            pattern,
            re.sub(r"\n(?!ptxas info)", " ", said).replace("\nptxas info    : Used", " Used"),
        )
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_resources_are_as_intended(compiled, arch):
    used = {k: v for _, said in compiled(arch).values() for k, v in usage(said).items()}
    kernels = {k: v for k, v in used.items() if "_kernel" in k}
    assert len(kernels) == len(KERNELS)
    for part, intended in KERNELS.items():
        (found,) = (v for k, v in kernels.items() if part in k)
        registers, shared, stack, spilled = found
        assert (stack, spilled) == (0, 0), (part, found)
        assert registers <= intended.registers, (part, found)
        assert registers * intended.threads <= REGISTER_FILE, (part, found)
        assert shared == intended.static_shared, (part, found)


def test_the_chooser_leaves_room_for_static_shared_memory():
    """test_resources_are_as_intended says that this is what they have."""
    for part, intended in KERNELS.items():
        rooms = {"inverse": small._STATIC, "orthogonal": small._STATIC, "power": 2 * small._STATIC}
        assert intended.static_shared <= rooms.get(part.split("_")[0], 48 << 10), part


def tool(name: str) -> Path:
    triton = pytest.importorskip("triton", reason="nvdisasm comes with triton")
    found = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not found.exists():
        pytest.skip(f"this triton has no {name}")
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_cores_are_used_where_they_should_be(compiled, arch):
    """tf32 products with float32 sums, three for each of two halves of a tile; none elsewhere,
    where float32 products are fused multiply-adds."""
    cubin, _ = compiled(arch)["inverse_root"]
    sass = subprocess.check_output([tool("nvdisasm"), "-c", str(cubin)], text=True)
    parts = re.split(r"\.section\s+\.text\.", sass)[1:]
    counts = {part.split(",")[0]: len(re.findall(r"HMMA\.1688\.F32\.TF32", part)) for part in parts}
    (mma,) = (count for name, count in counts.items() if "MmaProduct" in name)
    assert mma >= 6
    assert all(count == 0 for name, count in counts.items() if "FfmaProduct" in name)
    (ffma,) = (part for part in parts if "FfmaProductIfLi8" in part.split(",")[0])
    assert len(re.findall(r"\bFFMA\b", ffma)) >= 64
    assert "LDS.128" in ffma


@needs_compiler
def test_cuda_on_any_torch(tmp_path):
    project = Project(tmp_path)
    kernel = "__global__ void nothing() {}\n"
    kernel += "int answer() { nothing<<<1, 1>>>(); return cudaGetLastError() != cudaSuccess; }\n"
    project.write("csrc/cuda/answer.cu", kernel)
    (project.root / "csrc/cpu/answer.cpp").unlink()
    output = project.build(SHAMPOO_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX")
    for code in ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"):
        assert f"-gencode=arch={code}" in output
    assert project.facts["cuda_why_not"] is None
    assert project.answer() in (0, 1), "imports; where there is no driver, the launch fails"
    (report,) = (project.root / "build").glob("native-*-cuda/ptxas.txt")
    assert "nothing" in report.read_text()

    output = project.build(SHAMPOO_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True)
    default = [arch for arch in ("80", "90a", "100a") if f"compute_{arch.rstrip('a')}\n" in known]
    codes = [f"compute_{arch},code=sm_{arch}" for arch in default]
    codes.append("compute_{0},code=compute_{0}".format(default[-1].rstrip("a")))
    assert re.findall(r"-gencode=arch=(\S+)", output) == codes
    assert len(re.findall(r"Function properties for \w*nothing", report.read_text())) == len(
        default
    )
