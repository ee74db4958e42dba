"""inverse_root: accuracy on every family, the statuses, previous and fallback, bits, bad input."""

import functools
import math
from fractions import Fraction

import matrices
import pytest
import torch

from shampoo_kernels import InverseRoot, RootStatus, eigenvalue_bound, inverse_root, use_backend
from shampoo_kernels.ops.inverse_root import root_method

UNIT = 2.0**-24
METHODS = [("eigh", p) for p in (1, 2, 4)] + [("newton", p) for p in (1, 2, 3, 4)]
METHODS += [("product", p) for p in (1, 2, 4)]
CASES = [("reference", *case) for case in METHODS] + [("native", "eigh", p) for p in (1, 2, 4)]


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


def truth(A, p, ridge):
    """(root, condition number after the ridge), float64 eigh of A as it is rounded."""
    values, vectors = torch.linalg.eigh(A.double())
    shifted = values.clamp(min=0) + ridge * eigenvalue_bound(A).double()[..., None]
    root = (vectors * shifted.pow(-1 / p)[..., None, :]) @ vectors.mT
    return root, shifted.amax(-1) / shifted.amin(-1)


def float32_eigh_error(A, p, ridge):
    """What float32 eigh makes of it, with the ridge on the matrix or on the eigenvalues: the worst
    of a few rescaled copies, since the error of one small matrix is a matter of luck."""
    worst = torch.zeros(len(A), dtype=torch.float64)
    copies = 40 if A.shape[-1] <= 3 else 4 if A.shape[-1] <= 128 else 1
    for factor in torch.linspace(1.0, 1.95, copies).tolist():
        scaled = A / (A.abs().amax((-2, -1), keepdim=True)) * factor
        expected = truth(scaled, p, ridge)[0]
        shift = ridge * eigenvalue_bound(scaled)[..., None]
        eye = torch.eye(A.shape[-1])
        for matrix, after in ((scaled, shift), (scaled + shift[..., None] * eye, 0)):
            values, vectors = torch.linalg.eigh(matrix)
            powers = (values + after).clamp(min=UNIT).pow(-1 / p)
            root = (vectors * powers[..., None, :]) @ vectors.mT
            worst = torch.maximum(worst, relative(root, expected))
    return worst


def law(A, p, ridge, method):
    """Most that a float32 root may be off: 4u sqrt(kappa n), or twice float32 eigh's error.

    The product form rounds two coupled iterates (sqrt(2)) and squares its p = 2 root for p = 1 (2).
    Where most eigenvalues lie at the ridge, as Hilbert's do, an iteration's own rounding counts
    whatever n is: 1.5 times what the M-form was measured at for p = 2 and kappa = 1e6 (3.7e-3),
    in proportion to kappa/p. Up to n = 3 nothing averages over eigenvalues: there every one of at
    most 14 steps may commit a backward error of 2u.
    """
    _, kappa = truth(A, p, ridge)
    n = A.shape[-1]
    factor = {"product": math.sqrt(2) * (2 if p == 1 else 1)}.get(method, 1.0)
    most = torch.maximum(
        2 * float32_eigh_error(A, p, ridge), 4 * factor * UNIT * (kappa * n).sqrt()
    )
    if method != "eigh":
        most = torch.maximum(most, 1.5 * 3.7e-3 * (kappa / 1e6) * 2 / p)
    return torch.maximum(most, (4 + 28 * kappa) * UNIT) if n <= 3 else most


@functools.cache
def law_of_families(n, p, ridge, method):
    return law(stack(n)[1], p, ridge, method)


def relative(X, Y):
    return (X.double() - Y).flatten(-2).norm(dim=-1) / Y.flatten(-2).norm(dim=-1)


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
    A = torch.stack([matrices.condition(1000, 1e4), matrices.low_rank(1000, 16)]).float()
    result = inverse_root(A, 2, method=method)
    assert (relative(result.root, truth(A, 2, 1e-6)[0]) <= law(A, 2, 1e-6, method)).all()
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
    A = matrices.condition(24, 1e4).float()
    result = inverse_root(A, p, ridge=1e-6, method="newton")
    expected, _ = truth(A, p, 1e-6)
    assert result.status == RootStatus.CONVERGED
    assert relative(result.root, expected) < 3e-3


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


def test_auto_is_a_pure_function():
    assert root_method("cpu", 2.0, "highest", 1e-6) == "eigh"
    assert root_method("cuda", 2.0, "highest", 1e-6) == "newton"
    assert root_method("cuda", 2.0, "high", 1e-6) == "newton"
    assert root_method("cuda", 2.0, "high", 1e-4) == "product"
    assert root_method("cuda", 3.0, "high", 1e-4) == "newton"
    assert root_method("cuda", 4.0, "medium", 1e-4) == "newton"
    assert root_method("cuda", 4.0, "medium", 1e-3) == "product"
    assert root_method("cuda", 1.5, "highest", 1e-6) == "eigh"


EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((EYE.bfloat16(), 2), TypeError, "A must be float64 or float32"),
        ((EYE[:3], 2), ValueError, r"A must be \(\*, n, n\), got \(3, 4\)"),
        ((EYE.numpy(), 2), TypeError, "A must be a tensor"),
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
        ((EYE, 2, {"out": EYE}), ValueError, "must not be A"),
    ],
)
def test_bad_input(arguments, error, message):
    A, p, *options = arguments
    with pytest.raises(error, match=message) as raised:
        inverse_root(A, p, **(options[0] if options else {}))
    assert str(raised.value).startswith("inverse_root: ")
