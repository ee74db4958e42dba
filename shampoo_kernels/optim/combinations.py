"""Which options of a param group go together."""

import torch

from shampoo_kernels.chooser import choose
from shampoo_kernels.ops.inverse_root import inverse_root


def check_combinations(group: dict) -> None:
    """ValueError unless the options, each of which is allowed, go together."""
    choose("inverse_root", "cpu", torch.float32)  # a wrong SHAMPOO_KERNELS_BACKEND says so itself
    _check_start(group)
    if group["application"] == "soap":
        _check_twos(group, 'application="soap" (it is Adam, with a square root)')
        if group["graft"] is not None:
            raise ValueError(
                'Shampoo: graft must be None with application="soap" (Adam in the eigenbasis has '
                f"its own scale), got {group['graft']!r}"
            )
    else:
        _check_root_options(group)
        if group["statistic"] == "kl":
            _check_twos(group, 'statistic="kl" (its statistics need inverse square roots)')


def _check_start(group: dict) -> None:
    alone = group["graft"] is None and group["application"] == "root"
    if alone and group["precondition"] and group["start_step"] > 1:
        raise ValueError(
            "Shampoo: start_step must be 1 with graft=None (before start_step the graft alone is "
            f"used), got {group['start_step']}"
        )


def _check_twos(group: dict, what: str) -> None:
    if set(group["p"]) - {2, None}:
        raise ValueError(f"Shampoo: p must be 2 or None on each side with {what}, got {group['p']}")


def _check_root_options(group: dict) -> None:
    """Let inverse_root itself judge what it is given, on an empty stack."""
    for root in set(group["p"]) - {None}:
        try:
            inverse_root(
                torch.empty(0, 2, 2, dtype=torch.float32, device="cpu"),
                root,
                ridge=group["ridge"],
                rank_rtol=group["rank_rtol"],
                method=group["root_method"],
                precision=group["precision"],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Shampoo: root_method, precision, ridge, rank_rtol and p do not fit: {error}"
            ) from None
        if group["refresh_tolerance"] is not None and not isinstance(root, int):
            raise ValueError(
                "Shampoo: p must be an integer with refresh_tolerance (how well a root fits is "
                f"measured by its powers), got {root}"
            )
