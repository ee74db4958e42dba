"""Arrays of other libraries, which functions that return take in place of tensors, uncopied."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    inverse_root,
    kronecker_power_step,
    orthogonal_iteration,
    orthogonalize,
    power_iteration,
    precondition,
)
from shampoo_kernels.ops import common

G = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
A = G @ G.mT + torch.eye(5)
Q = torch.linalg.qr(G)[0]

# Every function with each of its inputs, and what the input is called in an error.
CALLS = {
    "eigenvalue_bound": (eigenvalue_bound, {"A": A}),
    "inverse_root": (lambda A, previous: inverse_root(A, 2, previous=previous),
                     {"A": A, "previous": A}),
    "kronecker_power_step": (kronecker_power_step, {"grads": G[:, None], "left": A, "right": A}),
    "orthogonal_iteration": (orthogonal_iteration, {"A": A, "Q": Q}),
    "orthogonalize": (orthogonalize, {"G": G}),
    "power_iteration": (power_iteration, {"A": A}),
    "precondition": (precondition, {"grad": G, "left": A, "right": A}),
}  # fmt: skip
PLACES = [(op, name) for op, (_, inputs) in CALLS.items() for name in inputs]


def call(op, convert, only=None):
    function, inputs = CALLS[op]
    result = function(
        **{name: convert(x) if only in (None, name) else x for name, x in inputs.items()}
    )
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(op, convert, only=None):
    for given, expected in zip(call(op, convert, only), call(op, lambda x: x), strict=True):
        assert type(given) is Tensor
        assert torch.equal(given, expected)


def jax_array(x: Tensor):
    jax = pytest.importorskip("jax", reason="needs jax")
    return jax.device_put(x.numpy(), jax.devices("cpu")[0])


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_a_numpy_array_in_each_place(op, name):
    assert_same(op, Tensor.numpy, only=name)
    assert_same(op, lambda x: x.mT.contiguous().numpy().swapaxes(-1, -2), only=name)


@pytest.mark.parametrize("op", CALLS)
def test_numpy_arrays_alone(op):
    assert_same(op, Tensor.numpy)


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_jax_arrays(op):
    assert_same(op, jax_array)


@pytest.mark.slow
def test_a_jax_array_of_bfloat16():
    array = jax_array(G).astype("bfloat16")
    for given, expected in zip(
        precondition(array, A, A), precondition(G.bfloat16(), A, A), strict=True
    ):
        assert torch.equal(given, expected)


def test_nothing_is_copied():
    array, tensor = np.zeros((2, 3, 3))[:, :2, 1:], torch.zeros(2)
    (taken,) = common.as_tensors("op", A=array)
    assert (taken.data_ptr(), taken.shape) == (array.ctypes.data, array.shape)
    array[1, 1, 1] = 7
    assert taken[1, 1, 1] == 7
    passed = common.as_tensors("op", a=tensor, b=None, c=[1])
    assert [type(x) for x in passed] == [Tensor, type(None), list]
    assert passed[0] is tensor


@pytest.mark.slow
def test_nothing_of_jax_is_copied():
    array = jax_array(A)
    (taken,) = common.as_tensors("op", A=array)
    assert taken.data_ptr() == array.unsafe_buffer_pointer()


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_what_is_not_acceptable(op, name):
    def frozen(x):
        array = x.numpy().copy()
        array.flags.writeable = False
        return array

    for convert, error, words in (
        (frozen, ValueError, "must not be a read-only ndarray"),
        (lambda x: x.numpy()[:, ::-1], ValueError, "must have no negative strides, got a ndarray"),
        (lambda x: x.numpy().astype(">f4"), TypeError, "must be a tensor or .*, got ndarray: "),
        (lambda x: x.numpy().astype(object), TypeError, "must be a tensor or .*, got ndarray: "),
        (lambda x: x.numpy().astype(np.int64), TypeError, r"must be float.*, got .* int64"),
        (lambda x: x.numpy().astype("F"), TypeError, r"must be float.*, got .* complex64"),
        (Tensor.tolist, TypeError, "must be a tensor, got list"),
    ):
        with pytest.raises(error, match=f"^{op}: {name} {words}"):
            call(op, convert, only=name)


@pytest.mark.parametrize(("op", "name"), [place for place in PLACES if len(CALLS[place[0]][1]) > 1])
def test_mixed_devices(op, name):
    """An array is on the device where it is, and an error says what it should be."""
    function, inputs = CALLS[op]
    mixed = {key: x.numpy() if key == name else x.to("meta") for key, x in inputs.items()}
    with pytest.raises(ValueError, match=rf"^{op}: \w+ must be on (cpu|meta), got (cpu|meta)"):
        function(**mixed)


def test_what_is_written_to_must_be_a_tensor():
    out = np.zeros_like(A)
    for op, name, run in (
        ("gram_ema_", "stat", lambda: gram_ema_(out, G, 0.5, 0.5, side="left")),
        ("gram_ema_", "grad", lambda: gram_ema_(A.clone(), out, 0.5, 0.5, side="left")),
        ("inverse_root", "out", lambda: inverse_root(A, 2, out=out)),
        ("precondition", "out", lambda: precondition(G, A, A, out=out)),
    ):
        with pytest.raises(TypeError, match=f"^{op}: {name} must be a tensor, got ndarray"):
            run()
    assert math.fsum(out.flat) == 0


def test_the_array_is_not_changed():
    for function, inputs in CALLS.values():
        arrays = {name: x.numpy().copy() for name, x in inputs.items()}
        function(**arrays)
        for name, x in inputs.items():
            assert np.array_equal(arrays[name], x.numpy())


@pytest.mark.parametrize("op", CALLS)
def test_calls_with_tensors_still_compile(op):
    function, inputs = CALLS[op]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for given, expected in zip(
        torch.utils._pytree.tree_leaves(compiled(**inputs)),
        torch.utils._pytree.tree_leaves(function(**inputs)),
        strict=True,
    ):
        assert torch.equal(given, expected)
