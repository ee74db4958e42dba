"""Small models with their losses, and the rule by which two runs of an optimizer agree."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class _GPT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, width), _Attention(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x))
        return self.head(x + self.mlp(self.norms[1](x))).flatten(0, 1)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(),
        nn.Linear(40, 24),
    )  # fmt: skip


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 10)
    )


MODELS = ("mlp", "conv", "gpt")


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The model and the loss of its k-th batch, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {"mlp": _mlp, "conv": _conv, "gpt": _GPT}[name]().to(dtype)
    shapes = {"mlp": (24,), "conv": (3, 8, 8), "gpt": (12,)}
    if name == "gpt":
        inputs = torch.randint(11, (4, 8, 12), generator=generator)
        targets = torch.randint(11, (4, 96), generator=generator)
    else:
        inputs = torch.randn(4, 64, *shapes[name], generator=generator).to(dtype)
        targets = torch.randint(10, (4, 64), generator=generator)
    return model, lambda k: F.cross_entropy(model(inputs[k % 4]), targets[k % 4])


def train(
    name: str,
    make: Callable[[list], torch.optim.Optimizer],
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 20,
    nudge: bool = False,
) -> tuple[Tensor, torch.optim.Optimizer]:
    """The parameters after `steps` steps as one float64 vector, and the optimizer.

    nudge: every gradient one unit in the last place away.
    """
    model, loss = build(name, dtype)
    optimizer = make(list(model.parameters()))
    for k in range(steps):
        optimizer.zero_grad()
        loss(k).backward()
        if nudge:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.copy_(torch.nextafter(p.grad, torch.full_like(p.grad, torch.inf)))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double(), optimizer


def distance(a: Tensor, b: Tensor) -> float:
    """Of two parameter vectors, relative; NaN is as far as can be."""
    gap = float((a - b).norm() / b.norm())
    return gap if gap == gap else float("inf")
