"""The networks of the study: small, without anything that mixes examples or draws at random."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def logistic(channels: int, size: int, classes: int) -> nn.Module:
    """One linear layer on the pixels."""
    return _named(flatten=nn.Flatten(), output=nn.Linear(channels * size**2, classes))


def mlp(channels: int, size: int, classes: int) -> nn.Module:
    """Two hidden layers."""
    return _named(
        flatten=nn.Flatten(),
        hidden1=nn.Linear(channels * size**2, 64),
        relu1=nn.ReLU(),
        hidden2=nn.Linear(64, 32),
        relu2=nn.ReLU(),
        output=nn.Linear(32, classes),
    )


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images, 8 channels wide in place of 64, group norm in place of batch
    norm, which would mix the examples."""

    def __init__(self, channels: int, size: int, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(4, width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *[
                nn.Sequential(
                    ResidualBlock(widths[i], widths[i + 1], 1 if i == 0 else 2),
                    ResidualBlock(widths[i + 1], widths[i + 1], 1),
                )
                for i in range(4)
            ]
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """7 x 7 per channel, layer norm, and two linear layers on the channels of every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inner = self.project(F.gelu(self.expand(inner)))
        return x + inner.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches, then two stages of two blocks with a 2 x 2 step down between them."""

    def __init__(self, channels: int, size: int, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 4, 4)
        self.stage1 = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))
        self.down = nn.Conv2d(width, 2 * width, 2, 2)
        self.stage2 = nn.Sequential(ConvNeXtBlock(2 * width), ConvNeXtBlock(2 * width))
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "logistic regression": logistic,
    "MLP": mlp,
    "ResNet-18": ResNet18,
    "ConvNeXt": ConvNeXt,
}


def build(name: str, images: Tensor, classes: int, seed: int) -> nn.Module:
    """The model of that name for images (N, channels, size, size), initialised from the seed."""
    _, channels, size, _ = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](channels, size, classes)
