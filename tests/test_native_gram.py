"""The native Gram op itself, on every instruction set that runs here: exact integers, error bounds
against float64, zeros over NaN, strides, bits, and the instructions in the library."""

import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from shampoo_kernels import native

if native.lib is None:
    pytest.skip(f"no native kernels: {native.why_not}", allow_module_level=True)

lib = native.lib
ops = torch.ops.shampoo_kernels_native
NAN = math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below, at and above the tiles (6 x 16, 4 x 12, 14 x 32) and the vectors (4, 8, 16).
SIZES = [1, 2, 3, 5, 13, 14, 15, 16, 31, 33, 65, 130]
LAYOUTS = {
    "k contiguous": lambda x: x.contiguous(),
    "n contiguous": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack([x, x * NAN], -1).flatten(-2)[..., ::2],
    "slab contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "offset by one": lambda x: torch.nn.functional.pad(x, (1, 2), value=NAN)[..., 1:-2],
}


@pytest.fixture(params=lib.isas(), autouse=True)
def isa(request):
    before = lib.isa()
    lib.set_isa(request.param)
    yield request.param
    lib.set_isa(before)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(*shape, seed=0):
    """Small enough that every sum is exact in float32."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def poisoned(A):
    """A with NaN above the diagonal."""
    return A.tril() + torch.full_like(A, NAN).triu(1)


def mirrored(A):
    return A.tril() + A.tril(-1).mT


def gram(stat, left, grad=None, beta=0.5, alpha=2.0, beta_tensor=None, alpha_tensor=None):
    grad = left if grad is None else grad
    ops.gram_ema_(stat, left, grad, beta, alpha, beta_tensor, alpha_tensor)
    return stat


def expected(stat, left, grad, beta, alpha):
    product = (left.double() @ grad.double().mT).sum(1)
    return mirrored(beta * stat.double().nan_to_num() + alpha * product)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_integers_is_exact(dtype, layout):
    for n, k in itertools.product(SIZES, (1, 2, 7, 33)):
        G = LAYOUTS[layout](integers(2, 3, n, k).to(dtype))
        stat = poisoned(integers(2, n, n, seed=1)).float()
        want = expected(stat, G, G, 0.5, 2.0)
        assert torch.equal(gram(stat, G).double(), want), (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_over_many_chunks_is_exact(dtype):
    for slabs, n, k in [(1, 33, 1700), (2, 17, 801), (300, 18, 3), (5, 7, 255), (1, 300, 70)]:
        G = integers(1, slabs, n, k).to(dtype)
        stat = poisoned(integers(1, n, n, seed=1)).float()
        want = expected(stat, G, G, 0.5, 2.0)
        assert torch.equal(gram(stat, G).double(), want), (slabs, n, k)


@pytest.mark.parametrize(("left_dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_gram_of_two_operands(left_dtype, grad_dtype):
    W = integers(3, 1, 9, 9, seed=2)
    grad = integers(3, 1, 35, 9)
    left = grad @ (W + W.mT)  # left gradᵀ is symmetric
    stat = poisoned(integers(3, 35, 35, seed=1)).float()
    want = expected(stat, left, grad, 0.5, 2.0)
    got = gram(stat, left.to(left_dtype), grad.to(grad_dtype).mT.contiguous().mT)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 5), (33, 300), (65, 1000)])
def test_gram_error(dtype, n, k):
    """A sum of k float32 products is off by at most about k u |G| |G|ᵀ, u = 2^-24."""
    G = random(2, 1, n, k).to(dtype)
    stat = random(2, n, n, seed=1).float()
    want = expected(stat, G, G, 0.9, 0.1)
    size = expected(stat.abs(), G.abs(), G.abs(), 0.9, 0.1)
    got = gram(stat, G, beta=0.9, alpha=0.1)
    assert torch.equal(got, got.mT)
    assert ((got.double() - want).abs() <= (k + 4) * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [384, 768, 1536])
def test_gram_error_of_long_sums(dtype, k):
    """No sum runs over more than D = 384 products: root mean square over diagonals, where all
    terms have one sign.

    Rounding at random is off by at most u / sqrt(3) of the sum so far, which over D additions makes
    sqrt(D / 3) of that. bf16 products come in pairs, D / 2 additions, but squares of bf16 numbers
    are 0 or 1 modulo 4 of their units, pairs 0, 1 or 2: to round a sum to a multiple of 4, which
    it comes to after some hundred, takes 1/2 off, 1/8 ulp. An ulp being u / ln 2 of the sum on
    average, D / 2 of these make D / 32 / ln 2.
    """
    G = random(2, 1, 65, k).to(dtype)
    got = gram(torch.zeros(2, 65, 65), G, beta=0.0, alpha=1.0)
    want = G[:, 0].double().square().sum(-1)
    error = ((got.diagonal(dim1=1, dim2=2) - want) / want).square().mean().sqrt()
    pairs = dtype == torch.bfloat16
    at_random = math.sqrt(384 / (2 if pairs else 1) / 3) / math.sqrt(3)
    downwards = 384 / 32 / math.log(2) if pairs else 0.0
    assert error <= math.hypot(at_random, downwards) * 2**-24


def test_gram_of_subnormal_bfloat16_numbers(isa):
    """The bf16 pair instructions of a CPU, which serve n > 16, take and give 0 for them; everything
    else is exact."""
    cpu = Path("/proc/cpuinfo")
    has_pairs = isa == "avx512" and "avx512_bf16" in cpu.read_text()
    for numbers in ([2.0**-130, 2.0**100], [2.0**-65, 2.0**-62]):
        for n in (2, 17):
            G = torch.zeros(n, dtype=torch.float64)
            G[:2] = torch.tensor(numbers)
            product = G[0] * G[1]  # of a subnormal number, and subnormal
            got = gram(torch.zeros(1, n, n), G.bfloat16().view(1, 1, n, 1), beta=0.0, alpha=1.0)
            flushed = has_pairs and n == 17
            assert got[0, 1, 0] == got[0, 0, 1] == (0 if flushed else product)


def test_gram_of_special_16_bit_numbers():
    """Every fp16 value converts exactly, subnormals, Inf and NaN included."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).reshape(1, 1, 256, 256)
    for layout in (bits, bits.mT.contiguous().mT):
        G = layout.view(torch.float16)
        one = torch.eye(256).reshape(1, 1, 256, 256)
        got = gram(torch.zeros(1, 256, 256), one, G, beta=0.0, alpha=1.0)
        rows = torch.arange(256)
        mine = torch.isfinite(G[0, 0]).all(1)  # Inf * 0 is NaN: only rows without it come through
        lower = (rows[:, None] >= rows) & mine[None, :]
        assert torch.equal(got[0][lower], G[0, 0].float().mT[lower])
        assert torch.isnan(got[0][~mine[None, :] & (rows[:, None] >= rows)]).all()


@pytest.mark.parametrize("n", [3, 33, 150])
def test_gram_zero_factors_do_not_read(n):
    factors = torch.tensor([[0.0, 2.0], [0.5, 0.0], [0.0, 0.0], [1.0, 0.0], [0.5, 2.0]])
    G = integers(5, 1, n, 4).float()
    stat = mirrored(integers(5, n, n, seed=1)).float()
    beta, alpha = factors[:, 0].clone(), factors[:, 1].clone()
    want = expected(stat, G, G, beta[:, None, None].double(), alpha[:, None, None].double())
    stat[beta == 0] = NAN
    G[alpha == 0] = NAN
    got = gram(stat, G, beta=NAN, alpha=NAN, beta_tensor=beta, alpha_tensor=alpha)
    assert torch.equal(got.double(), want)


def test_gram_one_element_and_strided_factors():
    G, stat = integers(4, 1, 5, 6).float(), integers(4, 5, 5, seed=1).float()
    want = expected(stat, G, G, 0.5, 2.0)
    one = gram(stat.clone(), G, beta_tensor=torch.tensor([0.5]), alpha_tensor=torch.tensor([2.0]))
    assert torch.equal(one.double(), want)
    beta = torch.stack([torch.full((4,), 0.5), torch.full((4,), NAN)], 1)[:, 0]
    assert torch.equal(gram(stat, G, beta_tensor=beta).double(), want)


@pytest.mark.parametrize(
    ("blocks", "slabs", "n", "k"), [(0, 1, 5, 3), (2, 0, 5, 3), (2, 1, 5, 0), (2, 1, 0, 3)]
)
def test_gram_empty(blocks, slabs, n, k):
    stat = poisoned(integers(blocks, n, n, seed=1)).float()
    want = mirrored(0.5 * stat.nan_to_num())
    assert torch.equal(gram(stat, torch.zeros(blocks, slabs, n, k)), want)


def test_gram_expanded_operands_and_padded_stat():
    G = integers(1, 1, 20, 7).float().expand(3, 2, 20, 7)
    whole = torch.full((3, 24, 29), NAN)
    stat = whole[:, 2:22, 3:23]
    stat.copy_(poisoned(integers(3, 20, 20, seed=1)))
    want = expected(stat, G, G, 0.5, 2.0)
    assert torch.equal(gram(stat, G).double(), want)
    whole[:, 2:22, 3:23] = NAN
    assert torch.isnan(whole).all()


def test_gram_bits_do_not_depend_on_company_or_threads():
    """One block per task and one block over all threads, permuted, among garbage: the same bits."""
    threads = torch.get_num_threads()
    n, k = 300, 530  # more than one piece, more than one chunk
    G = random(3, 1, n, k).float()
    stat = random(3, n, n, seed=1).float()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gram(stat.clone(), G))
            alone = [gram(stat[b : b + 1].clone(), G[b : b + 1]) for b in range(3)]
            results.append(torch.cat(alone))
            results.append(gram(stat.flip(0), G.flip(0)).flip(0))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    G[1], stat[2] = NAN, math.inf
    assert torch.equal(gram(stat.clone(), G)[0], results[0][0])


@pytest.mark.parametrize(
    ("stat", "left", "grad", "message"),
    [
        (torch.zeros(2, 4, 4), torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 2), "dimension 3"),
        (torch.zeros(2, 4, 4), torch.zeros(3, 1, 4, 3), torch.zeros(2, 1, 4, 3), "dimension 0"),
        (torch.zeros(2, 4, 5), torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3), "dimension 2"),
        (torch.zeros(2, 4, 4).mT, torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3), "stride"),
        (torch.zeros(2, 4, 4).double(), torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3), "dtype"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 1, 4, 3).int(), torch.zeros(2, 1, 4, 3), "left"),
    ],
)
def test_gram_refuses_what_would_leave_its_memory(stat, left, grad, message):
    with pytest.raises(RuntimeError, match=message):
        gram(stat, left, grad)


def test_set_isa_refuses_unknown_names(isa):
    with pytest.raises(ValueError, match="isas"):
        lib.set_isa("mmx")
    assert lib.isa() == isa


def test_isas():
    """The best comes first; emulated ones are always there for the tests above."""
    assert set(lib.isas()) <= set(lib.build_facts()["isas"])
    assert lib.isas()[-2:] == ["portable", "avx512-generic"]


def test_library_holds_the_instructions():
    """What this machine may be unable to run must at least be there: the AVX-512 tiles are single
    FMA and bf16 product instructions on 64-byte registers."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump to look into the library with")
    if "avx512" not in lib.build_facts()["isas"]:
        pytest.skip("AVX-512 is not built on this architecture")
    command = [objdump, "-d", "--no-show-raw-insn", lib.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction, sums in [("vfmadd231ps.*%zmm", 28), ("vdpbf16ps.*%zmm", 28)]:
        assert len(re.findall(instruction, listing)) >= sums, instruction
    assert len(re.findall("vfmadd231ps.*%ymm", listing)) >= 12
