"""Versions of peers that are installed as often as used from a checkout without metadata."""

import importlib.metadata
from collections.abc import Sequence

from shampoo_kernels.integrations._patching import UnsupportedPeer


def check_if_installed(peer: str, distribution: str, versions: Sequence[str]) -> None:
    """Raise UnsupportedPeer where another version is installed. Of a checkout only what is replaced
    and read can be checked, and is."""
    try:
        found = importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return
    if found not in versions:
        raise UnsupportedPeer(
            f"{peer}: tested with {distribution} {' or '.join(versions)}, got {found} "
            "(any_version=True tries it)"
        )
