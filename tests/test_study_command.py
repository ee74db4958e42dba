"""The study in a few steps, its verdicts on made-up numbers, resuming, and what it refuses."""

import csv
import inspect
import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="the study's requirements are not installed")

import torch.nn.functional as F

from shampoo_kernels.__main__ import main
from shampoo_kernels.commands import _data
from shampoo_kernels.commands.study import models, page, runs, settings
from shampoo_kernels.commands.study.claims import claims
from shampoo_kernels.study import layer_names, sample

SIZES = {"steps": 20, "examples": 12, "batches": 4, "batch_sizes": (1, 8)}
TINY = [replace(setting, **SIZES) for setting in settings.DIGITS]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(settings, "quick", lambda: TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def study(folder, *options):
    return main(["study", "--quick", "--seeds", "2", "--output", str(folder), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole study: its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "quick", lambda: TINY)
        folder = tmp_path_factory.mktemp("study")
        assert study(folder) == 0
    return folder


def test_end_to_end(finished, capsys):
    stored = [json.loads(p.read_text()) for p in sorted((finished / "runs").iterdir())]
    assert len(stored) == 6
    written = (finished / "index.html").read_text()
    rows = list(csv.DictReader((finished / "measurements.csv").read_text().splitlines()))
    assert len(rows) == sum(len(run["rows"]) for run in stored)
    # per layer: five points of the Gauss-Newton view, four of Adagrad's, which has none at step 0
    assert len(rows) == 2 * (1 + 3 + 3) * (5 + 4)
    tricks = list(csv.DictReader((finished / "tricks.csv").read_text().splitlines()))
    assert len(tricks) == 2 * (1 + 3 + 3) * 2 * 2 * 2
    for name in ("overview.png", "tricks.png", *(f"{setting.name}.png" for setting in TINY)):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert written.count("data:image/png;base64,") == 5
    for run in stored:
        for row in run["rows"]:
            assert row["cosine_shampoo_squared"] <= row["cosine_optimal"] + 1e-9 <= 1 + 1e-8
    for claim in claims(stored):
        assert page.html.escape(claim.sentence) in written
        assert page.html.escape(claim.measured) in written
        assert claim.verdict in written


def test_the_page_marks_what_had_not_settled():
    rows = [{"converged_kl": True, "converged_spectrum": True}, {"converged_kl": False}]
    assert page.unsettled("kl", rows) == " *"
    assert page.unsettled("spectrum", rows) == page.unsettled("shampoo", rows) == ""


def test_the_page_stands_alone(finished):
    written = (finished / "index.html").read_text()
    outside = re.findall(r"(?:src|href)=.(?!data:)([^\"' >]+)", written)
    assert outside == ["https://arxiv.org/abs/2406.17748"]
    assert "<script" not in written
    assert "cosine 1. Measured in digits-2-logistic: lowest 1.000000000" in written
    for tag in ("table", "tr", "td", "th", "p", "figure", "small", "h2", "h3"):
        assert len(re.findall(f"<{tag}[ >]", written)) == written.count(f"</{tag}>"), tag


def test_a_finished_study_is_not_run_again(finished, monkeypatch, capsys):
    before = (finished / "index.html").read_bytes()
    monkeypatch.setattr(runs, "run", None)
    assert study(finished) == 0
    assert (finished / "index.html").read_bytes() == before
    printed, errors = capsys.readouterr()
    assert not errors
    assert "HOLDS" in printed
    assert str(finished / "index.html") in printed


def test_it_goes_on_where_it_was_stopped_and_ends_the_same(finished, tmp_path, monkeypatch, capsys):
    done, real = [], runs.run

    def stops(setting, data, seed, progress):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((setting.name, seed))
        return real(setting, data, seed, progress)

    monkeypatch.setattr(runs, "run", stops)
    assert study(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert not (tmp_path / "index.html").exists()
    first = done.copy()
    done[:] = [None] * 4  # never stop again
    assert study(tmp_path) == 0
    assert set(first).isdisjoint(done[4:])
    assert len(done) == 7
    for name in ("index.html", "measurements.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": "of other settings"}'])
def test_a_damaged_or_foreign_run_is_none(tmp_path, content):
    path = runs.path_of(tmp_path, TINY[0], 0)
    assert runs.read(path, TINY[0]) is None
    runs.write(path, content)
    assert path.read_text() == content
    assert runs.read(path, TINY[0]) is None
    runs.write(path, json.dumps({"fingerprint": TINY[0].fingerprint()}))
    assert runs.read(path, TINY[0]) is not None
    assert runs.read(path, replace(TINY[0], lr=1.0)) is None


def test_a_write_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    runs.write(path, "old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def made_up(shampoo_squared=0.9, shampoo=0.7, kfac=0.8, sampled=0.85, real=0.88, both=0.4, m=5):
    """One run of one setting; the optimum is 0.92."""
    cosines = {
        "cosine_optimal": 0.92, "cosine_shampoo_squared": shampoo_squared,
        "cosine_shampoo": shampoo,
    }  # fmt: skip
    end = {"cosine_three_steps": shampoo_squared + 0.005, "bound": 0.3}
    place = {"layer": "a", "step": 9, "m": m, "n": 3}
    return {
        "setting": "s",
        "one_step": {"a": 1e-15},
        "rows": [
            place | cosines | end | {"view": "gauss_newton", "cosine_kfac": kfac},
            place | cosines | end | {"view": "adagrad"},
        ],
        "tricks": [
            place | {"labels": kind, "batch_size": size, "shampoo_squared": x, "expectation": x}
            for kind, size, x in (
                ("real", 1, real), ("real", 64, both),
                ("sampled", 1, shampoo_squared), ("sampled", 64, sampled),
            )
        ],
    }  # fmt: skip


def verdicts(*of_runs):
    return [claim.verdict for claim in claims(list(of_runs))]


def test_verdicts_follow_the_numbers():
    assert verdicts(made_up(sampled=0.89)) == ["holds"] * 11
    fails = "does not hold here"
    got = verdicts(made_up(0.5, shampoo=0.6, kfac=0.6, sampled=0.2, real=0.3, both=0.3))
    assert got == ["holds"] + [fails] * 8 + ["holds"] * 2
    # in the order of the page: close twice, further away twice, batches, labels, both, K-FAC
    assert verdicts(made_up(kfac=0.95, sampled=0.89))[8] == fails
    assert verdicts(made_up(sampled=0.89, both=0.86))[7] == fails


def test_seeds_that_disagree_decide_nothing_and_cases_are_counted():
    good, bad = made_up(), made_up(shampoo_squared=0.8)
    close = claims([good, bad])[1]
    assert [case.values for case in close.cases] == [pytest.approx([0.9 / 0.92, 0.8 / 0.92])]
    assert close.cases[0].holds is None
    assert close.verdict == "holds in 0 of 1 cases"
    assert "undecided in 1 of 1 cases" in close.measured
    other = bad | {"setting": "t"}
    close = claims([good, other])[1]
    assert close.verdict == "holds in 1 of 2 cases"
    assert "Furthest off: t, layer a, step 9, Gauss–Newton (0.870)" in close.measured


def test_what_holds_by_construction_is_no_case():
    found = claims([made_up(m=2)])
    assert [claim.verdict for claim in found[1:5]] == ["not measured"] * 4
    assert found[1].measured == "no run has the numbers"


@pytest.mark.parametrize(("name", "lines"), [("ResNet-18", 80), ("ConvNeXt", 80)])
def test_models_have_the_gradients_of_single_examples(name, lines):
    """Nothing in them mixes examples or draws at random: what the samplers ask for."""
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 9])
    model = models.build(name, images, 10, seed=0)
    wanted = settings.RESNET_LAYERS if name == "ResNet-18" else settings.CONVNEXT_LAYERS
    assert set(wanted) <= set(layer_names(model))
    got = sample(model, images, labels, layers=wanted)
    for i in range(3):
        loss = F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
        for layer in wanted:
            (expected,) = torch.autograd.grad(
                loss, model.get_submodule(layer).weight, retain_graph=True
            )
            # float32 sums of at most 1e4 products in another order, relative to the largest entry
            error = (got[layer].values()[i] - expected.flatten(1)).abs().max()
            assert error <= 1e-4 * expected.abs().max()
    same = models.build(name, images, 10, seed=0)
    assert torch.equal(same(images), model(images))
    source = [models.ResNet18, models.ResidualBlock]
    if name == "ConvNeXt":
        source = [models.ConvNeXt, models.ConvNeXtBlock]
    assert sum(len(inspect.getsource(c).splitlines()) for c in source) < lines


def test_two_classes_are_labelled_0_and_1():
    whole, two = _data.load("digits"), settings.load(settings.DIGITS[0])
    kept = torch.isin(whole.train_labels, torch.tensor([4, 9]))
    assert torch.equal(two.train_images, whole.train_images[kept])
    assert torch.equal(two.train_labels, (whole.train_labels[kept] == 9).long())
    assert set(two.validation_labels.tolist()) == {0, 1}


def test_settings_without_data_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(_data.FOLDER, raising=False)
    some = [TINY[0], replace(settings.MNIST[0], **SIZES)]
    monkeypatch.setattr(settings, "SETTINGS", some)
    assert main(["study", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert "study: mnist-2-logistic is left out: t10k" in capsys.readouterr().err
    assert "mnist-2-logistic is left out" in (tmp_path / "index.html").read_text()
    assert main(["study", "--settings", "mnist-2-logistic", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], "--seeds must be from 1 to 1024, got 0"),
        (["--threads", "0"], "--threads must be from 1 to 1024, got 0"),
        (["--settings", "cifar10-resnet18"], "--quick has the settings digits-2-logistic, "),
        (["--output", "file/inside"], "file"),
    ],
)
def test_bad_options_are_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(runs, "run", None)
    assert main(["study", "--quick", *options]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("study: ")
    assert words in errors
    assert errors.count("\n") == 1
