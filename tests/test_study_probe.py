"""The probe measures what `sample` and `measure` do, within its budget, and leaves no trace."""

import copy
import csv
import json
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shampoo_kernels import Shampoo
from shampoo_kernels.study import GradientHistory, KroneckerProbe, measure, sample

INPUTS = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 3, (6, 16), generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
    )


class Noise(nn.Module):
    """Draws from torch's own generator, in eval mode too."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def optimizer_of(model):
    return Shampoo(model.parameters(), lr=1e-2)


def train(model, optimizer, steps=6, seen=None):
    """`seen(step)` is called where the probe measures: after backward, before the step."""
    torch.manual_seed(5)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS[step]), TARGETS[step]).backward()
        if seen is not None:
            seen(step)
        optimizer.step()


def everything(model, optimizer):
    hooks = [
        (len(m._forward_hooks), len(m._forward_hooks_with_kwargs), m.training)
        for m in model.modules()
    ]
    names = [sorted(vars(m)) for m in model.modules()]
    return hooks, names, len(optimizer._optimizer_step_pre_hooks), sorted(vars(optimizer))


def test_training_with_the_probe_is_the_same_to_the_bit():
    plain, watched = (nn.Sequential(Noise(), *network()) for _ in range(2))
    optimizers = optimizer_of(plain), optimizer_of(watched)
    before = everything(watched, optimizers[1])
    probe = KroneckerProbe(
        watched, optimizers[1], every=2, beta=0.9, labels="expected", seconds=600
    )
    for model, optimizer in zip((plain, watched), optimizers, strict=True):
        train(model, optimizer)
    assert [row["step"] for row in probe.table] == [0] * 4 + [2] * 4 + [4] * 4
    probe.detach()
    assert everything(watched, optimizers[1]) == before
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.requires_grad == b.requires_grad
    rows = len(probe.table)
    train(watched, optimizers[1])
    assert len(probe.table) == rows
    assert probe.step == 6
    probe.detach()  # twice is no error


@pytest.mark.parametrize("labels", ["expected", "real"])
def test_rows_are_the_measurements_of_the_batch(labels):
    model = network()
    model[1].eval()  # batch norm as the probe sees it, so that real labels mean the same loss
    model[3].eval()
    optimizer = optimizer_of(model)
    probe = KroneckerProbe(
        model, optimizer, layers=["0", "4"], every=3, labels=labels, examples=10, seconds=600
    )
    expected = {}

    def seen(step):
        if step % 3 == 0:
            targets = TARGETS[step][:10] if labels == "real" else None
            frozen = copy.deepcopy(model)
            got = sample(frozen, INPUTS[step][:10], targets, labels=labels)
            expected.update({(step, name): measure(grads) for name, grads in got.items()})

    train(model, optimizer, seen=seen)
    assert [(row["step"], row["layer"]) for row in probe.table] == list(expected)
    for row in probe.table:
        truth = expected[row["step"], row["layer"]]
        for name in ("optimal", "shampoo_squared", "shampoo"):
            # float32 sums of 30 products: 30 * 2^-24, and tolerance² of the optimum
            assert row[f"cosine_{name}"] == pytest.approx(truth.cosines[name], abs=2e-5)
        assert row["norm"] == pytest.approx(truth.norm, rel=1e-4)
        assert (row["view"], row["note"]) == ("gauss_newton", "")
        assert row["gradients"] == (30 if labels == "expected" else 10)


def test_the_adagrad_view_is_the_history_of_gradients():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = KroneckerProbe(model, optimizer, layers="0", every=5, beta=0.5, seconds=600)
    history = GradientHistory(0.5)
    train(model, optimizer, seen=lambda step: history.append(model[0].weight.grad))
    row = next(r for r in probe.table if (r["step"], r["view"]) == (5, "adagrad"))
    truth = measure(history.gradients(), names=["shampoo_squared"]).cosines["shampoo_squared"]
    assert row["cosine_shampoo_squared"] == pytest.approx(truth, abs=2e-5)
    assert row["gradients"] == 6


def test_layers_take_turns_within_the_budget(monkeypatch):
    """A clock of its own: every measurement takes one second, the budget is two and a half."""
    clock = [0.0]
    monkeypatch.setattr("shampoo_kernels.study.probe.time.perf_counter", lambda: clock[0])

    def slow(gradients, names):
        clock[0] += 1.0
        return measure(gradients, names=names)

    monkeypatch.setattr("shampoo_kernels.study.probe.measure", slow)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)], nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = KroneckerProbe(model, optimizer, every=1, seconds=2.5)
    train(model, optimizer, steps=4)
    by_step = [[row["layer"] for row in probe.table if row["step"] == s] for s in range(4)]
    assert by_step[0] == ["0", "1", "2"]  # how long they take is not known yet
    assert by_step[1:] == [["3", "4"], ["0", "1"], ["2", "3"]]
    assert probe.seconds == 9
    clock[0] = 36
    assert probe.overhead == 0.25
    probe.detach()
    clock[0] = 72
    assert probe.overhead == 0.25


def test_evaluation_forwards_are_not_measured():
    model = network()
    optimizer = optimizer_of(model)
    with KroneckerProbe(model, optimizer, every=1, seconds=600) as probe:
        model.eval()
        model(INPUTS[0])
        optimizer.step()
        assert not probe.table
        assert probe.step == 1


@pytest.mark.parametrize("labels", ["sampled", "expected", "real"])
def test_numbers_never_raise(labels):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model[4].weight.zero_()
    probe = KroneckerProbe(model, optimizer, every=1, labels=labels, seconds=600)
    train(model, optimizer, steps=1)
    with torch.no_grad():
        model[4].weight.fill_(float("nan"))
    train(model, optimizer, steps=1)
    notes = [(row["layer"], row["note"]) for row in probe.table]
    assert 'the gradient of layer "0" is zero everywhere' in notes[0][1]
    assert notes[1] == ("4", "")
    for (layer, note), expected in zip(notes[2:], ("0", "4"), strict=True):
        assert layer == expected
        assert f'layer "{layer}"' in note
        assert "must be finite, got NaN or infinity" in note


def test_files(tmp_path):
    class Writer:
        written = []

        def add_scalar(self, tag, value, step):
            self.written.append((tag, value, step))

    model = network()
    optimizer = optimizer_of(model)
    probe = KroneckerProbe(model, optimizer, every=3, writer=Writer(), seconds=600)
    train(model, optimizer)
    probe.to_csv(tmp_path / "probe.csv")
    probe.to_json(tmp_path / "probe.json")
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["table"] == probe.table
    assert found["seconds"] > 0
    assert 0 < found["overhead"] < 1
    rows = list(csv.DictReader((tmp_path / "probe.csv").read_text().splitlines()))
    assert [float(row["cosine_shampoo"]) for row in rows] == [
        row["cosine_shampoo"] for row in probe.table
    ]
    assert len(Writer.written) == 3 * len(probe.table) == 12
    assert Writer.written[1] == (
        "kronecker/gauss_newton/0/shampoo_squared", probe.table[0]["cosine_shampoo_squared"], 0,
    )  # fmt: skip


def test_tensorboard(tmp_path):
    model = network()
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="needs TensorBoard: pip install tensorboard"):
            KroneckerProbe(model, optimizer_of(model), writer=tmp_path)
        assert not model._forward_hooks
    else:
        with KroneckerProbe(model, (optimizer := optimizer_of(model)), writer=tmp_path):
            train(model, optimizer, steps=1)
        assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "7"}, 'KroneckerProbe: there is no layer "7"; the model has: 0, 4'),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be above 0, got 0.0"),
        ({"labels": "true"}, 'labels must be "real" or "sampled" or "expected"'),
        ({"loss": "hinge"}, 'loss must be "cross_entropy" or "squared"'),
        ({"names": ["newton"]}, "names are optimal, .*, got 'newton'"),
        ({"beta": 2.0}, "beta must be above 0 and at most 1, got 2.0"),
    ],
)
def test_bad_options(options, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        KroneckerProbe(model, optimizer_of(model), **options)
    assert not model._forward_hooks


def test_a_model_that_is_called_otherwise():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 3)

        def forward(self, x, scale):
            return self.inner(x) * scale

    model = Two()
    KroneckerProbe(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="called with one tensor, got 1 positional and 1 keyword"):
        model(INPUTS[0], scale=2)
    with pytest.raises(TypeError, match="writer must have add_scalar, got int"):
        KroneckerProbe(model, torch.optim.SGD(model.parameters()), writer=3)


def test_overhead_counts_the_measurements():
    model = network()
    optimizer = optimizer_of(model)
    start = time.perf_counter()
    probe = KroneckerProbe(model, optimizer, every=1)
    train(model, optimizer)
    assert 0 < sum(row["seconds"] for row in probe.table) <= probe.seconds
    assert probe.seconds <= time.perf_counter() - start
