import os
from pathlib import Path

import pytest
import torch

# These run in a process of their own, which test_interpreted.py starts.
INTERPRETED = (
    "test_triton_inverse_root.py",
    "test_product.py",
    "test_triton_gram_ema.py",
    "test_triton_eigenvalue_bound.py",
    "test_triton_power_iteration.py",
    "test_triton_precondition.py",
    "test_triton_both_sides.py",
    "test_tiles.py",
)
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else list(INTERPRETED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of images and text: SHAMPOO_KERNELS_DATA, or shared/data beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    folder = Path(os.environ.get("SHAMPOO_KERNELS_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no data: set SHAMPOO_KERNELS_DATA, there is no {folder}")
    return folder
