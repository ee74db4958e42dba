"""What tests of integrations share: three small models, runs with a peer's optimizer on them, and
the rule by which two runs agree."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from matrices import condition, low_rank, spectrum
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo_kernels.integrations._patching import Integration, UnsupportedPeer

STEPS = 20
DTYPES = (torch.float64, torch.float32)


# float32 takes a handful of runs; `make test` does those of the first model.
CASES = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] if dtype == torch.float32 and name != "mlp" else [],
    )
    for name in ("mlp", "conv", "gpt")
    for dtype in DTYPES
]


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
    within: Callable | contextlib.AbstractContextManager = contextlib.nullcontext,
    nudge: int | None = None,
    warm: int = 0,
    state: dict | None = None,
    steps: range = range(STEPS),
) -> tuple[Tensor, torch.optim.Optimizer]:
    """(all parameters after training as one float64 vector, the optimizer).

    optimizer: makes it from a list of parameters. within: what to train inside of, or what makes
    that. nudge: a seed; every gradient then moves by one unit in the last place, up or down. warm:
    so many first steps go without either. state: {"model": ..., "optimizer": ...} to begin with.
    """
    model, loss = task(name, dtype)
    generator = torch.Generator().manual_seed(nudge or 0)
    torch.manual_seed(2)  # for peers that draw random numbers
    with contextlib.ExitStack() as stack:
        if warm == 0:
            stack.enter_context(within() if callable(within) else within)
        made = optimizer(list(model.parameters()))
        if state is not None:
            model.load_state_dict(state["model"])
            made.load_state_dict(state["optimizer"])
        for step in steps:
            if 0 < warm == step:
                stack.enter_context(within())
            model.zero_grad()
            loss(step).backward()
            if nudge is not None and step >= warm:
                _nudge_(model, generator)
            made.step()
    return flat(model), made


def _nudge_(model: nn.Module, generator: torch.Generator) -> None:
    for p in model.parameters():
        up = torch.randint(2, p.shape, generator=generator, dtype=torch.bool)
        p.grad = torch.nextafter(p.grad, torch.where(up, math.inf, -math.inf).to(p.dtype))


def distance(a: Tensor, b: Tensor, name: str) -> float:
    """How far apart two runs ended, relative to how far they went."""
    start = flat(task(name, torch.float64).model)
    assert a.isfinite().all()
    assert b.isfinite().all()
    moved = (b - start).norm()
    assert moved > 1e-4 * start.norm(), "nothing was trained"
    return float((a - b).norm() / moved)


def tolerance(
    optimizer: Callable, name: str, dtype: torch.dtype, peer: Tensor, warm: int = 0
) -> float:
    """How far apart two runs may end that should agree: 1e-9 in float64; in float32 five times the
    divergence of the peer's own runs whose gradients differ by one unit in the last place. Where
    that is as much as they move, a comparison would say nothing."""
    if dtype == torch.float64:
        return 1e-9
    nudged = (run(optimizer, name, dtype, nudge=seed, warm=warm)[0] for seed in (1, 2, 3))
    allowed = 5 * max(distance(other, peer, name) for other in nudged)
    assert allowed < 0.5
    return allowed


def check_agreement(
    integration: Integration, optimizer: Callable, name: str, dtype: torch.dtype, warm: int = 0
) -> None:
    """The peer's run and the same with the integration on end at the same parameters.

    warm: for peers that begin with the eigenvectors of a singular matrix, which are a matter of
    rounding: so many first steps are the peer's own in both.
    """
    peer, _ = run(optimizer, name, dtype)
    ours, _ = run(optimizer, name, dtype, within=integration.enable, warm=warm)
    assert not integration.enabled
    assert distance(ours, peer, name) <= tolerance(optimizer, name, dtype, peer, warm)


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
    """States have the peer's form, and from a state of either the other goes on as the peer does
    from its own, in float64. (Not all peers resume exactly where they stopped.)"""

    def train(within: Callable, steps: range, state: dict | None = None):
        return run(optimizer, name, torch.float64, within=within, steps=steps, state=state)

    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    on, off = integration.enable, contextlib.nullcontext
    states = []
    for within in (off, on):
        model, _ = task(name, torch.float64)
        parameters, made = train(within, half)
        nn.utils.vector_to_parameters(parameters, model.parameters())
        states.append({"model": model.state_dict(), "optimizer": made.state_dict()})
    assert structure(states[0]["optimizer"]) == structure(states[1]["optimizer"])
    peer, _ = train(off, rest, copy.deepcopy(states[0]))  # a peer may take the tensors over
    for state, within in zip(states, (on, off), strict=True):
        resumed, _ = train(within, rest, state)
        assert distance(resumed, peer, name) <= 1e-9


def need(integration: Integration) -> None:
    """Skip, saying why, where this peer or a tested version of it is not installed."""
    try:
        integration.enable().disable()
    except UnsupportedPeer as error:
        pytest.skip(str(error), allow_module_level=True)


UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def matrices(n: int, dtype: torch.dtype) -> Tensor:
    """(10, n, n) with condition numbers from 1 to 1e12, of rank 3, of half rank with all other
    eigenvalues equal, and the zero matrix but for one entry: a mixed batch."""
    made = [condition(n, 10.0**k) for k in (0, 1, 2, 4, 6, 8, 12)]
    half, corner = torch.arange(n) <= n // 2, torch.arange(n) == 0
    made += [low_rank(n, 3), spectrum(half.double()), torch.diag(corner.double())]
    return torch.stack(made).to(dtype)


def true_root(A: Tensor, p: float, shift: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """((A + shift*I)^(-1/p) by float64 eigh of A as it is rounded, its condition number)."""
    values, vectors = torch.linalg.eigh(A.double())
    values = values.clamp(min=0) + shift
    root = (vectors * values.pow(-1 / p).unsqueeze(-2)) @ vectors.mT
    return root, values.amax(-1) / values.amin(-1)


def error(X: Tensor, truth: Tensor) -> Tensor:
    """Relative, per block; inf where X is not finite."""
    relative = (X.double() - truth).flatten(-2).norm(dim=-1) / truth.flatten(-2).norm(dim=-1)
    return relative.nan_to_num(math.inf, math.inf)


def rounding(X: Tensor, kappa: Tensor, p: float) -> Tensor:
    """How close rounding lets a root (*, n, n) come to the true one: 4u sqrt(kappa n), or a
    backward error of u on every eigenvalue for each of the log2(p) products in a p-th power, which
    the smallest eigenvalue feels as u kappa / p."""
    unit = UNIT[X.dtype] * max(1.0, math.log2(p))
    return torch.maximum(4 * UNIT[X.dtype] * (kappa * X.shape[-1]).sqrt(), unit * kappa / p)


def check_root(ours: Tensor, peer: Tensor, truth: Tensor, kappa: Tensor, p: float) -> None:
    """Where the peer's own algorithm stops early: ours is as close to the float64 value of the
    peer's formula as the peer's result, or as close as rounding lets any come."""
    assert ours.isfinite().all()
    allowed = torch.maximum(error(peer, truth), rounding(ours, kappa, p))
    assert (error(ours, truth) <= allowed).all()
