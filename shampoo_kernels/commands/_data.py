"""The images the demo trains on: scikit-learn's digits, or MNIST or CIFAR-10 from a folder."""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

DATASETS = ("digits", "mnist", "cifar10")
CLASSES = 10
FOLDER = "SHAMPOO_KERNELS_DATA"
MNIST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
CIFAR10_FILE = "cifar10_subset.npz"
CIFAR10_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_TAR = "cifar-10-binary.tar.gz"  # of the folder: the official binary version
CIFAR10_PARTS = (("data_batch_1.bin", 10_000), ("test_batch.bin", 1_000))  # images to use of each
HELP = f"""
mnist: {" and ".join(MNIST_FILES)}, the gzipped test files.
cifar10: the binary version as {CIFAR10_TAR} or as the folder {CIFAR10_FOLDER} (of which
{" and ".join(f"{count} images of {name}" for name, count in CIFAR10_PARTS)} are used), or
{CIFAR10_FILE}: a NumPy archive of {", ".join(CIFAR10_KEYS)}, all uint8, images (N, 3, 32, 32),
labels (N,).
"""

_SPLIT_SEED = 0
T = TypeVar("T")
_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, tarfile.TarError
)  # fmt: skip


class DataError(Exception):
    """Data that is missing or not what it should be; the message is one line for the user."""


class Data(NamedTuple):
    """Images (N, channels, size, size) float32, standardised; labels (N,) int64 below CLASSES."""

    title: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor


def load(name: str) -> Data:
    """The data set of that name from DATASETS, with its fixed split.

    Raises DataError: no folder, no file, or a file that cannot be read.
    """
    return {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}[name]()


def _digits() -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _split("digits (scikit-learn)", digits.images[:, None], digits.target, validation=450)


def _mnist() -> Data:
    images, labels = (_read(name, _idx) for name in MNIST_FILES)
    _expect(MNIST_FILES[0], images.ndim == 3 and images.shape[1:] == (28, 28) and len(images) > 9)
    _expect(MNIST_FILES[1], labels.shape == images.shape[:1] and labels.max() < CLASSES)
    return _split("MNIST (its test files)", images[:, None], labels, validation=len(labels) // 10)


def _cifar10() -> Data:
    folder = Path(os.environ.get(FOLDER) or ".")
    if (folder / CIFAR10_FOLDER).is_dir():
        read = [_read(f"{CIFAR10_FOLDER}/{n}", Path.read_bytes) for n, _ in CIFAR10_PARTS]
        arrays, name = _records(read), CIFAR10_FOLDER
    elif (folder / CIFAR10_TAR).exists():
        arrays, name = _read(CIFAR10_TAR, lambda path: _records(_members(path))), CIFAR10_TAR
    else:
        arrays, name = _read(CIFAR10_FILE, _npz), CIFAR10_FILE
    for images, labels in (arrays[:2], arrays[2:]):
        _expect(name, images.ndim == 4 and images.shape[1:] == (3, 32, 32) and len(images) > 0)
        _expect(name, labels.shape == images.shape[:1] and labels.max() < CLASSES)
    return _standardised("CIFAR-10 (subset)", *arrays)


def _split(title: str, images: np.ndarray, labels: np.ndarray, validation: int) -> Data:
    """The last `validation` images of a fixed shuffle are for validation."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(images), generator=generator).numpy()
    train, held_out = order[:-validation], order[-validation:]
    return _standardised(title, images[train], labels[train], images[held_out], labels[held_out])


def _standardised(title: str, *arrays: np.ndarray) -> Data:
    """Every channel to mean 0 and standard deviation 1 over the training images."""
    train_images, train_labels, images, labels = (torch.from_numpy(np.array(a)) for a in arrays)
    over = (0, 2, 3)
    mean = train_images.float().mean(over, keepdim=True)
    deviation = train_images.float().std(over, keepdim=True)
    return Data(
        title,
        (train_images.float() - mean) / deviation,
        train_labels.long(),
        (images.float() - mean) / deviation,
        labels.long(),
    )


def _read(name: str, reader: Callable[[Path], T]) -> T:
    folder = os.environ.get(FOLDER)
    if not folder:
        raise DataError(f"{name} is read from the folder in {FOLDER}, which is not set")
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(f"no file {path} ({FOLDER} names the folder)")
    try:
        return reader(path)
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, the number of dimensions, each as big-endian int32, data."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4")
    return np.frombuffer(content[header:], np.uint8).reshape(shape)


def _npz(path: Path) -> list[np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return [archive[key] for key in CIFAR10_KEYS]


def _members(path: Path) -> list[bytes]:
    with tarfile.open(path, "r:gz") as tar:
        files = [tar.extractfile(f"{CIFAR10_FOLDER}/{name}") for name, _ in CIFAR10_PARTS]
        return [file.read() if file else b"" for file in files]


def _records(contents: list[bytes]) -> list[np.ndarray]:
    """Images and labels of the parts; a record is a label, then three planes of 32 x 32 bytes."""
    arrays = []
    for content, (name, count) in zip(contents, CIFAR10_PARTS, strict=True):
        if len(content) % 3073:
            raise DataError(f"{name} in {FOLDER} has {len(content)} bytes, no multiple of 3073")
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)[:count]
        arrays += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]]
    return arrays


def _expect(name: str, holds: bool) -> None:
    if not holds:
        raise DataError(f"{name} in {FOLDER} does not hold the images and labels it should")
