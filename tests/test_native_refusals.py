"""What the native ops on square matrices refuse, called directly: everything that would let them
read or write where they should not. bindings_matrices.h holds these checks for the CPU and CUDA."""

import pytest
import torch

from shampoo_kernels import native

if native.lib is None:
    pytest.skip(f"no native kernels: {native.why_not}", allow_module_level=True)

ops = torch.ops.shampoo_kernels_native
B, N = 2, 3


def root_arguments(*before):
    """Those that every inverse root has, in the order of its schema."""
    return {
        "A": torch.eye(N).repeat(B, 1, 1), **dict(before), "scale": None, "previous": None,
        "root": torch.empty(B, N, N), "residual": torch.empty(B),
        "status": torch.empty(B, dtype=torch.int8),
    }  # fmt: skip


CALLS = {
    "eigenvalue_bound": {"A": torch.eye(N).repeat(B, 1, 1)},
    "inverse_root_eigh_": root_arguments(("p", 2.0), ("ridge", 1e-6), ("rank_rtol", None)),
    "inverse_root_newton_": None,  # of its steps more is said below
    "power_iteration": {"A": torch.eye(N).repeat(B, 1, 1), "steps": 2, "vectors": 2},
    "orthogonal_iteration_": {
        "A": torch.eye(N).repeat(B, 1, 1), "Q": torch.eye(N).repeat(B, 1, 1), "lift": 1e-8,
        "steps": 1, "eigenvalues": torch.empty(B, N), "basis": torch.empty(B, N, N),
    },
}  # fmt: skip
OUTPUTS = "root", "residual", "status", "eigenvalues", "basis"


def newton_arguments():
    from shampoo_kernels.ops import roots

    return root_arguments(("p", 2), ("ridge", 1e-6), ("steps", roots.native_steps(1e-6, 2)))


def arguments(name):
    return dict(newton_arguments() if CALLS[name] is None else CALLS[name])


def wrong_tensors(name, given):
    """(argument, what is given in its place)."""
    if "previous" in given:
        given = given | {"previous": torch.zeros(B, N, N), "scale": torch.ones(B)}
    for key, t in given.items():
        if not isinstance(t, torch.Tensor):
            continue
        yield key, t[0]
        yield key, t.to(torch.float16)
        if key != "steps":
            yield key, t[..., :-1]
        if key in ("A", "root", "basis", "Q", "previous"):
            yield key, t[:, :-1]
        if t.ndim > 1 and key != "steps" and key != "A":
            yield key, t[:-1]
        if key == "steps":
            yield key, t[:0]
            yield key, t[:, :2]
            yield key, t.mT.contiguous().mT
        if key in OUTPUTS:
            wide = t[:, None].repeat(1, 2, *(1,) * (t.ndim - 1))[:, 0]  # not contiguous
            yield key, t.mT.contiguous().mT if key == "root" else wide


def wrong_numbers(given):
    for key, values in (
        ("p", (0, -1)), ("ridge", (-1e-6,)), ("rank_rtol", (-0.1,)), ("vectors", (0,)),
    ):  # fmt: skip
        for value in values:
            if key in given:
                yield key, type(value)(value)
    if "vectors" in given:
        yield "steps", 0


@pytest.mark.parametrize("name", CALLS)
def test_what_is_right_is_taken(name):
    getattr(ops, name)(*arguments(name).values())


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_is_refused_by_name(name):
    given, refused = arguments(name), 0
    for key, wrong in (*wrong_tensors(name, given), *wrong_numbers(given)):
        with pytest.raises(RuntimeError, match=rf"{name}: .*") as error:
            getattr(ops, name)(*(given | {key: wrong}).values())
        said = str(error.value).partition(f"{name}: ")[2]
        assert key in said or "p must be" in said, (key, said)
        refused += 1
    assert refused >= 4


def test_an_output_elsewhere_is_refused():
    given = arguments("inverse_root_eigh_")
    for key in ("root", "residual", "status"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ops.inverse_root_eigh_(*(given | {key: given[key].to("meta")}).values())
