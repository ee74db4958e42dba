"""The options of a param group: what is allowed, and the words that say so."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.ops.common import PRECISIONS
from shampoo_kernels.ops.inverse_root import METHODS, inverse_root

STATISTICS = ("shampoo",)
GRAFTS = ("adam", None)
ROOT_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLAGS = ("nesterov", "maximize", "capturable", "precondition")
NAMES = (
    "lr", "betas", "eps", "weight_decay", "shampoo_beta", "p", "ridge", "statistic", "graft",
    "block_size", "max_dimension", "refresh_every", "start_step", "root_method", "precision",
    "nesterov", "maximize", "capturable", "root_dtype", "precondition", "process_group",
)  # fmt: skip


def check(group: dict) -> None:
    """Check the options of one param group and bring `p` and `betas` to plain tuples.

    Raises:
        ValueError: the first option found wrong, with what is allowed and what was given.
    """
    lr = group["lr"]
    _require(_is_real(lr) or _is_one_number(lr), "lr", "a number or a one-element tensor", lr)
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        _require(lr >= 0 and math.isfinite(lr), "lr", "finite and not negative", lr)
    group["betas"] = _betas(group["betas"])
    _require_number(group, "eps", above=0)
    _require_number(group, "weight_decay", least=0)
    _require_number(group, "shampoo_beta", least=0, below=1)
    _require_number(group, "ridge", least=0)
    for name in ("block_size", "max_dimension", "refresh_every", "start_step"):
        _require_count(group, name)
    for name, allowed in (
        ("statistic", STATISTICS),
        ("graft", GRAFTS),
        ("root_method", METHODS),
        ("precision", PRECISIONS),
        ("root_dtype", ROOT_DTYPES),
        ("process_group", (None,)),
    ):
        _require(
            any(group[name] is o or group[name] == o for o in allowed),
            name,
            " or ".join(map(repr, allowed)),
            group[name],
        )
    for name in FLAGS:
        _require(isinstance(group[name], bool), name, "True or False", group[name])
    group["p"] = _roots(group["p"])
    _check_root_options(group)
    if group["graft"] is None and group["precondition"] and group["start_step"] > 1:
        raise ValueError(
            "Shampoo: start_step must be 1 with graft=None (before start_step the graft alone is "
            f"used), got {group['start_step']}"
        )


def _require(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"Shampoo: {name} must be {expected}, got {given!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_one_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _require_number(
    group: dict, name: str, *, least: float | None = None, above: float | None = None,
    below: float = math.inf,
) -> None:  # fmt: skip
    value = group[name]
    low = f"> {above}" if least is None else f">= {least}"
    high = "finite" if below == math.inf else f"< {below}"
    _require(
        _is_real(value) and (value > above if least is None else value >= least) and value < below,
        name,
        f"a number {low} and {high}",
        value,
    )


def _require_count(group: dict, name: str) -> None:
    value = group[name]
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        name,
        "an integer >= 1",
        value,
    )


def _betas(betas: Any) -> tuple[float, float]:
    good = (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(_is_real(beta) and 0 <= beta < 1 for beta in betas)
    )
    _require(good, "betas", "two numbers in [0, 1)", betas)
    return betas[0], betas[1]


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
