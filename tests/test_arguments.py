"""Arguments of a wrong kind or value: every public function says what it wants and what it got."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    inverse_root,
    kronecker_power_step,
    minimax_coefficients,
    orthogonal_iteration,
    orthogonalize,
    power_iteration,
    precondition,
)

G, A = torch.ones(2, 4, 4), torch.eye(4).repeat(2, 1, 1)
META = torch.empty(2, 4, 4, device="meta")
HUGE = [10**400, Fraction(10**400)]


def raises(words, error=ValueError):
    return pytest.raises(error, match=words)


# Every function of a tensor, and of a tensor in each of its places.
PLACES = {
    "gram_ema_: stat": lambda x: gram_ema_(x, G, 0.5, 0.5, side="left"),
    "gram_ema_: grad": lambda x: gram_ema_(A.clone(), x, 0.5, 0.5, side="left"),
    "gram_ema_: weight": lambda x: gram_ema_(A.clone(), G, 0.5, 0.5, side="left", weight=x),
    "inverse_root: A": lambda x: inverse_root(x, 2),
    "inverse_root: previous": lambda x: inverse_root(A, 2, previous=x),
    "inverse_root: out": lambda x: inverse_root(A, 2, out=x),
    "eigenvalue_bound: A": eigenvalue_bound,
    "power_iteration: A": power_iteration,
    "orthogonal_iteration: A": lambda x: orthogonal_iteration(x, A),
    "orthogonal_iteration: Q": lambda x: orthogonal_iteration(A, x),
    "kronecker_power_step: grads": lambda x: kronecker_power_step(x, A[0], A[0]),
    "kronecker_power_step: left": lambda x: kronecker_power_step(G[:, None], x, A),
    "kronecker_power_step: right": lambda x: kronecker_power_step(G[:, None], A, x),
    "precondition: grad": lambda x: precondition(x, A, A),
    "precondition: left": lambda x: precondition(G, x, A),
    "precondition: right": lambda x: precondition(G, A, x),
    "precondition: out": lambda x: precondition(G, A, A, out=x),
    "orthogonalize: G": orthogonalize,
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # nested and compressed are "beta"
@pytest.mark.parametrize("place", PLACES)
def test_layouts(place):
    jagged = torch.nested.nested_tensor([G[0], G[1]], layout=torch.jagged)
    for tensor, layout in (
        (G.to_sparse(), "sparse_coo"),
        (G.to_sparse_csr(), "sparse_csr"),
        (G.to_mkldnn(), "_mkldnn"),
        (torch.nested.nested_tensor([G[0], G[1]]), "nested"),
        (jagged, "nested"),
    ):
        with raises(f"{place} must be a strided tensor, got layout {layout}"):
            PLACES[place](tensor)


@pytest.mark.parametrize("place", [p for p in PLACES if not p.endswith((": A", "grads", ": G"))])
def test_devices(place):
    """One argument on another device; the device of the first is the one asked for."""
    first = {"gram_ema_": "stat", "inverse_root": "A", "orthogonal_iteration": "A",
             "kronecker_power_step": "grads", "precondition": "grad"}  # fmt: skip
    op, name = place.split(": ")
    wanted, got = ("meta", "cpu") if name == first[op] else ("cpu", "meta")
    with raises(f"{op}: .* must be on {wanted}, got {got}"):
        PLACES[place](META)


def test_devices_of_factors():
    for name, factors in (("beta", (META[:, 0, 0], 0.5)), ("alpha", (0.5, META[:, 0, 0]))):
        with raises(f"gram_ema_: {name} must be on cpu, got meta"):
            gram_ema_(A.clone(), G, *factors, side="left")


OPTIONS = {
    "gram_ema_: side": lambda x: gram_ema_(A.clone(), G, 0.5, 0.5, side=x),
    "gram_ema_: precision": lambda x: gram_ema_(A, G, 0, 0, side="left", precision=x),
    "inverse_root: method": lambda x: inverse_root(A, 2, method=x),
    "inverse_root: precision": lambda x: inverse_root(A, 2, precision=x),
    "inverse_root: fallback": lambda x: inverse_root(A, 2, fallback=x),
    "kronecker_power_step: scheme": lambda x: kronecker_power_step(G, A[0], A[0], scheme=x),
    "kronecker_power_step: precision": lambda x: kronecker_power_step(G, A[0], A[0], precision=x),
    "precondition: precision": lambda x: precondition(G, A, A, precision=x),
    "orthogonalize: precision": lambda x: orthogonalize(G, precision=x),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("given", [None, 1, True, ["left"], np.array(["left", "right"]), "Left"])
def test_options(option, given):
    with raises(f'{option} must be "[a-z]+" or .*, got '):
        OPTIONS[option](given)


NUMBERS = {
    "gram_ema_: beta": lambda x: gram_ema_(A.clone(), G, x, 0.5, side="left"),
    "gram_ema_: alpha": lambda x: gram_ema_(A.clone(), G, 0.5, x, side="left"),
    "inverse_root: p": lambda x: inverse_root(A, x),
    "inverse_root: ridge": lambda x: inverse_root(A, 2, ridge=x),
    "inverse_root: design_floor": lambda x: inverse_root(A, 2, design_floor=x),
    "inverse_root: rank_rtol": lambda x: inverse_root(A, 2, rank_rtol=x),
    "orthogonalize: coefficients": lambda x: orthogonalize(G, coefficients=[(1, x, 0)]),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(number):
    for given in (True, np.bool_(True), 1j, "1", [1], b"1"):
        with raises(f"{number} must be (a )?number.*, got {type(given).__name__}", TypeError):
            NUMBERS[number](given)
    for given in HUGE:
        with raises(f"{number} must be .* in the range of a float, got a larger"):
            NUMBERS[number](given)
    for given in (math.nan, math.inf, np.float32("nan")):
        with raises(f"{number} must be "):
            NUMBERS[number](given)
    for given in (0.5, Fraction(1, 2), np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        NUMBERS[number](given)


def test_any_real_number_is_the_float_that_it_is():
    expected = gram_ema_(A.clone(), G, 0.5, 2.0, side="left")
    for beta in (Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)):
        for alpha in (2, np.int64(2), torch.tensor(2)):
            assert torch.equal(gram_ema_(A.clone(), G, beta, alpha, side="left"), expected)
    root = inverse_root(A * 3, 2, method="newton").root
    assert torch.equal(inverse_root(A * 3, np.int64(2), method="newton").root, root)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_tensor_factors_must_be_real(dtype):
    factor = torch.ones(2, dtype=dtype)
    for name, factors in (("beta", (factor, 0.5)), ("alpha", (0.5, factor))):
        with raises(rf"gram_ema_: {name} must be real, got \(2,\) {str(dtype)[6:]}", TypeError):
            gram_ema_(A.clone(), G, *factors, side="left")


INTEGERS = {
    "power_iteration: steps": lambda x: power_iteration(A, x),
    "power_iteration: vectors": lambda x: power_iteration(A, 1, x),
    "orthogonal_iteration: steps": lambda x: orthogonal_iteration(A, A, x),
    "orthogonalize: steps": lambda x: orthogonalize(G, coefficients=(1, 1, 1), steps=x),
}


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers(integer):
    for given in (True, 1.5, 2.0, "1", Fraction(2), 1j):
        with raises(f"{integer} must be an int, got {type(given).__name__}", TypeError):
            INTEGERS[integer](given)
    for given in (0, -1):
        with raises(f"{integer} must be at least 1, got {given}"):
            INTEGERS[integer](given)
    for given in (10**400, -(10**400), 2**63):
        with raises(f"{integer} must fit into 64 bits"):
            INTEGERS[integer](given)
    INTEGERS[integer](np.int64(2))


@pytest.mark.parametrize("name", ["floor", "tolerance", "cushion", "headroom"])
def test_numbers_of_schedules(name):
    options = {"floor": 1e-3, "p": 2, "degree": 1}
    for given in (10**400, Fraction(10**400), math.nan):
        with raises(f"minimax_coefficients: {name} must be in "):
            minimax_coefficients(**options | {name: given})
    with raises(f"{name} must be a float, got bool", TypeError):
        minimax_coefficients(**options | {name: True})


@pytest.mark.parametrize(
    ("coefficients", "error"),
    [
        ((), ValueError),
        ([()], ValueError),
        ((1, 2), ValueError),
        ([(1, 2, 3), (1, 2)], ValueError),
        ([(1, 2, 3), 4], TypeError),
        (3, TypeError),
        (1.5, TypeError),
        ("abc", TypeError),
        (["a", "b", "c"], TypeError),
        ({1: 2, 3: 4, 5: 6}, TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.ones(3), TypeError),
        ((1, 2, torch.tensor(3.0)), TypeError),
        ((1.0, math.nan, 1.0), ValueError),
        ((1.0, 1.0, -math.inf), ValueError),
        ((1.0, True, 1.0), TypeError),
        ((1.0, 10**400, 1.0), ValueError),
    ],
)
def test_coefficients(coefficients, error):
    with raises("^orthogonalize: coefficients must be ", error):
        orthogonalize(G, coefficients=coefficients)


def test_steps_come_with_one_triple():
    for coefficients in (None, [(1, 2, 3)], []):
        with raises("orthogonalize: steps must come with one triple of coefficients, got 2"):
            orthogonalize(G, coefficients=coefficients, steps=2)
    expected = orthogonalize(G, coefficients=[(2.0, -1.5, 0.5)] * 3)
    for triple in ((2.0, -1.5, 0.5), [2, -1.5, Fraction(1, 2)], np.array([2, -1.5, 0.5])):
        assert torch.equal(orthogonalize(G, coefficients=triple, steps=3), expected)


@pytest.mark.parametrize("place", ["gram_ema_: stat", "inverse_root: out", "precondition: out"])
def test_outputs_with_a_lazy_bit(place):
    negative = torch.zeros(2, 4, 4, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for tensor, bit in ((negative, "negative"), (torch.zeros_like(G).cfloat().conj(), "conjugate")):
        with raises(f"{place} is written in place and must not have the {bit} bit set"):
            PLACES[place](tensor)


@pytest.mark.parametrize("place", [p for p in PLACES if not p.endswith(("stat", "out"))])
def test_inputs_with_a_lazy_bit(place):
    """Are read as the numbers they stand for."""
    if place.endswith("grads"):
        place = "kronecker_power_step: left"
    negative = torch.complex(torch.zeros(2, 4, 4), -A).conj().imag
    assert negative.is_neg()
    for given, expected in zip(
        _tensors(PLACES[place](negative)), _tensors(PLACES[place](A)), strict=True
    ):
        assert torch.equal(given, expected)


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
