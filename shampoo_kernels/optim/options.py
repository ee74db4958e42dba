"""The options of a param group: what is allowed, and the words that say so."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.ops.common import PRECISIONS
from shampoo_kernels.ops.inverse_root import METHODS
from shampoo_kernels.ops.moments import GRAFTS
from shampoo_kernels.optim.combinations import check_combinations
from shampoo_kernels.optim.distributed.team import is_process_group
from shampoo_kernels.optim.eigenbasis import BASIS_METHODS
from shampoo_kernels.optim.factors import SCALES
from shampoo_kernels.optim.turns import REFRESHES

CHOICES: dict[str, tuple] = {
    "statistic": ("shampoo", "frobenius", "kl"),
    "application": ("root", "soap"),
    "scale": SCALES,
    "graft": GRAFTS,
    "refresh": REFRESHES,
    "root_method": METHODS,
    "basis_method": BASIS_METHODS,
    "precision": PRECISIONS,
    # Roots of small gradients are large: beyond 65504, the largest float16, at ordinary scales.
    "root_dtype": (None, torch.float64, torch.float32, torch.bfloat16),
}
FLAGS = ("nesterov", "maximize", "capturable", "precondition", "decoupled_weight_decay")
NAMES = (
    "lr", "betas", "eps", "weight_decay", "shampoo_beta", "p", "ridge", "statistic", "graft",
    "block_size", "max_dimension", "refresh_every", "start_step", "root_method", "precision",
    "nesterov", "maximize", "capturable", "root_dtype", "precondition", "process_group",
    "application", "scale", "rank_rtol", "basis_method", "refresh", "refresh_tolerance",
    "decoupled_weight_decay", "max_update_rms", "split", "batch_dims",
)  # fmt: skip
_FIXED = tuple(name for name in NAMES if name != "lr")
OPTIONAL: dict[str, dict[str, float]] = {  # None, or a number within
    "rank_rtol": {"below": 1},
    "refresh_tolerance": {"below": 1},
    "max_update_rms": {"least": torch.finfo(torch.float32).tiny},
}
# What came after version 0.1.0's first states, with the value that is what they were made with.
ADDED = {
    "application": "root", "scale": "trace", "rank_rtol": None,
    "basis_method": "orthogonal_iteration", "refresh": "staggered", "refresh_tolerance": None,
    "decoupled_weight_decay": True, "max_update_rms": None, "split": (1, 1), "batch_dims": 0,
}  # fmt: skip


def checked(group: dict) -> dict:
    """The options of one param group as plain numbers, which torch.load(weights_only=True) reads.

    Raises:
        ValueError: the first option found wrong, with what is allowed and what was given.
    """
    for name in NAMES:
        _require(name in group, name, "an option of every param group", None)
    plain: dict[str, Any] = {
        "lr": learning_rate(group["lr"]),
        "betas": _betas(group["betas"]),
        # smaller ones are 0 in float32
        "eps": _number(group, "eps", least=torch.finfo(torch.float32).tiny),
        "weight_decay": _number(group, "weight_decay"),
        "shampoo_beta": _number(group, "shampoo_beta", most=1),
        "ridge": _number(group, "ridge"),
        "p": _roots(group["p"]),
        "split": _split(group["split"]),
        "batch_dims": _count(group, "batch_dims", least=0),
    }
    for name in ("block_size", "max_dimension", "refresh_every", "start_step"):
        plain[name] = _count(group, name)
    for name, bounds in OPTIONAL.items():
        plain[name] = None if group[name] is None else _number(group, name, **bounds)
    for name, allowed in CHOICES.items():
        _require(group[name] in allowed, name, " or ".join(map(repr, allowed)), group[name])
    _require(
        group["process_group"] is None or is_process_group(group["process_group"]),
        "process_group",
        "None or a torch.distributed.ProcessGroup that this process is a member of",
        group["process_group"],
    )
    for name in FLAGS:
        _require(isinstance(group[name], bool), name, "True or False", group[name])
    plain = {name: plain.get(name, group[name]) for name in NAMES}
    check_combinations(plain)
    return plain


def fingerprint(group: dict) -> tuple:
    """Changes when an option other than lr does, or its type: True is not 1 here."""
    values = tuple(map(group.get, _FIXED))
    return values, tuple(map(type, values))


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


def _number(
    group: dict, name: str, *, least: float = 0, most: float = math.inf, below: float = math.inf
) -> float:
    value = group[name]
    high = f"<= {most}" if most < math.inf else "finite" if below == math.inf else f"< {below}"
    good = _is_real(value) and least <= value <= most and value < below
    _require(good, name, f"a number >= {least} and {high}", value)
    return float(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _count(group: dict, name: str, least: int = 1) -> int:
    value = group[name]
    _require(_is_count(value, least), name, f"an integer >= {least}", value)
    return int(value)


def _betas(betas: Any) -> tuple[float, float]:
    good = (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(_is_real(beta) and 0 <= beta < 1 for beta in betas)
    )
    _require(good, "betas", "two numbers in [0, 1)", betas)
    return float(betas[0]), float(betas[1])


def _split(split: Any) -> tuple[int, int]:
    """(pieces of the rows, pieces of the columns); one number is that of the rows."""
    pair = tuple(split) if isinstance(split, (tuple, list)) else (split, 1)
    good = len(pair) == 2 and all(_is_count(count) for count in pair)
    _require(good, "split", "an integer >= 1, or a pair (rows, columns) of them", split)
    return int(pair[0]), int(pair[1])


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
