"""inverse_root: accuracy on every family, the statuses, previous and fallback, bits, bad input."""

import functools
import math
from fractions import Fraction

import matrices
import pytest
import torch
from root_law import law, relative, truth

from shampoo_kernels import (
    InverseRoot,
    RootStatus,
    eigenvalue_bound,
    inverse_root,
    native,
    use_backend,
)
from shampoo_kernels.ops.inverse_root import compute_

METHODS = [("eigh", p) for p in (1, 2, 4)] + [("newton", p) for p in (1, 2, 3, 4)]
METHODS += [("product", p) for p in (1, 2, 4)]
CASES = [("reference", *case) for case in METHODS] + [("native", "eigh", p) for p in (1, 2, 4)]
CASES += [("native", "newton", p) for p in (1, 2, 3, 4)]


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native":
        native = pytest.importorskip("shampoo_kernels.native")
        if native.lib is None:
            pytest.skip(f"no extension: {native.why_not}")
    with use_backend(request.param):
        yield request.param


@functools.cache
def stack(n):
    made = matrices.families(n)
    return list(made), torch.stack(list(made.values())).float()


@functools.cache
def law_of_families(n, p, ridge, method):
    names, A = stack(n)
    return law(A, p, ridge, method, names)


@pytest.mark.parametrize("n", [1, 2, 3, 33, 128])
@pytest.mark.parametrize("ridge", [1e-3, 1e-6])
@pytest.mark.parametrize(("backend", "method", "p"), CASES, indirect=["backend"])
def test_accuracy_law(backend, method, p, n, ridge):
    names, A = stack(n)
    result = inverse_root(A, p, ridge=ridge, method=method)
    assert result.root.isfinite().all()
    assert torch.equal(result.root, result.root.mT)
    error, most = relative(result.root, truth(A, p, ridge)[0]), law_of_families(n, p, ridge, method)
    for name, e, bound, status in zip(names, error, most, result.status, strict=True):
        assert status == RootStatus.CONVERGED, (name, RootStatus(int(status)).name)
        assert e <= bound, f"{name}: error {e:.2e} > {bound:.2e}"
    assert (result.residual < 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_accuracy_law_at_1000(method):
    names = ("condition 1e4", "rank 16")
    A = torch.stack([matrices.condition(1000, 1e4), matrices.low_rank(1000, 16)]).float()
    result = inverse_root(A, 2, method=method)
    assert (relative(result.root, truth(A, 2, 1e-6)[0]) <= law(A, 2, 1e-6, method, names)).all()
    assert (result.status == RootStatus.CONVERGED).all()


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_power_of_the_root_times_the_matrix_is_the_identity(backend, method, p):
    """A law in float64, where X^p A = I can hold: it tells p = 2 from p = 4 and from 1/p."""
    A = torch.stack([matrices.condition(20, 1e3), 7 * matrices.condition(20, 30.0)])
    X = inverse_root(A, p, ridge=1e-6, method=method).root
    shifted = A + 1e-6 * eigenvalue_bound(A)[:, None, None] * torch.eye(20, dtype=A.dtype)
    identity = torch.linalg.matrix_power(X, p) @ shifted
    assert (identity - torch.eye(20, dtype=A.dtype)).abs().max() < 1e-9


@pytest.mark.parametrize("p", [3, 5, 7, 16, 64])
def test_newton_takes_any_integer_root(p):
    A = matrices.condition(24, 1e4).float()[None]
    result = inverse_root(A, p, ridge=1e-6, method="newton")
    expected, _ = truth(A, p, 1e-6)
    assert result.status == RootStatus.CONVERGED
    assert relative(result.root, expected) <= law(A, p, 1e-6, "newton", ["condition 1e4"])


@pytest.mark.parametrize("p", [0.5, 1.5, Fraction(4, 3), 20])
def test_eigh_takes_any_root(backend, p):
    A = matrices.condition(24, 1e2)
    expected, _ = truth(A, float(p), 1e-6)
    assert relative(inverse_root(A, p, method="eigh").root, expected) < 1e-12


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_homogeneous(backend, method):
    """(c A)^(-1/p) = c^(-1/p) A^(-1/p), exactly for powers of 2^(2p)."""
    A = matrices.condition(17, 1e4).float()
    expected = inverse_root(A, 2, method=method).root / 16
    assert torch.equal(inverse_root(256 * A, 2, method=method).root, expected)


def bad_blocks(n):
    """Blocks that have no root."""
    nan, inf, corner = (matrices.condition(n, 10.0) for _ in range(3))
    nan[n // 2, 0] = math.nan
    inf[n - 1, n - 1] = math.inf
    corner[n - 1, 0] = -math.inf
    indefinite = matrices.spectrum(torch.linspace(-1, 1, n))
    return {
        "nan": nan,
        "inf": inf,
        "corner": corner,
        "zero": torch.zeros(n, n),
        "indefinite": indefinite,
        "negative": -matrices.condition(n, 10.0),
        "negative identity": -torch.eye(n),
    }


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_blocks_fail_alone(backend, method, dtype):
    """Mixed with good blocks: the good ones are bitwise what they are without the bad ones."""
    n, good = 12, matrices.condition(12, 1e3).to(dtype)
    bad = {name: A.to(dtype) for name, A in bad_blocks(n).items()}
    mixed = torch.stack([good, *(x for A in bad.values() for x in (A, good))])
    result = inverse_root(mixed, 2, method=method)
    alone = inverse_root(torch.stack([good] * len(mixed)), 2, method=method).root[0]
    assert result.root.isfinite().all()
    for i in range(0, len(mixed), 2):
        assert torch.equal(result.root[i], alone)
        assert result.status[i] == RootStatus.CONVERGED
    for i, name in enumerate(bad):
        root, status = result.root[2 * i + 1], result.status[2 * i + 1]
        assert status == RootStatus.FAILED, name
        bound = eigenvalue_bound(bad[name])
        expected = bound.double() ** -0.5 if 0 < bound < math.inf else torch.ones(())
        assert torch.equal(root, expected.to(dtype) * torch.eye(n, dtype=dtype)), name
        assert result.residual[2 * i + 1] >= 0.05


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_previous_is_kept(backend, method):
    n = 8
    bad = torch.stack([A.float() for A in bad_blocks(n).values()])
    A = torch.cat([bad, matrices.condition(n, 10.0).float()[None], bad[:1]])
    previous = torch.randn(len(A), n, n)
    previous[-1] = math.nan
    expected = previous.clone()
    for out in (None, previous):
        result = inverse_root(A, 4, method=method, previous=previous, out=out)
        assert torch.equal(result.root[: len(bad)], expected[: len(bad)])
        assert (result.status[: len(bad)] == RootStatus.KEPT_PREVIOUS).all()
        assert result.status[-2] == RootStatus.CONVERGED
        assert result.status[-1] == RootStatus.FAILED
        assert result.root.isfinite().all()
        assert out is None or result.root is out


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_slightly_indefinite_blocks_are_ordinary(backend, method):
    """The smallest eigenvalue at half of -ridge*bound, where rounding may put it."""
    eigenvalues = torch.logspace(0, -3, 16, dtype=torch.float64)
    ridge = 1e-4
    eigenvalues[-1] = 0
    eigenvalues[-1] = -0.5 * ridge * eigenvalue_bound(matrices.spectrum(eigenvalues))
    A = matrices.spectrum(eigenvalues).float()
    result = inverse_root(A, 2, ridge=ridge, method=method)
    assert result.status == RootStatus.CONVERGED
    assert result.root.isfinite().all()


def test_an_iteration_falls_back_to_eigh():
    """A schedule that is made for 0.5 cannot reach 1e-4: eigh takes over, for that block alone."""
    A = torch.stack([matrices.condition(9, 1e4), torch.eye(9, dtype=torch.float64)]).float()
    A = torch.cat([A, torch.full((1, 9, 9), math.nan)])
    kept = inverse_root(A, 2, method="newton", design_floor=0.5, previous=A[[1, 1, 1]])
    assert kept.status.tolist() == [2, 0, 2]
    result = inverse_root(A, 2, method="newton", design_floor=0.5, fallback="eigh")
    assert result.status.tolist() == [
        RootStatus.FELL_BACK,
        RootStatus.CONVERGED,
        RootStatus.FAILED,
    ]
    assert torch.equal(result.root[0], inverse_root(A[0], 2, method="eigh").root)


@pytest.mark.parametrize("method", ["newton", "product"])
@pytest.mark.parametrize(
    ("ridge", "floor", "dtype"),
    [(1e-7, None, torch.float32), (0.0, None, torch.float32), (1e-6, 1e-4, torch.float64)],
)
def test_eigenvalues_below_the_design_floor_do_not_converge(method, ridge, floor, dtype):
    """As the docstring says, with its three ways out; "auto" on a CPU is one of them."""
    A = matrices.low_rank(64, 16).to(dtype)
    options = {"ridge": ridge, "design_floor": floor}
    failed = inverse_root(A, 2, method=method, **options)
    assert failed.status == RootStatus.FAILED
    assert failed.residual > 0.05
    kept = inverse_root(A, 2, method=method, previous=torch.eye(64, dtype=dtype), **options)
    assert kept.status == RootStatus.KEPT_PREVIOUS
    retried = inverse_root(A, 2, method=method, fallback="eigh", **options)
    assert retried.status == RootStatus.FELL_BACK
    larger = inverse_root(A, 2, method=method, ridge=floor or 1e-6, design_floor=floor)
    by_eigh, auto = (inverse_root(A, 2, method=x, **options) for x in ("eigh", "auto"))
    for result in (larger, by_eigh, auto):
        assert result.status == RootStatus.CONVERGED
    assert torch.equal(by_eigh.root, auto.root)


def test_pseudo_inverse(backend):
    A = matrices.low_rank(40, 5)
    X = inverse_root(A, 2, ridge=0, rank_rtol=1e-9).root
    expected = torch.linalg.pinv(A, hermitian=True, rtol=1e-9)
    assert relative(X @ X, expected) < 1e-10
    full = matrices.condition(10, 1e2)
    plain = inverse_root(full, 2, ridge=0, method="eigh").root
    assert torch.equal(inverse_root(full, 2, ridge=0, rank_rtol=1e-6).root, plain)


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_a_block_depends_on_itself_alone(backend, method):
    """Bitwise the same under another batch size, order, threads and garbage neighbours (native);
    torch.linalg.eigh under the reference keeps only the last."""
    n = 33
    A = torch.stack([matrices.condition(n, 10.0**k) for k in (1, 2, 3, 4, 5)]).float()
    whole = inverse_root(A, 2, method=method).root
    garbage = A.clone()
    garbage[1], garbage[3] = math.nan, 1e30
    assert torch.equal(inverse_root(garbage, 2, method=method).root[[0, 2, 4]], whole[[0, 2, 4]])
    if backend == "reference" and method == "eigh":
        return
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(inverse_root(A[order], 2, method=method).root, whole[order])
    assert torch.equal(inverse_root(A[2:3], 2, method=method).root, whole[2:3])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(inverse_root(A, 2, method=method).root, whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
def test_only_the_lower_triangle_is_read(backend, method):
    A = matrices.condition(7, 1e2).float()
    garbled = A.tril() + torch.full((7, 7), math.nan).triu(1)
    expected = inverse_root(A, 2, method=method).root
    assert torch.equal(inverse_root(garbled, 2, method=method).root, expected)


@pytest.mark.parametrize("method", ["eigh", "newton", "product"])
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 4, 4), (3, 0, 0), (2, 0, 5, 5), (2, 3, 5, 5), (5, 5)]
)
def test_shapes(backend, method, shape):
    A = torch.zeros(shape) + torch.eye(shape[-1])
    result = inverse_root(A, 2, method=method, ridge=1e-6)
    assert isinstance(result, InverseRoot)
    assert result.root.shape == shape
    assert result.residual.shape == result.status.shape == shape[:-2]
    assert result.status.dtype == torch.int8
    assert torch.allclose(result.root, A, rtol=1e-4)


def test_strides(backend):
    A = matrices.condition(6, 10.0).float()
    wide = torch.zeros(4, 12, 12)
    wide[::2, ::2, ::2] = A
    for method in ("eigh", "newton"):
        expected = inverse_root(A, 2, method=method).root
        out = torch.zeros(2, 6, 12)[:, :, ::2]
        inverse_root(wide[::2, ::2, ::2], 2, method=method, out=out)
        assert torch.equal(out, expected.expand(2, 6, 6))


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_a_root_that_vanishes_is_none(backend, method):
    A = torch.stack([1e30 * torch.eye(2), torch.eye(2)])
    result = inverse_root(A, 0.1 if method == "eigh" else 1, ridge=1e-3, method=method)
    expected = RootStatus.FAILED if method == "eigh" else RootStatus.CONVERGED
    assert result.status.tolist() == [expected, RootStatus.CONVERGED]
    assert (result.root.diagonal(dim1=-2, dim2=-1) > 0).all()
    if method == "eigh":  # 1e30^-10
        assert torch.equal(result.root[0], torch.eye(2))


def test_the_largest_numbers_have_roots(backend):
    A = 3.2e38 * torch.eye(3)
    for method in ("newton", "eigh"):
        result = inverse_root(A, 2, ridge=0.1, method=method)
        assert result.status == RootStatus.CONVERGED
        assert relative(result.root, truth(A, 2, 0.1)[0]) < 1e-5


@pytest.mark.parametrize("method", ["newton", "product"])
def test_previous_survives_out_and_fallback(backend, method):
    A = torch.eye(4).repeat(2, 1, 1)
    A[1, 0, 0] = math.nan
    previous = 7 * torch.eye(4).repeat(2, 1, 1)
    options = {"method": method, "fallback": "eigh", "ridge": 1e-4}
    apart = inverse_root(A, 2, previous=previous.clone(), **options)
    same = inverse_root(A, 2, previous=previous, out=previous, **options)
    assert torch.equal(same.root, apart.root)
    assert same.status.tolist() == apart.status.tolist() == [0, RootStatus.KEPT_PREVIOUS]
    assert torch.equal(same.root[1], 7 * torch.eye(4))


EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((EYE.bfloat16(), 2), TypeError, "A must be float64 or float32"),
        ((EYE[:3], 2), ValueError, r"A must be \(\*, n, n\), got \(3, 4\)"),
        ((EYE.tolist(), 2), TypeError, "A must be a tensor"),
        ((EYE.clone().requires_grad_(), 2), ValueError, "requires grad"),
        ((EYE, 0), ValueError, "p must be positive"),
        ((EYE, -2), ValueError, "p must be positive"),
        ((EYE, math.nan), ValueError, "p must be positive"),
        ((EYE, "2"), TypeError, "p must be a number"),
        ((EYE, True), TypeError, "p must be a number"),
        ((EYE, 2, {"ridge": -1.0}), ValueError, "ridge must be finite"),
        ((EYE, 2, {"ridge": math.inf}), ValueError, "ridge must be finite"),
        ((EYE, 2, {"design_floor": 1.5}), ValueError, "design_floor must be in"),
        ((EYE, 2, {"rank_rtol": -0.1}), ValueError, "rank_rtol must be in"),
        ((EYE, 2, {"rank_rtol": 0.1, "method": "newton"}), ValueError, 'needs method="eigh"'),
        ((EYE, 2, {"method": "svd"}), ValueError, "method must be"),
        ((EYE, 2, {"precision": "low"}), ValueError, "precision must be"),
        ((EYE, 2, {"fallback": "none"}), ValueError, "fallback must be"),
        ((EYE, 1.5, {"method": "newton"}), ValueError, "integer from 1 to 64"),
        ((EYE, 65, {"method": "newton"}), ValueError, "integer from 1 to 64"),
        ((EYE, 3, {"method": "product"}), ValueError, "1, 2 or 4"),
        ((EYE, 2, {"method": "newton", "precision": "high"}), ValueError, ">= 0.0001, got 1e-06"),
        (
            (EYE, 2, {"method": "newton", "precision": "medium"}),
            ValueError,
            'needs method="product"',
        ),
        ((EYE, 2, {"method": "product", "precision": "medium"}), ValueError, ">= 1e-05, got 1e-06"),
        (
            (EYE.double(), 2, {"method": "newton", "ridge": 0}),
            ValueError,
            "ridge or a design_floor",
        ),
        ((EYE, 4, {"method": "product", "design_floor": 1e-7}), ValueError, ">= 1e-06, got 1e-07"),
        ((EYE, 2, {"previous": EYE[:2]}), ValueError, "previous must be"),
        ((EYE, 2, {"previous": EYE.double()}), TypeError, "previous must be float32"),
        ((EYE, 2, {"out": torch.zeros(5, 5)}), ValueError, "out must be"),
        (
            (EYE, 2, {"out": torch.zeros(4, 4, dtype=torch.float64)}),
            TypeError,
            "out must be float32",
        ),
        ((EYE, 2, {"out": EYE}), ValueError, "must not overlap A"),
    ],
)
def test_bad_input(arguments, error, message):
    A, p, *options = arguments
    with pytest.raises(error, match=message) as raised:
        inverse_root(A, p, **(options[0] if options else {}))
    assert str(raised.value).startswith("inverse_root: ")


@pytest.mark.parametrize("method", ["auto", "newton", "product", "eigh"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_is_as_if_the_matrices_came_scaled(method, backend, dtype):
    """Bit for bit; 0 keeps the previous root, also where the iteration leaves a block to eigh."""
    if backend == "native" and native.lib is None:
        pytest.skip("no native kernels")
    A = torch.stack([matrices.condition(20, 1e3), matrices.condition(20, 10.0)] * 2).to(dtype)
    A[2] -= 0.9e-4 * eigenvalue_bound(A[2]) * torch.eye(20)  # too far below 0 for an iteration
    scale = torch.tensor([3.7e-20, 1.0, 0.3, 0.0], dtype=dtype)
    found = []
    for given, factor in ((A * scale[:, None, None], None), (A, scale)):
        root, residual, status = torch.full_like(A, 7), A.new_empty(4), torch.empty(4).char()
        with use_backend(backend):
            compute_(root, residual, status, given, 2.0, ridge=1e-4, method=method, scale=factor,
                     previous=root)  # fmt: skip
        found.append((root, residual, status))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert (found[1][0][3] == 7).all()
    assert found[1][2].tolist()[3] == RootStatus.KEPT_PREVIOUS
