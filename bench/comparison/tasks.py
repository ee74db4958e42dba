"""What is trained: a character GPT on tinyshakespeare, a small ResNet on CIFAR-10."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shampoo_kernels.commands import _data
from shampoo_kernels.commands._training import batches

TEXT_FILE = "tinyshakespeare.txt"
Validation = tuple[Tensor, float | None]  # mean loss; accuracy where the task has one
NextLoss = Callable[[], Tensor]  # the mean loss of a batch that is drawn already


@dataclass(frozen=True)
class Task:
    """One model on one data set; `width`, `depth`: blocks of the GPT, or of each ResNet stage."""

    name: str
    title: str
    data: str
    width: int
    depth: int
    steps: int
    warmup: int
    batch_size: int
    evaluate_every: int
    weight_decay: float = 0.1
    context: int = 64  # characters; of the GPT alone
    validation: int = 1000  # windows or images, the same at every evaluation
    about_seconds: float = 45.0  # of one run on one core, until there are runs to tell


TASKS = (
    Task(
        "gpt", "character GPT on tinyshakespeare", "tinyshakespeare", width=96, depth=3, steps=500,
        warmup=40, batch_size=16, evaluate_every=25, validation=128, about_seconds=40,
    ),
    Task(
        "resnet", "ResNet on CIFAR-10 (subset)", "cifar10", width=16, depth=1, steps=600,
        warmup=40, batch_size=64, evaluate_every=25, about_seconds=50,
    ),
)  # fmt: skip


def quick() -> tuple[Task, ...]:
    """A few steps of each; images are the digits of scikit-learn, which need no folder."""
    short: dict[str, Any] = {"steps": 6, "warmup": 1, "evaluate_every": 3, "about_seconds": 1.0}
    gpt, resnet = (replace(task, **short) for task in TASKS)
    digits: dict[str, Any] = {"title": "ResNet on digits (scikit-learn)", "data": "digits"}
    return replace(gpt, width=32, validation=16), replace(resnet, width=8, validation=450, **digits)


class Training:
    """A task's data and model. Both come from the seed and from generators of their own, which no
    optimizer advances: every method starts with the same weights and sees the same batches."""

    def __init__(self, task: Task, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model, self._next_loss, self._validate = _START[task.name](task, seed)
        hidden = self.model.hidden()
        ids = {id(p) for p in hidden}
        self.hidden = hidden
        self.others = [p for p in self.model.parameters() if id(p) not in ids]

    def next_batch(self) -> NextLoss:
        """Draw the next batch; returns what computes its mean loss."""
        return self._next_loss()

    @torch.no_grad()
    def validate(self) -> tuple[float, float | None]:
        """Mean loss and accuracy, if any, over the same examples every time."""
        self.model.eval()
        loss, accuracy = self._validate()
        self.model.train()
        return float(loss), accuracy


def check_data(task: Task) -> None:
    """Raises DataError where the data of the task is not there."""
    _text() if task.name == "gpt" else _data.load(task.data)


def _text() -> str:
    folder = os.environ.get(_data.FOLDER)
    if not folder:
        raise _data.DataError(
            f"{TEXT_FILE} is read from the folder in {_data.FOLDER}, which is not set"
        )
    try:
        return (Path(folder) / TEXT_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _data.DataError(f"{Path(folder) / TEXT_FILE} cannot be read: {error}") from None


class Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class GPT(nn.Module):
    """Every layer starts as torch makes it, which suits AdamW: at 0.012 it ends at 2.05, with
    N(0, 0.02²) for all matrices at 2.23, for the embeddings alone at 2.46 (seed 0)."""

    def __init__(self, characters: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def hidden(self) -> list[nn.Parameter]:
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, characters)
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolution(nn.Module):
    """A 3 x 3 convolution whose weight is kept as the matrix (out, 9 * in): every optimizer sees
    the same matrices, and Muon takes no others."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.inside, self.stride = inside, stride
        self.weight = nn.Parameter(torch.empty(outside, 9 * inside))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, self.inside, 3, 3)
        return F.conv2d(x, weight, stride=self.stride, padding=1)


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity; where the shape changes, beside its pooled, padded
    version, which has no weights."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, outside - inside
        self.conv1 = Convolution(inside, outside, stride)
        self.norm1 = nn.GroupNorm(4, outside)
        self.conv2 = Convolution(outside, outside)
        self.norm2 = nn.GroupNorm(4, outside)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        beside = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.relu(self.norm2(self.conv2(inner)) + F.pad(beside, (0, 0, 0, 0, 0, self.more)))


class ResNet(nn.Module):
    """Three stages of width, 2 width and 4 width channels, with group norm."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, width)
        stages, inside = [], width
        for stage in range(3):
            for block in range(depth):
                outside = width << stage
                stages.append(ResidualBlock(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inside, _data.CLASSES)

    def hidden(self) -> list[nn.Parameter]:
        return [m.weight for m in self.modules() if isinstance(m, Convolution)]

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, size, size) -> (B, classes)
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


Start = tuple[GPT | ResNet, Callable[[], NextLoss], Callable[[], Validation]]


def _start_gpt(task: Task, seed: int) -> Start:
    """The first 90 % of the text are trained on; windows spread over the rest validate."""
    text = _text()
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in text])
    cut = len(tokens) * 9 // 10
    training, held_out = tokens[:cut], tokens[cut:]
    offsets = torch.arange(task.context + 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.linspace(0, len(held_out) - task.context - 1, task.validation).long()
    windows = held_out[starts[:, None] + offsets]
    model = GPT(len(characters), task.width, task.depth, task.context)

    def loss_of(scores: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())

    def next_loss() -> NextLoss:
        high = cut - task.context
        start = torch.randint(high, (task.batch_size, 1), generator=generator)
        batch = training[start + offsets]
        return lambda: loss_of(model(batch[:, :-1]), batch)

    def validate() -> Validation:
        scores = torch.cat([model(part[:, :-1]) for part in windows.split(16)])
        return loss_of(scores, windows), None

    return model, next_loss, validate


def _start_resnet(task: Task, seed: int) -> Start:
    """No augmentation; the first images of the data's own validation part validate."""
    data = _data.load(task.data)
    images, labels = data.validation_images[: task.validation], data.validation_labels
    stream = batches(len(data.train_images), task.batch_size, seed)
    model = ResNet(images.shape[1], task.width, task.depth)

    def next_loss() -> NextLoss:
        index = next(stream)
        batch, truth = data.train_images[index], data.train_labels[index]
        return lambda: F.cross_entropy(model(batch), truth)

    def validate() -> Validation:
        scores = torch.cat([model(part) for part in images.split(128)])
        truth = labels[: len(images)]
        return F.cross_entropy(scores, truth), float((scores.argmax(1) == truth).float().mean())

    return model, next_loss, validate


_START = {"gpt": _start_gpt, "resnet": _start_resnet}
