"""inverse_root by the Triton kernels: the drivers on an emulated product kernel, which rounds as a
GPU does, under the laws of test_inverse_root.py; and in the interpreter, which must agree."""

import functools

import emulated_product
import interpreted  # noqa: F401  (before triton: it chooses the interpreter)
import matrices
import pytest
import test_inverse_root as laws
import torch
from alive import Alive, NoWaiting
from interpreted import form  # noqa: F401
from test_graphs import FakeDevice

from shampoo_kernels import RootStatus, inverse_root
from shampoo_kernels.kernels import eigenvalue_bound as bound_kernels
from shampoo_kernels.kernels import graphs, product
from shampoo_kernels.kernels import inverse_root as kernels
from shampoo_kernels.ops import eigenvalue_bound as bound_op
from shampoo_kernels.ops import inverse_root as op
from shampoo_kernels.ops import roots

CASES = [("newton", p) for p in (1, 2, 3, 4)] + [("product", p) for p in (1, 2, 4)]
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Everything by the drivers, on the emulated kernel unless a test asks for the interpreter."""
    monkeypatch.setattr(op, "choose_for", lambda *_: "triton")
    monkeypatch.setattr(kernels, "multiply", emulated_product.product)
    return "triton"


@pytest.fixture
def interpreter(form, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kernels, "multiply", product.product)


@pytest.mark.parametrize("n", [1, 2, 33, 128])
@pytest.mark.parametrize("ridge", [1e-3, 1e-6])
@pytest.mark.parametrize(("method", "p"), CASES)
def test_accuracy_law_in_float32(method, p, n, ridge):
    A = laws.stack(n)[1]
    expected, _ = laws.truth(A, p, ridge)
    result = inverse_root(A, p, ridge=ridge, method=method)
    assert (result.status == RootStatus.CONVERGED).all()
    assert torch.equal(result.root, result.root.mT)
    error = laws.relative(result.root, expected)
    assert (error <= laws.law_of_families(n, p, ridge, method)).all()


@pytest.mark.parametrize("p", [5, 6, 7, 12, 64])
def test_other_roots_in_the_m_form(p):
    """Each pattern of bits of p: h is squared, and multiplied to M where p has one."""
    test_accuracy_law_in_float32("newton", p, 33, 1e-3)


@functools.cache
def low_precision_errors(precision, p, n, ridge):
    A = laws.stack(n)[1]
    result = inverse_root(A, p, ridge=ridge, method="product", precision=precision)
    return result, laws.relative(result.root, laws.truth(A, p, ridge)[0])


@pytest.mark.parametrize("n", [2, 33, 128])
@pytest.mark.parametrize("ridge", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_low_precision_operands_converge_on_every_family(precision, p, ridge, n):
    """Error at most 4 u sqrt(kappa), twice that for p = 1: the root X is of size sqrt(1/ridge) for
    p = 2, and each of its entries was rounded. Measured: 0.3 to 1.5 u sqrt(kappa)."""
    if (precision, ridge) == ("medium", 1e-6):
        pytest.skip("inverse_root asks for more")
    dtype = kernels.arithmetic("product", n, p, ridge, precision)
    result, error = low_precision_errors(precision, p, n, ridge)
    assert (result.status == RootStatus.CONVERGED).all(), result.residual.max()
    assert torch.equal(result.root, result.root.mT)
    unit = UNITS.get(dtype, 2.0**-24)
    kappa = laws.truth(laws.stack(n)[1], p, ridge)[1]
    most = (2 if p == 1 else 1) * 4 * unit * kappa.sqrt()
    if dtype == "float32":
        most = laws.law_of_families(n, p, ridge, "product")
    assert (error <= most).all(), (error / most).max()


def test_arithmetic_is_never_worse_than_asked():
    order = ["bfloat16", "float16", "float32"]
    least = {"highest": "float32", "high": "float16", "medium": "bfloat16"}
    for precision, dtype in least.items():
        for p in (1, 2, 4):
            for floor in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.1):
                chosen = kernels.arithmetic("product", 256, p, floor, precision)
                assert order.index(chosen) >= order.index(dtype)
    assert kernels.arithmetic("newton", 64, 2, 1e-4, "high") == "high"
    assert kernels.arithmetic("newton", 64, 2, 1e-6, "high") == "highest"


@pytest.mark.parametrize(("form", "method", "p", "precision"), [
    ("descriptor", "newton", 2, "high"), ("pointer", "newton", 3, "highest"),
    ("descriptor", "product", 4, "high"), ("pointer", "product", 2, "high"),
    ("pointer", "product", 1, "high"), ("descriptor", "product", 2, "highest"),
], indirect=["form"])  # fmt: skip
def test_the_interpreter_agrees(monkeypatch, interpreter, method, p, precision):
    """The same numbers but for the order of sums: closer than the root is to the truth."""
    A = torch.stack([matrices.condition(36, 1e2), matrices.low_rank(36, 3)]).float()
    A = torch.cat([A, torch.full((1, 36, 36), torch.nan)]).tril()
    options = {"ridge": 1e-2, "method": method, "precision": precision}
    result = inverse_root(A, p, **options)
    monkeypatch.setattr(kernels, "multiply", emulated_product.product)
    expected = inverse_root(A, p, **options)
    assert torch.equal(result.status, expected.status)
    assert torch.equal(result.root, result.root.mT)
    low = method == "product" and precision == "high"
    unit = 4 * UNITS["float16"] if low else 64 * 2.0**-24  # each is that far from the truth
    size = expected.root.abs().amax((1, 2), keepdim=True)
    kappa = 1e2 ** (0.5 if method == "product" else 1)
    assert ((result.root - expected.root).abs() <= unit * kappa * size).all()
    torch.testing.assert_close(result.residual, expected.residual, rtol=0.5, atol=1e-3)


@pytest.mark.parametrize("method", ["newton", "product"])
@pytest.mark.parametrize("name", [
    "test_previous_is_kept", "test_slightly_indefinite_blocks_are_ordinary",
    "test_a_block_depends_on_itself_alone", "test_only_the_lower_triangle_is_read",
])  # fmt: skip
def test_the_laws_of_the_op(backend, method, name):
    getattr(laws, name)(backend, method)


@pytest.mark.parametrize("method", ["newton", "product"])
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (3, 3), (2, 2, 3, 3), (1, 1)])
def test_shapes(backend, method, shape):
    laws.test_shapes(backend, method, shape)


def test_fallback_to_eigh(backend):
    laws.test_an_iteration_falls_back_to_eigh()


@pytest.mark.parametrize("method", ["newton", "product"])
def test_bad_blocks_fail_alone(backend, method):
    laws.test_bad_blocks_fail_alone(backend, method, torch.float32)


def test_chunks_do_not_change_a_bit(monkeypatch):
    A = torch.stack([matrices.condition(20, 10.0**k) for k in (1, 2, 3, 4, 5)]).float()
    whole = inverse_root(A, 2, method="newton")
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 2 * 4 * 20 * 20)
    assert [part.stop - part.start for part in kernels.chunks(5, 20)] == [2, 2, 1]
    assert torch.equal(inverse_root(A, 2, method="newton").root, whole.root)
    assert kernels.chunks(3, 100_000) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert kernels.chunks(0, 4) == []


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize(("method", "p"), CASES)
def test_workspace(monkeypatch, method, p, previous, precision, batch):
    """At most four stacks beside the result, from the op's first tensor to its last; a block more
    for what belongs to all of a stack."""
    n = 48
    A = matrices.condition(n, 1e3).float().repeat(batch, 1, 1)
    bound = torch.ones(batch)
    monkeypatch.setattr(roots, "_bound", lambda A: (bound[: len(A)], bound[: len(A)] > 0, bound))
    arithmetic = [kernels.arithmetic(method, n, p, 1e-3, precision)]

    def uncounted(*arguments, **options):
        with torch.utils._python_dispatch._disable_current_modes():
            return emulated_product.product(*arguments, **options)

    monkeypatch.setattr(kernels, "multiply", uncounted)
    old = torch.eye(n).repeat(batch, 1, 1) if previous else None
    results = torch.empty_like(A), torch.empty(batch), torch.empty(batch, dtype=torch.int8)
    with Alive() as alive:
        roots.compute(method, "triton", A, p, 1e-3, 1e-3, None, old, *results, precision)
    assert (results[2] == RootStatus.CONVERGED).all(), arithmetic
    small = 64 * batch * 8  # vectors of a few numbers per block
    assert 3 * A.nbytes < alive.peak <= 4 * A.nbytes + small, alive.peak / A.nbytes


def test_what_the_workspace_test_counts():
    """Bytes alive at the same time, of new storages alone: views and old tensors count nothing."""
    old = torch.zeros(100)
    with Alive() as alive:
        x = old + 1
        y = x[:50].view(5, 10)
        del x
        assert alive.now == 400
        del y
        assert alive.now == 0
        (old + 1) * 2
    assert alive.peak == 800


@pytest.mark.parametrize("method", ["newton", "product"])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("exponent", [-146, -135, -126, -60, 60, 120, 127])
def test_every_scale(method, p, exponent):
    """Powers of two change nothing but the power of the root, down to bounds whose inverse is no
    float32. Near 2^-149 a bound has few bits and rounds up by as much as its last: the ridge is a
    multiple of what it then is, in the truth as well."""
    A = torch.eye(8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(1, 0).T
    A = A @ A / 8  # multiples of 1/8, a bound below 2
    scaled = (A.double() * 2.0**exponent).float()
    assert torch.equal(scaled.double(), A.double() * 2.0**exponent)
    result, one = (inverse_root(x, p, ridge=1e-3, method=method) for x in (scaled, A))
    assert result.status == RootStatus.CONVERGED
    expected = one.root.double() * 2.0 ** (-exponent / p)
    if exponent >= -120:
        assert laws.relative(result.root, expected) < 1e-5
    assert laws.relative(result.root, laws.truth(scaled, p, 1e-3)[0]) < 1e-4


def test_float16_never_overflows(monkeypatch):
    """At the smallest floors X passes 65504: it is scaled down by powers of two."""
    monkeypatch.setattr(kernels, "arithmetic", lambda *_: "float16")
    A = matrices.condition(16, 10.0).float()
    result = inverse_root(A, 2, ridge=0.0, design_floor=1e-12, method="product", precision="high")
    assert result.status == RootStatus.CONVERGED
    assert laws.relative(result.root, laws.truth(A, 2, 0.0)[0]) < 0.05


@pytest.mark.parametrize("method", ["newton", "product"])
def test_a_refresh_by_a_graph(monkeypatch, method):
    """The same bits as without one, for new numbers and with `previous`, NaN blocks and all."""
    monkeypatch.setattr(graphs, "cache", graphs.Cache(FakeDevice()))
    A = torch.stack([matrices.condition(20, 10.0**k) for k in (1, 2, 3)]).float()
    bad, old = A.clone(), torch.eye(20).repeat(3, 1, 1)
    bad[1, 3, 3] = torch.nan
    for x, previous in ((A, None), (bad, None), (2 * A, None), (bad, old), (A, old)):
        options = {"ridge": 1e-3, "method": method, "previous": previous}
        monkeypatch.delenv("SHAMPOO_KERNELS_GRAPHS", raising=False)
        expected = inverse_root(x, 2, **options)
        monkeypatch.setenv("SHAMPOO_KERNELS_GRAPHS", "1")
        result = inverse_root(x, 2, **options)
        assert all(torch.equal(y, z) for y, z in zip(result, expected, strict=True))
    assert (graphs.cache.device.captures, graphs.cache.device.replays) == (2, 5)
    inverse_root(A, 2, ridge=1e-4, method=method)
    inverse_root(A, 4, ridge=1e-3, method=method)
    assert graphs.cache.device.captures == 4


def test_the_bound_is_of_the_same_backend(monkeypatch):
    """Where the roots are Triton's, one launch of its bound serves the whole stack."""
    launches, launch = [], bound_kernels.run
    monkeypatch.setattr(bound_op, "choose_for", lambda *_: "triton")
    monkeypatch.setattr(
        bound_kernels, "run", lambda kernel, *rest: launches.append(kernel) or launch(kernel, *rest)
    )
    A = torch.stack([matrices.condition(20, 10.0**k) for k in (1, 2, 3)]).float()
    result = inverse_root(A, 2, ridge=1e-3, method="newton")
    assert launches == [bound_kernels.bound_kernel]
    assert (laws.relative(result.root, laws.truth(A, 2, 1e-3)[0]) < 1e-4).all()


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("method", ["newton", "product"])
def test_nothing_waits_for_the_device(monkeypatch, method, previous):
    """The host asks for no number: what a GPU would have to finish for is never called."""

    def unwatched(*arguments, **options):
        with torch.utils._python_dispatch._disable_current_modes():
            return emulated_product.product(*arguments, **options)

    monkeypatch.setattr(kernels, "multiply", unwatched)
    A = matrices.condition(20, 1e2).float().repeat(2, 1, 1)
    results = torch.empty_like(A), torch.empty(2), torch.empty(2, dtype=torch.int8)
    old = A.clone() if previous else None
    with NoWaiting():
        roots.compute(method, "triton", A, 2, 1e-3, 1e-3, None, old, *results, "high")
    assert (results[2] == RootStatus.CONVERGED).all()
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        results[1].sum().item()
