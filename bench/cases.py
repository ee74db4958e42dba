"""What is measured on: shapes of real models, matrices of a given condition, and their truth."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shampoo_kernels import eigenvalue_bound

Shape = tuple[int, ...]


def transformer_layer(width: int, hidden: int | None = None) -> list[Shape]:
    """Attention (fused q, k, v), two linear layers, their biases and norms (GPT-2, ViT)."""
    hidden = hidden or 4 * width
    matrices = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]
    return [*matrices, (3 * width,), (hidden,), *[(width,)] * 6]


def gpt(width: int, layers: int, vocabulary: int, context: int) -> list[Shape]:
    ends = [(vocabulary, width), (context, width), (width,), (width,)]
    return ends + layers * transformer_layer(width)


def resnet50() -> list[Shape]:
    """25.6 million parameters: stem, 3 + 4 + 6 + 3 bottlenecks, the classifier."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    wide = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, wide, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, wide, 1, 1)] * (block == 0)
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            wide = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[Shape]:
    """86.6 million parameters: 16 x 16 patches of 224 x 224 images."""
    ends = [(768, 3, 16, 16), (768,), (1, 197, 768), (1, 1, 768), (1000, 768), (1000,)]
    return ends + [(768,)] * 2 + 12 * transformer_layer(768)


GPT2 = gpt(768, 12, 50257, 1024)
# Llama 3.2 1B: one of 16 layers; 32 heads of 64 share 8 of keys and values.
LLAMA_LAYER: list[Shape] = [
    (2048, 2048), (512, 2048), (512, 2048), (2048, 2048),
    (8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,),
]  # fmt: skip
LLAMA_1B: list[Shape] = [(128256, 2048), (2048,), *16 * LLAMA_LAYER]  # the head is the embedding
SMALL_GPT = gpt(256, 2, 256, 128)
SMALL_RESNET: list[Shape] = [
    (16, 3, 3, 3), *6 * [(16, 16, 3, 3)],
    (32, 16, 3, 3), *5 * [(32, 32, 3, 3)],
    (64, 32, 3, 3), *5 * [(64, 64, 3, 3)],
    (10, 64), (10,), *7 * [(16,), (16,)], *6 * [(32,), (32,)], *6 * [(64,), (64,)],
]  # fmt: skip
# The stacks (blocks, m, n) that the default block size of 1024 makes of these models.
STACKS = {
    "ResNet-50, 3 x 3, first stage": (3, 64, 576),
    "ResNet-50, 3 x 3, second stage": (8, 128, 576),
    "GPT-2 and ViT-B, attention": (48, 768, 768),
    "GPT-2 and ViT-B, up": (36, 1024, 768),
    "Llama 1B, down, one layer": (16, 1024, 1024),
}


def count(shapes: Iterable[Sequence[int]]) -> int:
    return sum(map(math.prod, shapes))


def described(shapes: Sequence[Shape]) -> str:
    return f"{count(shapes):,} parameters in {len(shapes)} tensors of {len(Counter(shapes))} shapes"


def relative(X: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference over that of the truth, in the worst block."""
    difference = (X.double() - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    return float(difference.nan_to_num(nan=math.inf).max())


def spectrum(batch: int, n: int, condition: float) -> Tensor:
    """(B, n, n) float32: eigenvalues evenly spread in the logarithm, from 1 down."""
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ Q.mT
    return ((A + A.mT) / 2).float()


class Damped:
    """Matrices with their ridge, and the float64 root of the float32 matrices for any p."""

    def __init__(self, batch: int, n: int, condition: float, ridge: float) -> None:
        self.A = spectrum(batch, n, condition)
        self.ridge = ridge
        self.shift = ridge * eigenvalue_bound(self.A)[:, None, None]

    @functools.cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.linalg.eigh(self.A.double()))  # type: ignore[return-value]

    def exact(self, p: float) -> Tensor:
        values, vectors = self._eigh
        powers = (values + self.shift[:, 0].double()).unsqueeze(-2).pow(-1 / p)
        return (vectors * powers) @ vectors.mT

    def error(self, root: Tensor, p: float) -> float:
        return relative(root, self.exact(p))
