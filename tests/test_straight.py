"""The short way of the public functions to their implementations: the same bits as through torch's
dispatcher, and not taken where something there would see or change the call."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shampoo_kernels as sk
from shampoo_kernels.ops.straight import plain, unobserved

B, m, n = 3, 6, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spd(k, seed=0):
    G = draw(B, k, k + 3, seed=seed)
    return G @ G.mT / k


# The op of every public function, and a call of it; arguments are made anew each time.
CALLS = {
    "gram_ema_": lambda: sk.gram_ema_(spd(m), draw(B, m, n), 0.9, 0.1, side="left"),
    "eigenvalue_bound": lambda: sk.eigenvalue_bound(spd(m)),
    "power_iteration": lambda: sk.power_iteration(spd(m)),
    "orthogonal_iteration": lambda: sk.orthogonal_iteration(spd(m), torch.eye(m).repeat(B, 1, 1)),
    "kronecker_power_step": lambda: sk.kronecker_power_step(draw(B, 4, m, n), spd(m), spd(n)),
    "precondition": lambda: sk.precondition(draw(B, m, n), spd(m), spd(n)),
    "precondition_": lambda: sk.precondition(draw(B, m, n), spd(m), None, out=draw(B, m, n)),
    "orthogonalize": lambda: sk.orthogonalize(draw(B, m, n)),
    "inverse_root": lambda: sk.inverse_root(spd(m), 2),
    "inverse_root_": lambda: sk.inverse_root(spd(m), 2, out=spd(m)),
}


def named(func):
    return str(func).split(".")[1] if str(func).startswith("shampoo_kernels.") else None


class Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(named(func))
        return func(*args, **(kwargs or {}))


class ListeningToFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(named(func))
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    heard: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(named(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", CALLS)
def test_the_same_bits_either_way(op):
    straight = tree_leaves(CALLS[op]())
    with Listening() as mode:
        dispatched = tree_leaves(CALLS[op]())
    assert op in mode.heard
    for short, long in zip(straight, dispatched, strict=True):
        assert (short.shape, short.stride(), short.dtype) == (long.shape, long.stride(), long.dtype)
        assert torch.equal(short, long)


@pytest.mark.parametrize("op", CALLS)
def test_modes_and_the_profiler_see_the_op(op):
    with ListeningToFunctions() as mode:
        CALLS[op]()
    assert op in mode.heard
    with torch.profiler.profile() as profiler:
        CALLS[op]()
    assert f"shampoo_kernels::{op}" in {event.name for event in profiler.events()}


def test_a_subclass_sees_the_op():
    A = spd(m).as_subclass(Wrapped)
    sk.eigenvalue_bound(A)
    assert "eigenvalue_bound" in Wrapped.heard


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_who_listens():
    assert unobserved()
    for context in (
        Listening(), ListeningToFunctions(), torch.device("cpu"), torch.profiler.profile(),
        torch.autocast("cpu", torch.bfloat16),
    ):  # fmt: skip
        with context:
            assert not unobserved()
    seen = []
    torch.func.vmap(lambda x: seen.append(unobserved()) or x)(torch.ones(2))
    compiled = torch.compile(lambda x: x * unobserved(), backend="eager", fullgraph=True)
    assert not compiled(torch.ones(2)).any()
    traced = (lambda x: seen.append(unobserved()) or x + 1), torch.ones(2)
    torch.jit.trace(*traced, check_trace=False)
    assert seen
    assert not any(seen)
    with torch.no_grad(), torch.inference_mode():
        assert unobserved()


def test_plain_tensors():
    A = torch.ones(2, 3, 3)
    assert plain(A)
    assert plain(torch.nn.Parameter(A))
    assert plain(A.mT[:, ::2])
    assert not plain(A.as_subclass(Wrapped))
    assert not plain(A.to("meta"))
    assert not plain(torch._neg_view(A))


def test_a_negative_view_is_read_as_what_it_means():
    A = torch.complex(torch.zeros(B, m, m), -spd(m)).conj().imag
    assert A.is_neg()
    assert torch.equal(sk.eigenvalue_bound(A), sk.eigenvalue_bound(spd(m)))
    weights = torch.complex(torch.zeros(2), -torch.tensor([0.9, 0.1])).conj().imag
    for beta, alpha in ((weights[:1], 0.1), (0.9, weights[1:])):
        stat = sk.gram_ema_(spd(m), draw(B, m, n), beta, alpha, side="left")
        assert torch.equal(stat, CALLS["gram_ema_"]())
