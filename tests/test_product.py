"""The product kernel in the interpreter: a*I + b*C + c*A@B against float64."""

import ast
import importlib
import inspect
import pkgutil

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import pytest
import torch
from interpreted import form  # noqa: F401

from shampoo_kernels import kernels
from shampoo_kernels.kernels import launch, table
from shampoo_kernels.kernels.product import product

SHAPES = [(1, 1, 1), (2, 40, 3), (33, 65, 40), (64, 32, 96), (70, 100, 129)]
SIXTEEN = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
pytestmark = pytest.mark.usefixtures("form")


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def column(x):
    return torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1)


def exact(A, B, a=0.0, b=0.0, c=1.0, C=None):
    """(D, its error bound): k + 4 roundings of the sum of the absolute values."""
    A, B = A.double(), B.double()
    C = torch.zeros(1, dtype=torch.float64) if C is None else C.double()
    eye = torch.eye(A.shape[-2], B.shape[-1], dtype=torch.float64)
    a, b, c = column(a), column(b), column(c)
    D = a * eye + b * C + c * (A @ B)
    size = a.abs() * eye + (b * C).abs() + c.abs() * (A.abs() @ B.abs())
    return D, (A.shape[-1] + 4) * 2.0**-24 * size + 1e-40


def assert_close(D, expected, extra=0.0):
    value, bound = expected
    assert ((D.double() - value).abs() <= bound + extra * value.abs()).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(m, n, k, dtype):
    A, B, C, D = draw(3, m, k, dtype=dtype), draw(3, k, n, seed=1, dtype=dtype), draw(3, m, n), None
    D = poisoned(3, m, n)
    product(A, B, D, op="product", a=2.0, b=-0.5, c=0.25, C=C)
    assert_close(D, exact(A, B, 2.0, -0.5, 0.25, C))
    product(A, B, D, op="product")
    assert_close(D, exact(A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", ["", "A", "B", "AB"])
@pytest.mark.parametrize("sizes", [(24, 40, 48), (33, 65, 41)])
def test_transposed_operands(transposed, dtype, sizes):
    m, n, k = sizes
    A, B, D = draw(2, m, k, dtype=dtype), draw(2, k, n, seed=1, dtype=dtype), poisoned(2, m, n)
    X = A.mT.contiguous().mT if "A" in transposed else A
    Y = B.mT.contiguous().mT if "B" in transposed else B
    product(X, Y, D, op="product")
    assert_close(D, exact(A, B))


def test_other_strides():
    """Steps in every dimension, expanded blocks, a padded result: nothing else is written."""
    A, B = draw(4, 40, 36), draw(4, 36, 44, seed=1)
    wide = poisoned(8, 80, 108)
    wide[::2, ::2, ::3] = A
    D = torch.full((4, 48, 64), 7.0)
    product(wide[::2, ::2, ::3], B, D[:, :40, 8:52], op="product")
    assert_close(D[:, :40, 8:52], exact(A, B))
    D[:, :40, 8:52] = 7.0
    assert (D == 7.0).all()
    D = poisoned(4, 40, 44)
    product(A[:1].expand(4, -1, -1), B, D, op="product")
    assert_close(D, exact(A[:1], B))


def test_stacks_of_stacks():
    """(O, B, m, n) with any outer stride: two products whose operands overlap, in one launch."""
    S, masters = draw(3, 2, 40, 40), draw(2, 2, 40, 40, seed=1)
    other, halves = masters.clone(), torch.zeros(3, 2, 40, 40, dtype=torch.float16)
    product(S[:2], S[1:], masters, op="product", b=0.5, C=masters, D16=halves[::2], scale16=4.0)
    assert_close(masters.flatten(0, 1), exact(S[:2].flatten(0, 1), S[1:].flatten(0, 1),
                                              b=0.5, C=other.flatten(0, 1)))  # fmt: skip
    assert ((halves[::2] - 4 * masters).abs() <= 2.0**-10 * (4 * masters).abs() + 1e-6).all()
    assert (halves[1] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 100])
def test_symmetric_in_place(n):
    """Reads the lower triangle only, writes both, exactly symmetric, for A@B that is so in exact
    arithmetic only."""
    G, W = draw(2, n, 50), draw(2, 50, 50, seed=1)
    left = G @ (W + W.mT)
    old = draw(2, n, n, seed=2)
    old = old + old.mT
    S = old.tril() + poisoned(n, n).triu(1)
    product(left, G.mT, S, op="gram_ema_", b=0.9, c=-0.1, C=S, symmetric=True)
    assert torch.equal(S, S.mT)
    value, bound = exact(left, G.mT, b=0.9, c=-0.1, C=old)
    assert_close(S.tril(), (value.tril(), bound))


def test_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    G = torch.randint(-8, 9, (2, 70, 90), generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for symmetric in (False, True):
            D = poisoned(2, 70, 70)
            product(G.to(dtype), G.to(dtype).mT, D, op="gram_ema_", symmetric=symmetric)
            assert torch.equal(D, (G @ G.mT).float())


def test_zero_factors_read_nothing():
    A, B, C, nan = draw(2, 40, 40), draw(2, 40, 40), draw(2, 40, 40), poisoned(2, 40, 40)
    for zero in (0.0, torch.zeros(1), torch.zeros(2)):
        D = poisoned(2, 40, 40)
        product(A, B, D, op="newton", b=zero, c=2.0, C=nan)
        assert_close(D, exact(A, B, c=2.0))
        product(nan, nan, D, op="newton", a=1.0, b=0.5, c=zero, C=C)
        assert torch.equal(D, 0.5 * C + torch.eye(40))
        nan.copy_(C.tril() + poisoned(40, 40).triu(1))
        product(None, None, D, op="newton", b=0.5, c=0.0, C=nan, symmetric=True)
        assert torch.equal(D, 0.5 * (C.tril() + C.tril(-1).mT))
        nan.fill_(torch.nan)


def test_factors_per_block():
    A, B, C = draw(3, 40, 20), draw(3, 20, 40), draw(3, 40, 40)
    a, b, c = (
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([0.5, 0.0, 1.0]),
        torch.tensor([1.0, 2, 0]),
    )
    A[2], C[1] = torch.nan, torch.nan
    D = poisoned(3, 40, 40)
    product(A, B, D, op="newton", a=a, b=b, c=c, C=C)
    A[2], C[1] = 0, 0
    assert_close(D, exact(A, B, a, b, c, C))
    strided = torch.stack([c, torch.full_like(c, torch.nan)], 1)[:, 0]
    product(A, B, D, op="newton", a=1.0, b=torch.ones(1), c=strided, C=C)
    assert_close(D, exact(A, B, 1.0, 1.0, c, C))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("symmetric", [False, True])
def test_second_output(dtype, symmetric):
    A, D, D16 = draw(2, 70, 40), poisoned(2, 70, 70), poisoned(2, 70, 70, dtype=dtype)
    product(A, A.mT, D, op="newton", D16=D16, scale16=0.25, symmetric=symmetric)
    # the interpreter truncates where hardware rounds to nearest
    assert ((D16.double() - 0.25 * D.double()).abs() <= 2 * SIXTEEN[dtype] * (0.25 * D).abs()).all()
    if symmetric:
        assert torch.equal(D16, D16.mT)


def test_16_bit_results_and_third_operands():
    A, B, C = draw(2, 40, 40), draw(2, 40, 40), draw(2, 40, 40, dtype=torch.float16)
    D = poisoned(2, 40, 40, dtype=torch.float16)
    product(A, B, D, op="product", b=2.0, C=C)
    assert_close(D, exact(A, B, b=2.0, C=C), extra=2.0**-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_measures(symmetric):
    A, D = draw(3, 70, 40), poisoned(3, 70, 70)
    measured = product(A, A.mT, D, op="newton", measure="distance", symmetric=symmetric)
    assert torch.equal(measured.amax(1), (D - torch.eye(70)).abs().amax((1, 2)))
    A[1, 69, 3] = torch.nan
    measured = product(A, A.mT, D, op="newton", measure="distance", symmetric=symmetric)
    assert measured.amax(1).isinf().tolist() == [False, True, False]
    if not symmetric:
        A[1] = 0
        measured = product(A, A.mT, D, op="precondition", measure="squares").double().sum(1)
        torch.testing.assert_close(measured, D.double().square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "k"), [((0, 4, 4), 3), ((2, 0, 4), 3), ((2, 4, 0), 3), ((2, 4, 4), 0)]
)
def test_empty(shape, k):
    batch, m, n = shape
    C, D = draw(*shape), poisoned(*shape)
    measured = product(draw(batch, m, k), draw(batch, k, n), D, op="product", b=2.0, C=C,
                       measure="squares")  # fmt: skip
    assert torch.equal(D, 2 * C)
    assert measured.shape[0] == batch


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN
def test_a_block_depends_on_it_alone():
    A, B = draw(5, 40, 70), draw(5, 70, 40, seed=1)
    D, with_garbage = poisoned(5, 40, 40), poisoned(5, 40, 40)
    product(A, B, D, op="product")
    A[::2], B[::2] = torch.nan, torch.inf
    product(A, B, with_garbage, op="product")
    assert torch.equal(with_garbage[1::2], D[1::2])


@pytest.mark.parametrize("mode", [mode for mode in table.MODES if mode != "16-bit"])
def test_modes_round_the_operands_they_say(mode):
    """What the interpreter can say of a mode: float32 operands are rounded to the mode's dtype and
    their products summed in float32. The splitting in three or six products is tl.dot's own."""
    dtype, _ = table.MODES[mode]
    A, B, D = draw(1, 33, 50), draw(1, 50, 40), poisoned(1, 33, 40)
    product(A, B, D, op="gram_ema_", precision=mode)
    assert_close(D, exact(truncated(A, dtype), truncated(B, dtype)))


def truncated(x, dtype):
    """Rounded as the interpreter does it: bfloat16 towards zero."""
    if dtype == torch.bfloat16:
        return (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def test_words_never_mean_tf32():
    """float32 operands meet plain tf32, or tl.dot's default, only where a caller names it."""
    for words in table.WORDS.values():
        assert set(words) == {"highest", "high", "medium"}
        assert "tf32" not in words.values()
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for word in ("highest", "high"):
            mode = table.mode(torch.float32, torch.float32, word, target)
            assert table.MODES[mode][1] in ("ieee", "tf32x3", "bf16x3", "bf16x6")
    found = 0
    for info in pkgutil.iter_modules(kernels.__path__, "shampoo_kernels.kernels."):
        for call in ast.walk(ast.parse(inspect.getsource(importlib.import_module(info.name)))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.dot", "tl.dot_scaled"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("input_precision") in ("'ieee'", "PRECISION"), ast.unparse(call)
                found += 1
    assert found >= 5


def test_64_bit_offsets():
    """A stack of more than 2^31 elements, of which a page or two is touched."""
    n = 48000
    storage = torch.empty(n * n, dtype=torch.float16)  # 4.6 GB of address space, not of memory
    A = storage.as_strided((1, 33, 8), (n * n, n * 1400, 1))
    A.copy_(draw(1, 33, 8))
    D = poisoned(1, 33, 33)
    product(A, A.mT, D, op="gram_ema_", symmetric=True)
    assert_close(D, exact(A, A.mT))


def test_blocks_far_apart():
    """More than 2^31 elements from one block to the next, of every operand and result."""
    far = 2**31 + 48  # also a multiple of 16 bytes, for descriptors
    A, C, D = (torch.empty(far + 4096, dtype=torch.float16).as_strided((2, 32, 32), (far, 32, 1))
               for _ in range(3))  # fmt: skip
    A.copy_(draw(2, 32, 32))
    C.copy_(draw(2, 32, 32, seed=1))
    product(A, A, D, op="product", b=2.0, C=C)
    assert_close(D, exact(A, A, b=2.0, C=C), extra=2.0**-10)


def test_any_number_of_blocks():
    """The grid has one dimension: the others end at 65,535."""
    X = torch.empty(1, 1, 1).expand(100_000, 40, 40)
    rest = {"C": None, "D16": None, "scale16": 1.0, "measure": None, "precision": "highest"}
    ready = launch.prepare(X, X, X, op="product", a=0.0, b=0.0, c=1.0, symmetric=True, **rest)
    assert ready.grid == (300_000,)


def test_descriptors_get_aligned_strides():
    """16 bytes and multiples of each other, whatever stands where there is one block or one row."""
    x = torch.empty(8, 1, 40)[:1].as_strided((1, 1, 1, 40), (7, 3, 5, 1))
    assert launch._strides(x) == [48, 48, 48, 1]
    x = torch.empty(3, 2, 24, 40)
    assert launch._strides(x) == [1920, 960, 40, 1]
    assert launch._strides(x[:1]) == [1920, 960, 40, 1]
    assert launch._strides(x[:, :1]) == [1920, 960, 40, 1]


def test_launches_share_one_kernel():
    """Factors, sizes and strides are arguments: what a step changes compiles nothing."""
    A, D = draw(2, 64, 64), poisoned(2, 64, 64)
    metas = [
        launch.prepare(A, A, D, op="newton", a=a, b=b, c=c, C=D, D16=None, scale16=1.0,
                       symmetric=True, measure=None, precision="highest").meta
        for a, b, c in ((0.0, 1.0, 0.5), (2.0, 0.9, 0.1))
    ]  # fmt: skip
    assert metas[0] == metas[1]
