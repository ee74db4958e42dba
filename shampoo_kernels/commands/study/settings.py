"""What the study runs: data, model, layers and sizes of every setting."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import torch

from shampoo_kernels.commands import _data

FORMAT = 3  # of the stored runs: to be raised when what they hold changes


@dataclass(frozen=True)
class Setting:
    """One model on one data set. `layers[0]` stands for the setting where there is room for one."""

    name: str
    data: str  # of _data.DATASETS
    classes: tuple[int, ...]
    model: str
    layers: tuple[str, ...]
    lr: float  # of AdamW
    steps: int = 300
    batch_size: int = 64
    examples: int = 256  # whose exact Gauss-Newton matrix is the truth
    batches: int = 256  # gradients of each batch size that statistics are made of
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)

    @property
    def points(self) -> list[int]:
        """The steps at which the cosines are measured."""
        return sorted({0, *(round(self.steps * share) for share in (0.05, 0.2, 0.5, 1))})

    @property
    def trick_points(self) -> list[int]:
        """Those at which batch sizes and labels are compared: during training, and after."""
        return self.points[2::2]

    def fingerprint(self) -> str:
        """Of all that a stored run depends on."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


ALL = tuple(range(_data.CLASSES))
TWO = (4, 9)  # the two digits that look most alike
MLP_LAYERS = ("hidden1", "hidden2", "output")
RESNET_LAYERS = ("stages.3.1.conv2", "stages.1.1.conv2", "stem", "head")
CONVNEXT_LAYERS = ("stage2.1.expand", "stage1.1.expand", "stage1.1.depthwise", "down", "head")

DIGITS = (
    Setting("digits-2-logistic", "digits", TWO, "logistic regression", ("output",), 1e-2),
    Setting("digits-2-mlp", "digits", TWO, "MLP", MLP_LAYERS, 3e-3),
    Setting("digits-10-mlp", "digits", ALL, "MLP", MLP_LAYERS, 3e-3),
)
MNIST = (
    Setting("mnist-2-logistic", "mnist", TWO, "logistic regression", ("output",), 3e-3),
    Setting("mnist-2-mlp", "mnist", TWO, "MLP", MLP_LAYERS, 1e-3),
    Setting("mnist-10-mlp", "mnist", ALL, "MLP", MLP_LAYERS, 1e-3),
)
CIFAR10 = (
    Setting(
        "cifar10-resnet18", "cifar10", ALL, "ResNet-18", RESNET_LAYERS, 3e-3,
        examples=128, batches=32, batch_sizes=(1, 4, 16, 64, 256),
    ),
    Setting(
        "cifar10-convnext", "cifar10", ALL, "ConvNeXt", CONVNEXT_LAYERS, 2e-3,
        examples=128, batches=32, batch_sizes=(1, 4, 16, 64, 256),
    ),
)  # fmt: skip
SETTINGS = (*DIGITS, *MNIST, *CIFAR10)
SEEDS = 3


def quick() -> list[Setting]:
    """The settings of the embedded data, shorter."""
    return [replace(s, steps=200, batches=128, batch_sizes=(1, 16, 256)) for s in DIGITS]


def load(setting: Setting) -> _data.Data:
    """The images of the setting's classes, labelled 0, 1, ...; DataError where there are none."""
    data = _data.load(setting.data)
    if setting.classes == ALL:
        return data
    parts = []
    for images, labels in (data[1:3], data[3:5]):
        classes = torch.tensor(setting.classes)
        chosen = torch.isin(labels, classes)
        parts += [images[chosen], torch.searchsorted(classes, labels[chosen])]
    return _data.Data(data.title, *parts)


def describe(setting: Setting, title: str) -> str:
    """ "MNIST, two classes (4 and 9), MLP"."""
    if setting.classes == ALL:
        what = "ten classes"
    else:
        what = f"two classes ({' and '.join(map(str, setting.classes))})"
    return f"{title}, {what}, {setting.model}"
