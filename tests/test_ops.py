"""Every registered op under opcheck, fullgraph compile, fake and meta tensors."""

from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import shampoo_kernels as sk
from shampoo_kernels.native import lib

ops = torch.ops.shampoo_kernels
BACKENDS = ["reference", *(["native"] if lib else [])]
B, m, n, N = 3, 6, 5, 4


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def spd(k, seed=0):
    G = draw(B, k, k + 3, seed=seed)
    return G @ G.mT / k


def root_state():
    return torch.zeros(B, m, m), torch.zeros(B), torch.zeros(B, dtype=torch.int8)


MUON = [3.4445, -4.7750, 2.0315] * 2
# Every op with (arguments, keywords); made anew for each test, since some are written to.
CASES = {
    "gram_ema_": [
        lambda: ((spd(m), draw(B, m, n), 0.9, 0.1), {"side": "left"}),
        lambda: ((spd(n), draw(B, m, n).bfloat16(), 0.0, 0.0), {
            "side": "right", "weight": spd(m), "beta_tensor": draw(B).abs(),
            "alpha_tensor": draw(1), "precision": "high"}),
        lambda: ((spd(m).double(), draw(B, n, m).mT.double(), 0.9, 0.1), {"side": "left"}),
    ],
    "eigenvalue_bound": [lambda: ((spd(m),), {}), lambda: ((spd(m).double().mT,), {})],
    "power_iteration": [lambda: ((spd(m), 3, 2), {})],
    "orthogonal_iteration": [lambda: ((spd(m), torch.eye(m).repeat(B, 1, 1), 2), {})],
    "kronecker_power_step": [
        lambda: ((draw(B, N, m, n), spd(m), spd(n)), {}),
        lambda: ((draw(B, N, n, m).half().mT, spd(m), spd(n)), {"scheme": "alternating"}),
    ],
    "precondition": [
        lambda: ((draw(B, m, n), spd(m), spd(n)), {}),
        lambda: ((draw(B, m, n).bfloat16(), None, spd(n).bfloat16()), {"precision": "medium"}),
        lambda: ((draw(B, m, n), None, None), {}),
    ],
    "precondition_": [
        lambda: ((draw(B, m, n, seed=1), draw(B, m, n), spd(m), spd(n)), {}),
        lambda: ((draw(B, n, m, seed=1).mT, draw(B, m, n), None, None), {}),
    ],
    "orthogonalize": [
        lambda: ((draw(B, m, n),), {}),
        lambda: ((draw(B, n, m).double(), MUON), {}),
        lambda: ((draw(B, m, n).half().mT, MUON), {}),
    ],
    "inverse_root": [
        lambda: ((spd(m), 2.0), {}),
        lambda: ((spd(m), 2.0), {"method": "newton", "previous": spd(m, seed=1)}),
        lambda: ((spd(m), 4.0), {"method": "product", "ridge": 1e-4, "precision": "medium"}),
        lambda: ((spd(m).double(), 2.5), {"method": "eigh", "previous": spd(m, seed=1).double()}),
        lambda: ((-spd(m), 2.0), {"method": "newton", "fallback": "eigh"}),
    ],
    "inverse_root_": [
        lambda: ((*root_state(), spd(m), 4.0), {"method": "eigh", "rank_rtol": 1e-6}),
        lambda: ((*root_state(), spd(m), 4.0), {"method": "newton", "fallback": "eigh"}),
    ],
}  # fmt: skip
ALL = [
    pytest.param(name, make, id=f"{name}-{i}")
    for name, cases in CASES.items()
    for i, make in enumerate(cases)
]


def test_every_op_has_a_case():
    names = torch._C._dispatch_get_all_op_names()
    registered = {x.split("::")[1] for x in names if x.startswith("shampoo_kernels::")}
    assert registered == set(CASES)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_opcheck(name, make):
    torch.library.opcheck(getattr(ops, name).default, *make())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "make"), ALL)
def test_autocast_changes_no_bit(name, make, dtype, backend):
    """What an op multiplies in is its contract; autocast would make it bfloat16."""
    results = []
    for enabled in (False, True):
        args, kwargs = make()
        with torch.autocast("cpu", dtype, enabled=enabled), sk.use_backend(backend):
            returned = getattr(ops, name)(*args, **kwargs)
            assert torch.is_autocast_enabled("cpu") == enabled
        results.append((args, kwargs, returned))
    plain, cast = ([x for x in tree_leaves(r) if isinstance(x, torch.Tensor)] for r in results)
    for expected, got in zip(plain, cast, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def described(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [(x.shape, x.stride(), x.dtype) for x in results if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("name", "make"), ALL)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fake_and_meta_tensors_look_like_the_real_result(name, make, kind):
    args, kwargs = make()
    mode = FakeTensorMode()
    change = mode.from_tensor if kind == "fake" else (lambda x: x.to("meta"))
    unreal_args, unreal_kwargs = tree_map_only(torch.Tensor, change, (args, kwargs))
    expected = described(getattr(ops, name)(*args, **kwargs))
    if kind == "fake":
        with mode:
            result = getattr(ops, name)(*unreal_args, **unreal_kwargs)
    else:
        result = getattr(ops, name)(*unreal_args, **unreal_kwargs)
    assert described(result) == expected
    assert all(
        x.device.type == ("cpu" if kind == "fake" else "meta")
        for x in (result if isinstance(result, (tuple, list)) else [result])
        if isinstance(x, torch.Tensor)
    )


@pytest.mark.parametrize("kind", ["real", "meta"])
def test_ops_called_directly_check_as_the_public_functions_do(kind):
    device = "cpu" if kind == "real" else "meta"

    def ones(*shape):
        return torch.ones(shape, device=device)

    a, b, c = ones(2, 3, 3), ones(2, 4, 4), ones(2, 3, 4)
    for call, error, words in (
        (lambda: ops.gram_ema_(a, b, 1, 1, side="left"), ValueError, "stat must"),
        (lambda: ops.eigenvalue_bound(a[0]), ValueError, r"A must be \(B, n, n\)"),
        (lambda: ops.power_iteration(a, 0, 1), ValueError, "steps must"),
        (lambda: ops.orthogonal_iteration(a, b, 1), ValueError, "Q must"),
        (lambda: ops.kronecker_power_step(a, a, a), ValueError, "grads must"),
        (lambda: ops.precondition(c, b, None), ValueError, "left must"),
        (lambda: ops.precondition_(a, c, None, None), ValueError, "out must"),
        (lambda: ops.orthogonalize(c, [1.0, 2.0]), ValueError, "coefficients must"),
        (lambda: ops.orthogonalize(c.int()), TypeError, "G must"),
        (lambda: ops.inverse_root(c, 2.0), ValueError, r"A must be \(B, n, n\)"),
        (lambda: ops.inverse_root(a, -2.0), ValueError, "p must"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


def everything(stat, grad, grads, left, right):
    """Each public function once, on 4-D and 2-D views."""
    stat = sk.gram_ema_(stat, grad, 0.9, 0.1, side="left")
    bound = sk.eigenvalue_bound(stat)
    largest = sk.power_iteration(stat, 3)
    eigenvalues, Q = sk.orthogonal_iteration(stat, left)
    new_left, new_right = sk.kronecker_power_step(grads, left, right)
    root = sk.inverse_root(new_left, Fraction(2), method="newton", ridge=1e-3)
    kept = sk.inverse_root(new_right, 4, out=torch.empty_like(new_right))
    result, norm = sk.precondition(grad, root.root, kept.root, out=torch.empty_like(grad))
    polar = sk.orthogonalize(grad[0])
    muon = sk.orthogonalize(result, coefficients=(2.0, -1.5, 0.5), steps=2)
    return (stat, bound, largest, eigenvalues, Q, new_left, new_right, *root, *kept, result, norm,
            polar, muon)  # fmt: skip


def arguments(batch=B):
    grad = draw(batch, m, n)
    eyes = [torch.eye(k).repeat(batch, 1, 1) for k in (m, n)]
    return torch.zeros(batch, m, m), grad, draw(batch, N, m, n, seed=1), *eyes


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments()), everything(*arguments()))


def test_compile_with_another_batch_size_makes_no_third_graph():
    """The batch size becomes symbolic in the second graph and serves every later one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 7):
        torch.testing.assert_close(compiled(*arguments(batch)), everything(*arguments(batch)))
    assert counter.frame_count <= 2


def test_tensor_factors_make_no_new_graph():
    """beta and alpha as tensors may change from step to step."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def update(stat, grad, beta, alpha):
        return sk.gram_ema_(stat, grad, beta, alpha, side="left")

    compiled = torch.compile(update, fullgraph=True, backend=counter)
    for step in range(1, 5):
        beta, alpha = torch.tensor(1 - 1 / step), torch.tensor(1 / step)
        stat = compiled(torch.ones(B, m, m), draw(B, m, n), beta, alpha)
        torch.testing.assert_close(stat, update(torch.ones(B, m, m), draw(B, m, n), beta, alpha))
    assert counter.frame_count == 1


@pytest.mark.parametrize("beta_as", [float, torch.tensor])
def test_float_factors_make_no_new_graph(beta_as):
    """beta and alpha as Python floats may change from step to step: more values than the eight
    graphs after which torch.compile gives up."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def update(stat, grad, beta, alpha):
        return sk.gram_ema_(stat, grad, beta, alpha, side="left")

    compiled = torch.compile(update, fullgraph=True, backend=counter)
    for step in range(1, 10):
        beta, alpha = beta_as(1 - 1 / step), 1 / step
        stat = compiled(torch.ones(B, m, m), draw(B, m, n), beta, alpha)
        torch.testing.assert_close(stat, update(torch.ones(B, m, m), draw(B, m, n), beta, alpha))
    assert counter.frame_count <= 2  # the first has the first float as a constant
