"""What tests of integrations share: three small models, runs with a peer's optimizer on them, and
the rule by which two runs agree."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo_kernels.integrations._patching import Integration, UnsupportedPeer

STEPS = 20
DTYPES = (torch.float64, torch.float32)


class Task(NamedTuple):
    """A model and its loss on the batch of a step."""

    model: nn.Module
    loss: Callable[[int], Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 24, width: int = 16, length: int = 12):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.attention = Attention(width, 2)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.attention(x)
        return self.head(x + self.mlp(x))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 10)
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


MODELS = {"mlp": (_mlp, (20,)), "conv": (_conv, (3, 8, 8)), "gpt": (GPT, None)}


def task(name: str, dtype: torch.dtype, batch: int = 64) -> Task:
    """The same weights and batches, to rounding, in every dtype."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    if shape is None:
        text = torch.randint(24, (STEPS, batch, 13), generator=generator)

        def loss(step: int) -> Tensor:
            logits = model(text[step, :, :-1])
            return F.cross_entropy(logits.flatten(0, 1), text[step, :, 1:].flatten())
    else:
        x = torch.randn(STEPS, batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(10, (STEPS, batch), generator=generator)

        def loss(step: int) -> Tensor:
            return F.cross_entropy(model(x[step]), y[step])

    return Task(model, loss)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def run(
    optimizer: Callable[[list], torch.optim.Optimizer],
    name: str,
    dtype: torch.dtype,
    *,
    within: contextlib.AbstractContextManager | None = None,
    nudge: int | None = None,
    state: dict | None = None,
    steps: range = range(STEPS),
) -> tuple[Tensor, torch.optim.Optimizer]:
    """(all parameters after training as one float64 vector, the optimizer).

    optimizer: makes it from a list of parameters. within: what to train inside of. nudge: a seed;
    every gradient then moves by one unit in the last place, up or down. state: {"model": ...,
    "optimizer": ...} to begin with.
    """
    model, loss = task(name, dtype)
    generator = torch.Generator().manual_seed(nudge or 0)
    torch.manual_seed(2)  # for peers that draw random numbers
    with within or contextlib.nullcontext():
        made = optimizer(list(model.parameters()))
        if state is not None:
            model.load_state_dict(state["model"])
            made.load_state_dict(state["optimizer"])
        for step in steps:
            model.zero_grad()
            loss(step).backward()
            if nudge is not None:
                for p in model.parameters():
                    up = torch.randint(2, p.shape, generator=generator, dtype=torch.bool)
                    infinity = torch.where(up, math.inf, -math.inf).to(dtype)
                    p.grad = torch.nextafter(p.grad, infinity)
            made.step()
    return flat(model), made


def distance(a: Tensor, b: Tensor, name: str) -> float:
    """How far apart two runs ended, relative to how far they went."""
    start = flat(task(name, torch.float64).model)
    assert a.isfinite().all()
    assert b.isfinite().all()
    moved = (b - start).norm()
    assert moved > 1e-4 * start.norm(), "nothing was trained"
    return float((a - b).norm() / moved)


def tolerance(optimizer: Callable, name: str, dtype: torch.dtype, peer: Tensor) -> float:
    """How far apart two runs may end that should agree: 1e-9 in float64; in float32 five times the
    divergence of the peer's own runs whose gradients differ by one unit in the last place."""
    if dtype == torch.float64:
        return 1e-9
    nudged = (run(optimizer, name, dtype, nudge=seed)[0] for seed in (1, 2, 3))
    return 5 * max(distance(other, peer, name) for other in nudged)


def check_agreement(
    integration: Integration, optimizer: Callable, name: str, dtype: torch.dtype
) -> None:
    """The peer's run and the same with the integration on end at the same parameters."""
    peer, _ = run(optimizer, name, dtype)
    ours, _ = run(optimizer, name, dtype, within=integration.enable())
    assert not integration.enabled
    assert distance(ours, peer, name) <= tolerance(optimizer, name, dtype, peer)


def structure(value: object) -> object:
    """A state without its numbers: keys, shapes and dtypes, and the fields of objects."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {k: structure(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(v) for v in value]
    return structure(vars(value)) if hasattr(value, "__dict__") else type(value)


def check_state(integration: Integration, optimizer: Callable, name: str) -> None:
    """States have the peer's form, and either run goes on from the other's, in float64."""
    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    whole, _ = run(optimizer, name, torch.float64)
    states = []
    for first in (contextlib.nullcontext, integration.enable):
        model, _ = task(name, torch.float64)
        parameters, made = run(optimizer, name, torch.float64, within=first(), steps=half)
        nn.utils.vector_to_parameters(parameters, model.parameters())
        states.append({"model": model.state_dict(), "optimizer": made.state_dict()})
    assert structure(states[0]["optimizer"]) == structure(states[1]["optimizer"])
    for state, then in zip(states, (integration.enable, contextlib.nullcontext), strict=True):
        resumed, _ = run(optimizer, name, torch.float64, within=then(), state=state, steps=rest)
        assert distance(resumed, whole, name) <= 1e-9


def need(integration: Integration) -> None:
    """Skip, saying why, where this peer or a tested version of it is not installed."""
    try:
        integration.enable().disable()
    except UnsupportedPeer as error:
        pytest.skip(str(error), allow_module_level=True)
