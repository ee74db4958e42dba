"""The options of a param group: what is allowed, and the words that say so."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose
from shampoo_kernels.ops.common import PRECISIONS
from shampoo_kernels.ops.inverse_root import METHODS, inverse_root
from shampoo_kernels.optim.team import is_process_group

STATISTICS = ("shampoo",)
GRAFTS = ("adam", None)
# Roots of small gradients are large: beyond 65504, the largest float16, at ordinary scales.
ROOT_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16)
FLAGS = ("nesterov", "maximize", "capturable", "precondition")
NAMES = (
    "lr", "betas", "eps", "weight_decay", "shampoo_beta", "p", "ridge", "statistic", "graft",
    "block_size", "max_dimension", "refresh_every", "start_step", "root_method", "precision",
    "nesterov", "maximize", "capturable", "root_dtype", "precondition", "process_group",
)  # fmt: skip


def checked(group: dict) -> dict:
    """The options of one param group as plain numbers, which torch.load(weights_only=True) reads.

    Raises:
        ValueError: the first option found wrong, with what is allowed and what was given.
    """
    for name in NAMES:
        _require(name in group, name, "an option of every param group", None)
    plain = {
        "lr": learning_rate(group["lr"]),
        "betas": _betas(group["betas"]),
        # smaller ones are 0 in float32
        "eps": _number(group, "eps", least=torch.finfo(torch.float32).tiny),
        "weight_decay": _number(group, "weight_decay"),
        "shampoo_beta": _number(group, "shampoo_beta", below=1),
        "ridge": _number(group, "ridge"),
        "p": _roots(group["p"]),
    }
    for name in ("block_size", "max_dimension", "refresh_every", "start_step"):
        plain[name] = _count(group, name)
    for name, allowed in (
        ("statistic", STATISTICS),
        ("graft", GRAFTS),
        ("root_method", METHODS),
        ("precision", PRECISIONS),
        ("root_dtype", ROOT_DTYPES),
    ):
        _require(
            any(group[name] is o or group[name] == o for o in allowed),
            name,
            " or ".join(map(repr, allowed)),
            group[name],
        )
    _require(
        group["process_group"] is None or is_process_group(group["process_group"]),
        "process_group",
        "None or a torch.distributed.ProcessGroup that this process is a member of",
        group["process_group"],
    )
    for name in FLAGS:
        _require(isinstance(group[name], bool), name, "True or False", group[name])
    plain = {name: plain.get(name, group[name]) for name in NAMES}
    _check_root_options(plain)
    if group["graft"] is None and group["precondition"] and group["start_step"] > 1:
        raise ValueError(
            "Shampoo: start_step must be 1 with graft=None (before start_step the graft alone is "
            f"used), got {group['start_step']}"
        )
    return plain


def fingerprint(group: dict) -> tuple:
    """Changes when an option other than lr does, or its type: True is not 1 here."""
    values = (group.get(name) for name in NAMES if name != "lr")
    return tuple((type(value), value) for value in values)


def _require(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"Shampoo: {name} must be {expected}, got {given!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def learning_rate(lr: Any) -> float | Tensor:
    """A float, or the tensor itself, whose value on a GPU is not looked at. Raises ValueError."""
    one_number = isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_complex()
    _require(_is_real(lr) or one_number, "lr", "a number or a one-element tensor", lr)
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        _require(0 <= lr < math.inf, "lr", "finite and not negative", lr)
    return lr if isinstance(lr, Tensor) else float(lr)


def _number(group: dict, name: str, *, least: float = 0, below: float = math.inf) -> float:
    value = group[name]
    high = "finite" if below == math.inf else f"< {below}"
    good = _is_real(value) and least <= value < below
    _require(good, name, f"a number >= {least} and {high}", value)
    return float(value)


def _count(group: dict, name: str) -> int:
    value = group[name]
    good = not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1
    _require(good, name, "an integer >= 1", value)
    return int(value)


def _betas(betas: Any) -> tuple[float, float]:
    good = (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(_is_real(beta) and 0 <= beta < 1 for beta in betas)
    )
    _require(good, "betas", "two numbers in [0, 1)", betas)
    return float(betas[0]), float(betas[1])


def _roots(p: Any) -> tuple[float | None, float | None]:
    """(left, right), each a plain number, so that torch.load(weights_only=True) reads it back."""
    pair = tuple(p) if isinstance(p, (tuple, list)) else (p, p)
    good = len(pair) == 2 and all(
        root is None or (_is_real(root) and 0 < root < math.inf) for root in pair
    )
    _require(good, "p", "a positive number or None, or a pair (left, right) of them", p)
    return _plain(pair[0]), _plain(pair[1])


def _plain(root: Any) -> float | None:
    """2.0 and Fraction(2) are 2, because the iterations want integers; other fractions floats."""
    if root is None:
        return None
    return int(root) if root == int(root) else float(root)


def _check_root_options(group: dict) -> None:
    """Let inverse_root itself judge method, precision, ridge and p together, on an empty stack."""
    choose("inverse_root", "cpu", torch.float32)  # a wrong SHAMPOO_KERNELS_BACKEND says so itself
    for root in set(group["p"]) - {None}:
        try:
            inverse_root(
                torch.empty(0, 2, 2),
                root,
                ridge=group["ridge"],
                method=group["root_method"],
                precision=group["precision"],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Shampoo: root_method, precision, ridge and p do not fit: {error}"
            ) from None
