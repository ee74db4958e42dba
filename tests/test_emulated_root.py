"""inverse_root.cu in emulation: float32 against the accuracy law, float64 against eigh, what a
block without a root gets, bits, races and overruns."""

import functools
import math
import types

import emulation
import matrices
import pytest
import torch
from root_law import law, relative, truth

from shampoo_kernels import inverse_root, use_backend
from shampoo_kernels.ops import roots, small

pytestmark = emulation.needs_compiler
FLOAT32, FLOAT64 = torch.float32, torch.float64
NAN = math.nan


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("root"), "inverse_root")


def arguments(A, p, ridge=1e-6, tensor_cores=False, previous=None, in_place=False, steps=None):
    floor = ridge if A.dtype == FLOAT64 else max(ridge, 1e-6)
    steps = roots.steps_with_reach(floor, p, A.dtype) if steps is None else steps
    sizes = (*A.shape[:2], p, tensor_cores, len(steps), previous is not None, in_place)
    data = emulation.raw(torch.tensor([ridge]).double(), steps.to(A.dtype), A, previous)
    return A.dtype, sizes, data


def root_of(program, A, p, *args, **options):
    """(root, residual, status) as the kernel writes them."""
    shapes = (A.dtype, A.shape), (A.dtype, A.shape[:1]), (torch.int8, A.shape[:1])
    return emulation.call(program, *arguments(A, p, *args, **options), *shapes)


def reference(A, p, **options):
    with use_backend("reference"):
        return inverse_root(A, p, method="newton", **options)


def poisoned(A):
    return A.tril() + torch.full_like(A, NAN).triu(1)


def check_law(program, n, p, names, tensor_cores=False):
    """tf32 numbers split x to 2^-22, four times float32's rounding, which n sums hide at n = 16
    and more but not below: twice the law for tensor cores."""
    made = matrices.families(n)
    names = [name for name in names or made if name in made]
    A = torch.stack([made[name] for name in names]).float()
    root, residual, status = root_of(program, poisoned(A), p, tensor_cores=tensor_cores)
    assert (status == 0).all()
    assert (residual < 0.05).all()
    assert torch.equal(root, root.mT)
    error = relative(root, truth(A, p, 1e-6)[0])
    most = law(A, p, 1e-6, "newton", names) * (2 if tensor_cores else 1)
    assert (error <= most).all(), dict(zip(names, (error / most).tolist(), strict=True))


@pytest.mark.parametrize(
    ("n", "p"), [(1, 2), (2, 4), (17, 1), (17, 2), (17, 3), (17, 4), (17, 13), (33, 4), (48, 2)]
)
def test_ffma_keeps_the_accuracy_law(program, n, p):
    check_law(program, n, p, None)


SOME = ("condition 1e0", "condition 1e4", "condition 1e12", "hilbert", "zero row", "tiny")


@pytest.mark.parametrize(("n", "p"), [(3, 2), (17, 2), (17, 3)])
def test_tensor_cores_keep_the_accuracy_law(program, n, p):
    check_law(program, n, p, SOME, tensor_cores=True)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "p"), [(33, 4), (48, 1)])
def test_tensor_cores_keep_the_accuracy_law_at_larger_sizes(program, n, p):
    check_law(program, n, p, SOME, tensor_cores=True)


@pytest.mark.parametrize("n", [pytest.param(88, marks=pytest.mark.slow), 128])
def test_the_larger_tile(program, n):
    check_law(program, n, 2, ("condition 1e4", "hilbert"))


@pytest.mark.parametrize("n", [1, 5, 36])
def test_float64(program, n):
    made = matrices.families(n)
    A = torch.stack([made[f"condition 1e{k}"] for k in (0, 4, 8)])
    for p in (1, 3):  # the last steps of 3 are no float32 numbers
        root, _, status = root_of(program, A, p, 1e-8)
        exact, kappa = truth(A, p, 1e-8)
        assert status.tolist() == [0, 0, 0]
        error = relative(root, exact)
        assert (error <= 64 * n * 2.0**-53 * kappa / p).all(), error


def bad_blocks(n, dtype):
    eye = torch.eye(n, dtype=dtype)
    nan, inf, indefinite = eye.clone(), eye.clone(), eye.clone()
    nan[n - 1, 0], inf[n - 1, n - 1], indefinite[2, 2] = NAN, math.inf, -0.5
    return torch.stack([torch.zeros_like(eye), nan, inf, -eye, indefinite, 4 * eye])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_a_block_without_a_root(program, tensor_cores):
    A = bad_blocks(5, FLOAT32)
    eye = torch.eye(5)
    root, residual, status = root_of(program, A, 2, tensor_cores=tensor_cores)
    expected = reference(A, 2)
    assert status.tolist() == expected.status.tolist() == [3, 3, 3, 3, 3, 0]
    assert (residual[:4] == math.inf).all()
    assert not residual[4] < 0.05
    torch.testing.assert_close(root[:5], expected.root[:5], rtol=2.0**-22, atol=0)
    torch.testing.assert_close(root[5], eye / 2, rtol=2e-6, atol=0)

    generator = torch.Generator().manual_seed(0)
    previous = torch.randn(6, 5, 5, generator=generator)
    previous[1, 0, 4] = NAN
    for in_place in (False, True):
        got, _, status = root_of(
            program, A, 2, tensor_cores=tensor_cores, previous=previous, in_place=in_place
        )
        assert status.tolist() == [2, 3, 2, 2, 2, 0]
        assert torch.equal(got[[0, 2, 3, 4]], previous[[0, 2, 3, 4]])
        assert torch.equal(got[1], eye)
        assert torch.equal(got[5], root[5])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_bits_depend_on_the_block_alone(program, tensor_cores):
    A = torch.stack([matrices.condition(18, 10.0**k) for k in (1, 3, 5)]).float()
    root = root_of(program, A, 2, tensor_cores=tensor_cores)[0]
    company = torch.stack([torch.full((18, 18), NAN), A[2], A[0]])
    other = root_of(program, company, 2, tensor_cores=tensor_cores)[0]
    assert torch.equal(other[1:], root[[2, 0]])


@functools.cache
def counting():
    """The schedule for 1e-6 and one whose first step alone would spoil everything."""
    steps = roots.steps_with_reach(1e-6, 2, FLOAT32)
    spoilt = steps.clone()
    spoilt[0, :5] = NAN
    return steps, spoilt


def test_a_matrix_leaves_out_the_steps_it_does_not_need(program):
    """The identity comes in at |M - I|_F = 0.04, within reach of a later step than the first, which
    is therefore never looked at; a spectrum down to 1e-6 needs them all."""
    steps, spoilt = counting()
    assert torch.equal(steps[:, 5], steps[:, 5].sort(descending=True).values)
    A = torch.stack([torch.eye(16), matrices.condition(16, 1e6).float()])
    right, _, _ = root_of(program, A, 2, steps=steps)
    wrong, _, status = root_of(program, A, 2, steps=spoilt)
    assert status.tolist() == [0, 3]
    assert torch.equal(wrong[0], right[0])
    torch.testing.assert_close(right[0], torch.eye(16) * (1 + 1.01e-6) ** -0.5, rtol=2e-6, atol=0)


def test_too_large_is_refused(program):
    A = torch.eye(129)[None]
    assert emulation.start(program, *arguments(A, 2)).returncode == 1
    A = torch.eye(97).double()[None]
    assert emulation.start(program, *arguments(A, 2)).returncode == 1


# Bytes of shared memory that a thread block may have (CUDA C++ Programming Guide, table of compute
# capabilities), and the largest n that fits: by multiply-adds, tensor cores, in float64.
LIMITS = {
    "sm_80": (163 << 10, 114, 112, 81),
    "sm_89": (99 << 10, 88, 80, 64),
    "sm_90": (227 << 10, 128, 128, 96),
    "sm_100": (227 << 10, 128, 128, 96),
}


@pytest.mark.parametrize("gpu", LIMITS)
def test_what_fits_which_gpu(program, monkeypatch, gpu):
    """`takes_root` says so: what does not fit goes to the other kernels."""
    limit, *largest = LIMITS[gpu]
    needed = functools.cache(
        lambda n, wide, form: emulation.call(
            program, FLOAT64 if wide else FLOAT32, (n, form), b"", (torch.int64, (1,))
        )[0].item()
    )
    lib = types.SimpleNamespace(inverse_root_small_bytes=needed)
    monkeypatch.setattr(small.native, "lib", lib)
    monkeypatch.setattr(small, "_limit", lambda device: limit)
    forms = (FLOAT32, False), (FLOAT32, True), (FLOAT64, False)
    for (dtype, tensor_cores), most in zip(forms, largest, strict=True):
        monkeypatch.setattr(small, "tensor_cores", lambda n, dtype, form=tensor_cores: form)
        taken = [
            n for n in range(1, 130)
            if small.takes_root(
                types.SimpleNamespace(
                    shape=(4, n, n), dtype=dtype, device=None, is_cuda=True, numel=lambda: 4
                )
            )
        ]  # fmt: skip
        assert taken == list(range(1, most + 1))


# n = 36 takes two warps by multiply-adds, n = 32 three by tensor cores; few steps run all barriers.
SHORT = ([torch.eye(36) + 0.01], False), ([torch.eye(32) + 0.01], True)


def short(case):
    blocks, tensor_cores = case
    steps = roots.steps_with_reach(0.5, 2, FLOAT32)
    return arguments(torch.stack(blocks), 2, tensor_cores=tensor_cores, steps=steps)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    return functools.cache(lambda flags: emulation.build(folder, "inverse_root", flags))


@pytest.mark.parametrize("case", SHORT, ids=["ffma", "tensor cores"])
@pytest.mark.parametrize("flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"])
def test_sanitizers_find_nothing(sanitized, flags, case):
    result = emulation.start(sanitized(flags), *short(case))
    assert result.returncode == 0, result.stderr.decode()


FAULTS = {
    "missing barrier, ffma": ("product_ffma.h", "    __syncthreads();\n", "", 0, "data race"),
    "missing barrier, tensor cores": (
        "product_mma.h", "    __syncthreads();\n", "", 1, "data race",
    ),
    "shared memory": (
        "product_ffma.h", "int rows(int n) { return n; }", "int rows(int n) { return n - 1; }", 0,
        "heap-buffer-overflow",
    ),
    "global memory": (
        "inverse_root.cu", "root[at] = factor", "root[at + 1] = factor", 0, "heap-buffer-overflow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, tmp_path):
    file, right, wrong, case, words = FAULTS[name]
    csrc = emulation.planted(tmp_path, file, right, wrong)
    flags = emulation.THREADS if words == "data race" else emulation.ADDRESSES
    program = emulation.build(tmp_path, "inverse_root", flags, csrc)
    result = emulation.start(program, *short(SHORT[case]))
    assert result.returncode != 0
    assert words in result.stderr.decode()


def test_shared_memory_that_is_not_set_is_found(tmp_path):
    """It is full of NaN: here the padding of n = 17, which tensor cores multiply too."""
    right = "at < 3 * size; at += blockDim.x) X[at] = 0;"
    csrc = emulation.planted(tmp_path, "inverse_root.cu", right, right.replace(" = 0;", ";"))
    program = emulation.build(tmp_path, "inverse_root", csrc=csrc, flags=(*emulation.PLAIN, "-w"))
    _, _, status = root_of(program, torch.eye(17)[None], 2, tensor_cores=True)
    assert status.tolist() == [3]
