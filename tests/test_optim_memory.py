"""What the README's table says of memory is what there is, of ours and of the others."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shampoo_kernels import Shampoo, state_bytes

README = (Path(__file__).parents[1] / "README.md").read_text()
TABLE = README.partition("\nBytes of state for")[2].partition("\n## ")[0]
SHAPES = [(1024, 1024), (768, 3072)]


def said(name):
    """The two numbers in the row of the table that begins with `name`."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", TABLE, re.MULTILINE)
    return [float(cell) for cell in row.split("|")[:2]]


def tensors(value):
    """All in containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def real(make, shape):
    """Bytes of the state for a parameter, after two steps."""
    own = nn.Parameter(torch.zeros(shape))
    optimizer = make([own])
    for _ in range(2):
        own.grad = torch.zeros(shape)
        optimizer.step()
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes()
                for x in tensors(optimizer.state[own])}  # fmt: skip
    return sum(storages.values()) / own.numel()


OURS = {
    '`Shampoo`, also with `application="soap"`': [{}, {"application": "soap", "graft": None}],
    "the same, `root_dtype=torch.bfloat16`": [{"root_dtype": torch.bfloat16}],
    "the same, `p=(2, None)`": [{"p": (2, None)}],
}


@pytest.mark.parametrize("name", OURS)
def test_ours_before_training(name):
    for options in OURS[name]:
        for shape, expected in zip(SHAPES, said(name), strict=True):
            weight = torch.empty(shape, device="meta", requires_grad=True)
            counted = state_bytes([weight], **options).total / weight.numel()
            # rounded to a digit; eigenvalues and counts are some hundredths
            assert counted == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_while_training(shape):
    (expected,) = [x for s, x in zip(SHAPES, said(next(iter(OURS))), strict=True) if s == shape]
    assert real(Shampoo, shape) == pytest.approx(expected, abs=0.06)


@pytest.mark.filterwarnings("ignore")  # DASH asks tensors without memory where they are
@pytest.mark.parametrize("name", ["AdamW", "SOAP", "DASH"])
def test_those_of_torch_and_pytorch_optimizer(name):
    package = torch.optim
    if name != "AdamW":
        package = pytest.importorskip("pytorch_optimizer")
    for shape, expected in zip(SHAPES, said(name), strict=True):
        with FakeTensorMode():
            assert real(getattr(package, name), shape) == pytest.approx(expected, abs=0.06)


def test_those_of_distributed_shampoo():
    folder = os.environ.get("SHAMPOO_KERNELS_PEER_DISTRIBUTED_SHAMPOO")
    if not folder:
        pytest.skip("SHAMPOO_KERNELS_PEER_DISTRIBUTED_SHAMPOO names no checkout")
    if folder not in sys.path:
        sys.path.append(folder)
    peer = pytest.importorskip("distributed_shampoo")
    adam = peer.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)

    def made(own, **options):  # without roots of its own: all state is there at once
        return peer.DistributedShampoo(own, precondition_frequency=100, **options)

    def grafted(own):
        return made(own, betas=(0.9, 0.999), grafting_config=adam)

    name = "Distributed Shampoo, grafted from AdamW"
    for shape, expected in zip(SHAPES, said(name), strict=True):
        assert real(grafted, shape) == pytest.approx(expected, abs=0.06)
        assert real(made, shape) == pytest.approx(expected - 4, abs=0.06)
