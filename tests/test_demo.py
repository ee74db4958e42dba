"""The demo end to end in a few steps, its verdicts on made-up numbers, and what it refuses."""

import gzip
import json
import math
import re
import shutil
import struct
import tarfile

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's requirements are not installed")

import numpy as np

from shampoo_kernels.__main__ import main
from shampoo_kernels.commands import _data, _report, _results
from shampoo_kernels.commands._training import Curve, layer_cosines, layer_shapes, network
from shampoo_kernels.commands.demo import Extent, _check_writable, measure
from shampoo_kernels.study import Cosines, cosines

LAYERS = {"conv1": (16, 9), "conv2": (32, 144), "dense1": (64, 128), "dense2": (10, 64)}
TINY = Extent(steps=4, seeds=2, batch_size=16, probes=2, learning_rates=(1e-2,))


@pytest.fixture(scope="module")
def digits():
    return _data.load("digits")


@pytest.fixture(scope="module", autouse=True)
def few_examples():
    """The cosines of 8 examples, on one thread: most of the time of a short run goes there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shampoo_kernels.commands.demo.EXAMPLES", 8)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(digits):
    return measure(digits, TINY)


def test_end_to_end(tmp_path, capsys):
    picture, numbers = tmp_path / "demo.png", tmp_path / "demo.json"
    options = ["--quick", "--steps", "6", "--batch-size", "32"]
    assert main(["demo", *options, "--output", str(picture), "--json", str(numbers)]) == 0
    printed, errors = capsys.readouterr()
    assert not errors, "the progress bar writes only to a terminal"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in printed

    found = json.loads(numbers.read_text())
    assert found["settings"]["steps"] == 6
    assert found["settings"]["seeds"] == 2
    assert found["summary"] in printed
    for name, row in found["comparison"].items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert all(cell in line for cell in row["shown"].values())
    for curve in found["curves"]["AdamW"] + found["curves"]["Shampoo"]:
        assert curve["steps"] == [0, 1, 2, 3, 4, 5, 6]
        assert len(curve["loss"]) == len(curve["seconds"]) == len(curve["accuracy"]) == 7
    for optimizer in ("AdamW", "Shampoo"):
        losses = [curve["loss"][-1] for curve in found["curves"][optimizer]]
        assert found["comparison"]["final validation loss"][optimizer] == losses
        assert f"{sum(losses) / 2:.4f} ± " in printed
    for layer, (m, n) in LAYERS.items():
        cosines = found["cosines"][layer]
        line = f"{layer:<10}{f'{m} x {n}':<12}"
        assert line + "".join(f"{value:>10.4f}" for value in cosines.values()) in printed
        assert cosines["shampoo_squared"] <= cosines["optimal"] <= 1
        assert [len(trace["layers"][layer]) for trace in found["traces"]] == [3, 3]


def test_same_seeds_give_the_same_numbers(digits, measured):
    first, second = measured, measure(digits, TINY)
    assert first.tuning == second.tuning
    assert first.traces == second.traces
    for name in first.curves:
        for a, b in zip(first.curves[name], second.curves[name], strict=True):
            assert (a.seed, a.steps, a.loss, a.accuracy) == (b.seed, b.steps, b.loss, b.accuracy)


def test_both_optimizers_start_from_the_same_weights_and_seeds_differ(measured):
    adamw, shampoo = measured.curves["AdamW"], measured.curves["Shampoo"]
    assert [c.loss[0] for c in adamw] == [c.loss[0] for c in shampoo]
    assert adamw[0].loss[0] != adamw[1].loss[0]
    assert measured.shapes == LAYERS


def test_cosines_are_those_of_single_examples(digits):
    model = network(digits.train_images, seed=0)
    images, labels = digits.train_images[:5], digits.train_labels[:5]
    found = layer_cosines(model, images, labels)
    assert set(found) == set(layer_shapes(model))
    losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    for layer, cosines_found in found.items():
        weight = model.get_submodule(layer).weight
        grads = [torch.autograd.grad(x, weight, retain_graph=True)[0].flatten(1) for x in losses]
        # float32 gradients: sums of at most 64 products, and the optimum's tolerance, squared
        assert cosines_found == pytest.approx(cosines(torch.stack(grads)), abs=1e-5)


def test_a_layer_without_gradient_has_no_cosine(digits):
    model = network(digits.train_images, seed=0)
    torch.nn.init.zeros_(model.dense2.weight)
    found = layer_cosines(model, digits.train_images[:3], digits.train_labels[:3])
    assert math.isnan(found["dense1"].optimal)
    assert found["dense2"].optimal > 0


def made_up(adamw, shampoo, seconds=(1.0, 2.0), rates=(1e-3, 1e-2, 1e-1), best=1e-2):
    """A result whose validation losses are these, one list per seed; seconds a step."""

    def curves(losses, seconds):
        return [
            Curve(
                seed,
                steps=list(range(len(loss))),
                seconds=[seconds * i for i in range(len(loss))],
                loss=loss,
                accuracy=[1 - value / 10 if math.isfinite(value) else 0.1 for value in loss],
            )
            for seed, loss in enumerate(losses, start=2)
        ]

    tuning = {rate: 0.1 if rate == best else 0.2 for rate in rates}
    cosines = {"a": [Cosines(0.8, 0.7, 0.6)], "b": [Cosines(0.9, 0.5, 0.6)]}
    return _results.Result(
        settings={
            "data": "made up", "training_images": 1, "validation_images": 1, "steps": 2,
            "batch_size": 1, "threads": 1, "evaluated_every": 1, "examples": 1,
            "tuning_seeds": (0, 1),
        },
        tuning={"AdamW": tuning, "Shampoo": tuning},
        curves={"AdamW": curves(adamw, seconds[0]), "Shampoo": curves(shampoo, seconds[1])},
        shapes={"a": (2, 3), "b": (3, 4)},
        traces=[_results.Trace(seed, [2], cosines) for seed in range(2, 2 + len(adamw))],
    )  # fmt: skip


def rows(result):
    return {row.name: row for row in _results.comparison(result)}


def one_line(text):
    return " ".join(text.split())


def test_it_says_so_when_adamw_wins():
    result = made_up([[2.0, 0.5, 0.1], [2.0, 0.6, 0.2]], [[2.0, 1.0, 0.5], [2.0, 1.0, 0.6]])
    found = rows(result)
    assert {row.better() for row in found.values()} == {"AdamW"}
    assert found["steps to AdamW's loss"].cell("Shampoo") == "not reached"
    assert found["steps to AdamW's loss"].cell("AdamW") == "2"
    summary = one_line(_report.summary(result))
    assert "Shampoo does not reach AdamW's final validation loss in 2 steps." in summary
    assert "Shampoo is better in every seed: nothing." in summary
    assert f"AdamW is better in every seed: {', '.join(found)}." in summary
    for line in _report.comparison_table(result).splitlines()[2:]:
        assert line.endswith(" AdamW")


def test_it_says_so_when_shampoo_wins():
    result = made_up([[2.0, 1.0, 0.5], [2.0, 1.0, 0.6]], [[2.0, 0.5, 0.1], [2.0, 0.6, 0.2]])
    found = rows(result)
    assert found["steps to AdamW's loss"].cell("Shampoo") == "1"
    assert found["seconds to AdamW's loss"].cell("Shampoo") == "2.00 s"
    assert found["final validation loss"].cell("Shampoo") == "0.1500 ± 0.0707"
    assert found["seconds to AdamW's loss"].verdict() == "equal"
    summary = one_line(_report.summary(result))
    assert (
        "reaches AdamW's final validation loss after 1 step or 2.00 s, AdamW itself after 2 "
        in (summary)
    )
    assert "AdamW is better in every seed: milliseconds a step." in summary


def test_seeds_that_disagree_decide_nothing():
    result = made_up([[2.0, 0.5], [2.0, 0.5], [2.0, 0.5]], [[2.0, 0.4], [2.0, 0.4], [2.0, 0.6]])
    row = rows(result)["final validation loss"]
    assert row.better() == ""
    assert row.verdict() == "undecided (AdamW in 1, Shampoo in 2)"
    assert rows(result)["steps to AdamW's loss"].cell("Shampoo") == "1 (in 2 of 3)"
    assert "do not agree or are equal: steps to AdamW's loss, final" in one_line(
        _report.summary(result)
    )


def test_a_run_that_diverged_is_never_the_better_one():
    result = made_up([[2.0, 0.5]], [[2.0, math.inf]])
    assert rows(result)["final validation loss"].cell("Shampoo") == "diverged"
    assert rows(result)["final validation loss"].better() == "AdamW"
    result = made_up([[2.0, math.inf]], [[2.0, 0.5]])
    assert rows(result)["steps to AdamW's loss"].cell("Shampoo") == "not reached"
    assert json.dumps(_report.numbers(result), allow_nan=False)


def test_the_share_of_the_optimum_is_computed():
    summary = one_line(_report.summary(made_up([[1.0, 0.5]], [[1.0, 0.5]])))
    assert "Shampoo² has 55.6 to 87.5 % of the optimal cosine, Shampoo 66.7 to 75.0 %" in summary
    assert "Shampoo² is the closer one in 1 of 2 layers" in summary


@pytest.mark.parametrize(("best", "edge"), [(1e-3, True), (1e-2, False), (1e-1, True)])
def test_a_learning_rate_at_the_edge_of_the_grid_is_named(best, edge):
    table = _report.tuning_table(made_up([[1.0, 0.5]], [[1.0, 0.5]], best=best))
    assert ("AdamW: the best learning rate is at the edge of the grid" in table) == edge
    assert table.count("*") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seeds", "-1"], "--seeds must be at least 1, got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "1348"], "--batch-size must be at most 1347, the training images, got"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "100000"], "--threads must be at most 1024, got 100000"),
        (["--output", "nowhere/demo.png"], "--output cannot be written"),
        (["--output", "demo.txt"], "--output must end in .png or .pdf or .svg, got demo.txt"),
        (["--json", "nowhere/demo.json"], "--json cannot be written"),
        (["--json", "demo.png"], "--json must end in .json, got demo.png"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_training(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shampoo_kernels.commands.demo.measure", None)
    assert main(["demo", *options]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("demo: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_single_step_and_seed_are_singular():
    text = _report.text(made_up([[1.0, 0.5]], [[1.0, 0.4]]))
    assert "over seed 2\n" in text
    assert "one every step;" in text
    assert not re.search(r"\b1 steps|seeds \d+\b(?!,)", text)


def test_a_link_to_no_file_yet_stays_a_link(tmp_path):
    link, target = tmp_path / "link.png", tmp_path / "demo.png"
    link.symlink_to(target)
    _check_writable("--output", link, (".png",))
    assert link.is_symlink()
    assert not target.exists()


def test_a_wrong_backend_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHAMPOO_KERNELS_BACKEND", "fast")
    assert main(["demo", "--output", str(tmp_path / "demo.png")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("demo: SHAMPOO_KERNELS_BACKEND must be one of reference, native")
    assert errors.count("\n") == 1


def write_mnist(folder, images, labels):
    for name, array in zip(_data.MNIST_FILES, (images, labels), strict=True):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))


def test_mnist_and_cifar10_are_read_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_data.FOLDER, str(tmp_path))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, 50, dtype=np.uint8)
    write_mnist(tmp_path, images, labels)
    data = _data.load("mnist")
    assert data.train_images.shape == (45, 1, 28, 28)
    assert data.validation_images.shape == (5, 1, 28, 28)
    both = torch.cat([data.train_labels, data.validation_labels])
    assert sorted(both.tolist()) == sorted(labels.tolist())

    colour = random.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    np.savez(
        tmp_path / _data.CIFAR10_FILE,
        train_images=colour, train_labels=labels[:20],
        test_images=colour[:5], test_labels=labels[:5],
    )  # fmt: skip
    data = _data.load("cifar10")
    assert data.train_labels.tolist() == labels[:20].tolist()
    # Standardised per channel, in float32 over 20,480 numbers.
    torch.testing.assert_close(data.train_images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_images.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)
    assert network(data.train_images, seed=0)(data.train_images).shape == (20, 10)


def write_cifar10(folder, images, labels):
    """The files of the binary version: a byte of label, then the image, one after the other."""
    (folder / _data.CIFAR10_FOLDER).mkdir()
    for name, _ in _data.CIFAR10_PARTS:
        records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], 1)
        (folder / _data.CIFAR10_FOLDER / name).write_bytes(records.tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_the_binary_version_of_cifar10_is_read(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(_data.FOLDER, str(tmp_path))
    monkeypatch.setattr(_data, "CIFAR10_PARTS", (("data_batch_1.bin", 6), ("test_batch.bin", 4)))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    write_cifar10(tmp_path, images, labels)
    folder = tmp_path / _data.CIFAR10_FOLDER
    if packed:
        with tarfile.open(tmp_path / _data.CIFAR10_TAR, "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
    data = _data.load("cifar10")
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.validation_labels.tolist() == [0, 1, 2, 3]
    expected = torch.from_numpy(images[:6]).float()
    mean, deviation = expected.mean((0, 2, 3)), expected.std((0, 2, 3))
    for channel in range(3):  # (x - mean) / deviation, in float32
        scaled = data.train_images[:, channel] * deviation[channel] + mean[channel]
        torch.testing.assert_close(scaled, expected[:, channel], rtol=1e-5, atol=1e-3)

    path = tmp_path / _data.CIFAR10_TAR if packed else folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["demo", "--data", "cifar10", "--output", str(tmp_path / "demo.png")]) == 1
    errors = capsys.readouterr().err
    assert path.name in errors
    assert errors.count("\n") == 1


def broken_files(kind, folder):
    images = np.zeros((10, 28, 28), np.uint8)
    write_mnist(folder, images, np.zeros(10, np.uint8))
    path = folder / _data.MNIST_FILES[0]
    if kind == "not gzip":
        path.write_bytes(b"hello")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "not IDX":
        path.write_bytes(gzip.compress(b"hello world"))
    elif kind == "too short":
        content = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(content[:-1]))
    elif kind == "other length":
        write_mnist(folder, images, np.zeros(5, np.uint8))
    elif kind == "no label":
        write_mnist(folder, images, np.full(10, 10, np.uint8))
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "kind",
    ["not gzip", "cut off", "not IDX", "too short", "other length", "no label", "missing"],
)
def test_broken_mnist_is_one_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(_data.FOLDER, str(tmp_path))
    broken_files(kind, tmp_path)
    assert main(["demo", "--data", "mnist", "--output", str(tmp_path / "demo.png")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("demo: ")
    assert "-ubyte.gz" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_broken_cifar10_is_one_line(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(_data.FOLDER, str(tmp_path))
    (tmp_path / _data.CIFAR10_FILE).write_bytes(content)
    assert main(["demo", "--data", "cifar10", "--output", str(tmp_path / "demo.png")]) == 1
    errors = capsys.readouterr().err
    assert _data.CIFAR10_FILE in errors
    assert errors.count("\n") == 1


def test_cifar10_without_its_arrays_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(_data.FOLDER, str(tmp_path))
    np.savez(tmp_path / _data.CIFAR10_FILE, train_images=np.zeros((2, 3, 32, 32), np.uint8))
    assert main(["demo", "--data", "cifar10", "--output", str(tmp_path / "demo.png")]) == 1
    assert "train_labels" in capsys.readouterr().err


def test_no_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(_data.FOLDER, raising=False)
    assert main(["demo", "--data", "mnist", "--output", str(tmp_path / "demo.png")]) == 1
    assert "SHAMPOO_KERNELS_DATA, which is not set" in capsys.readouterr().err
