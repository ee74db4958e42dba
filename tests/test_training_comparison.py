"""bench/training.py: the search, what is made of runs, and going on after a stop, on made-up runs;
the networks and a run of two steps for real."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the demo's requirements are not installed")
pytest.importorskip("tqdm", reason="the demo's requirements are not installed")
sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from comparison import methods, results, runs, search, tasks
from comparison.methods import METHODS, Method
from comparison.plan import Plan, complete
from comparison.runs import Key, Run

TASK = tasks.TASKS[0]
ADAMW, SHAMPOO = methods.named(["AdamW", "Shampoo"])
NAN = Run([0], [0.0], [4.0], None, 9.0, 1.0, "loss nan at step 25")


def made_up(lowest, steps=(0, 250, 500), seconds=(0.0, 5.0, 10.0)):
    """Straight from a loss of 4 down to `lowest`."""
    losses = [4 + (lowest - 4) * step / steps[-1] for step in steps]
    return Run(list(steps), list(seconds), losses, None, 20.0, 11.0, "")


def bowl(best):
    """A trainer whose lowest loss has its minimum 1 at lr = best[method], 0.01 higher a seed."""

    def train(key, threads):
        distance = abs(math.log2(key.lr / best[key.method.name]))
        return made_up(1 + 0.1 * distance + 0.01 * key.seed)

    return train


def searched(start, loss):
    """All rates that the search tries, and the best of them."""
    losses = {}
    while missing := search.search(start, losses).missing:
        assert not losses.keys() & set(missing), "no rate is tried twice"
        losses |= {lr: loss(lr) for lr in missing}
    return losses, min(losses, key=losses.get)


@pytest.mark.parametrize("best", [1.5e-3, 3e-3, 4.24e-3, 1.2e-2, 3.39e-2, 0.192])
def test_search_finds_the_minimum_from_any_start(best):
    losses, found = searched((6e-3, 1.2e-2, 2.4e-2), lambda lr: abs(math.log(lr / best)))
    assert found == pytest.approx(best, rel=0.01)
    rates = sorted(losses)
    assert found not in (rates[0], rates[-1])


def test_search_tries_nothing_beyond_what_it_needs():
    losses, _ = searched((6e-3, 1.2e-2, 2.4e-2), lambda lr: abs(math.log(lr / 1.2e-2)))
    assert sorted(losses) == [6e-3, 8.49e-3, 1.2e-2, 1.7e-2, 2.4e-2]


def test_search_ends_where_there_is_no_minimum():
    losses, found = searched((1e-2, 2e-2), lambda lr: -lr)
    last = 2e-2 * search.RATIO**search.MOST_EXTENSIONS
    assert found == max(losses) == search.rounded(last * math.sqrt(search.RATIO))


def test_search_goes_down_from_rates_that_fail():
    _, found = searched((0.1, 0.2), lambda lr: math.inf if lr > 0.03 else -lr)
    assert found == 0.025


def test_search_ignores_rates_that_it_does_not_come_by():
    assert search.search((1e-2,), {5e-5: -1.0}).missing == [1e-2]


def test_reached_is_on_the_straight_line():
    run = Run([0, 100, 200], [0.0, 1.0, 3.0], [4.0, 3.0, 1.0], None, 9.0, 4.0, "")
    assert results.reached(run, 2.5) == (125, 1.5)
    assert results.reached(run, 3.0) == (100, 1.0)
    assert results.reached(run, 1.0) == (200, 3.0)
    assert results.reached(run, 5.0) == (0, 0.0)
    assert results.reached(run, 0.9) is None


def test_reached_is_the_first_time():
    run = Run([0, 100, 200, 300], [0.0, 1.0, 2.0, 3.0], [4.0, 2.0, 3.0, 1.0], None, 9.0, 4.0, "")
    assert results.reached(run, 2.0) == (100, 1.0)


def keys(method, lr, seeds=3):
    return [Key(TASK, method, lr, seed) for seed in range(seeds)]


def test_table_is_measured_against_adamw_of_the_same_seed():
    adamw = results.Row(ADAMW, 6e-3, False, [made_up(2.0), made_up(2.2), made_up(2.4)])
    ours = results.Row(SHAMPOO, 2.4e-2, True, [made_up(0.0), made_up(0.4), made_up(2.5)])
    lines = results.table(TASK, [adamw, ours])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == [
        "AdamW", "0.006", "2.200 ± 0.200", "2.200 ± 0.200", "500 (100 %)", "10.0", "20.0",
    ]  # fmt: skip
    assert cells[3] == [
        "Shampoo", "0.024 (edge)", "**0.967 ± 1.343**", "0.967 ± 1.343",
        "250 (50 %), in 2 of 3", "5.0, in 2 of 3", "20.0",
    ]  # fmt: skip
    assert {len(row) for row in cells} == {len(cells[0])}


def test_table_shows_that_we_lose_and_what_fails():
    adamw = results.Row(ADAMW, 6e-3, False, [made_up(1.0)])
    ours = results.Row(SHAMPOO, 6e-3, False, [made_up(1.5)])
    failing = results.Row(METHODS[2], 6e-3, True, [NAN])
    text = results.table(TASK, [adamw, ours, failing])
    assert "**1.000**" in text[2]
    assert "1.500 | 1.500 | not reached | not reached" in text[3]
    assert "**fails** in 1 of 1: loss nan at step 25" in text[4]
    assert len({line.count("|") for line in text}) == 1


def test_baseline_is_the_better_adamw():
    whole, split = methods.named(methods.BASELINES)
    both = [results.Row(whole, 1e-3, False, [NAN]), results.Row(split, 1e-3, False, [made_up(2)])]
    ours = results.Row(SHAMPOO, 1e-3, False, [made_up(1)])
    assert results.baseline([*both, ours]) is both[1]
    both[0] = results.Row(whole, 1e-3, False, [made_up(1.9)])
    assert results.baseline([*both, ours]) is both[0]
    assert results.baseline([ours]) is None


def run_all(plan, train):
    trained = []

    def counted(key, threads):
        trained.append(key)
        return train(key, threads)

    with ThreadPoolExecutor(plan.jobs) as pool:
        return complete(plan, pool, lambda line: None, counted), trained


def test_goes_on_where_it_was_stopped(tmp_path):
    plan = Plan([TASK], [ADAMW, SHAMPOO], 3, tmp_path, jobs=2)
    train = bowl({"AdamW": 6e-3, "Shampoo": 4.8e-2})
    stops = {"left": 9}

    def stopping(key, threads):
        stops["left"] -= 1
        if stops["left"] < 0:
            raise KeyboardInterrupt
        return train(key, threads)

    with pytest.raises(KeyboardInterrupt):
        run_all(plan, stopping)
    stored = len(list((tmp_path / "runs").glob("*.json")))
    found, trained = run_all(plan, train)
    assert stored == 9
    assert len(trained) == len(found) - stored
    assert search.chosen(TASK, SHAMPOO, found) == (4.8e-2, False)
    assert all(key in found for key in keys(ADAMW, 6e-3) + keys(SHAMPOO, 4.8e-2))

    again, trained = run_all(plan, train)
    assert not trained
    assert again == found
    rows = results.rows(TASK, plan.methods, 3, again)
    assert [row.lowest for row in rows] == pytest.approx([1.01, 1.01])
    text = results.markdown([TASK], plan.methods, 3, again, "a machine")
    assert "“AdamW”" in text


def test_other_settings_and_damaged_files_are_run_anew(tmp_path):
    key = Key(TASK, SHAMPOO, 6e-3, 0)
    run = made_up(1.0)
    runs.store(tmp_path, key, 1, run)
    assert runs.read(tmp_path, key, 1) == run
    assert runs.read(tmp_path, key, 2) is None
    changed = key._replace(task=replace(TASK, batch_size=17))
    assert runs.path_of(tmp_path, changed) == runs.path_of(tmp_path, key)
    assert runs.read(tmp_path, changed, 1) is None
    variant = key._replace(method=replace(SHAMPOO, options={"p": 4}))
    assert runs.read(tmp_path, variant, 1) is None
    runs.path_of(tmp_path, key).write_text('{"fingerprint": ')
    assert runs.read(tmp_path, key, 1) is None


def test_names_of_files_differ(tmp_path):
    paths = {runs.path_of(tmp_path, Key(TASK, method, 1e-3, 0)) for method in METHODS}
    assert len(paths) == len(METHODS)


def test_schedule():
    task = replace(TASK, steps=100, warmup=10)
    shares = [runs.schedule(step, task) for step in range(task.steps + 1)]
    assert shares[0] == 0.1
    assert shares[9] == shares[10] == max(shares) == 1
    assert shares[55] == pytest.approx(0.55)
    assert shares[100] == pytest.approx(runs.FINAL_SHARE)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_split_covers_the_model_once():
    model = tasks.GPT(11, 8, 2, 16)
    hidden = model.hidden()
    assert len(hidden) == 2 * 4
    assert not {id(model.token.weight), id(model.head.weight)} & {id(p) for p in hidden}
    resnet = tasks.ResNet(3, 8, 1)
    assert [tuple(p.shape) for p in resnet.hidden()] == [
        (8, 72), (8, 72), (16, 72), (16, 144), (32, 144), (32, 288),
    ]  # fmt: skip
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    for method in (ADAMW, SHAMPOO):
        own = method.optimizers(hidden, others, 0.1, 0.0)
        stepped = [id(p) for o in own for group in o.param_groups for p in group["params"]]
        assert sorted(stepped) == sorted(id(p) for p in model.parameters())


def test_convolution_is_torchs():
    torch.manual_seed(0)
    ours, theirs = tasks.Convolution(3, 5, 2), nn.Conv2d(3, 5, 3, 2, 1, bias=False)
    theirs.weight.data = ours.weight.detach().view(5, 3, 3, 3)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(ours(x), theirs(x))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The GPT on a text of its own, two steps."""
    (tmp_path / tasks.TEXT_FILE).write_text("To be, or not to be, that is the question. " * 20)
    monkeypatch.setenv("SHAMPOO_KERNELS_DATA", str(tmp_path))
    small = {"width": 8, "depth": 1, "context": 8, "batch_size": 4, "validation": 4}
    return replace(TASK, steps=2, warmup=1, evaluate_every=1, **small)


def test_a_run(tiny):
    first, again = (runs.train(Key(tiny, SHAMPOO, 1e-2, 3), torch.get_num_threads()) for _ in "ab")
    assert first.steps == [0, 1, 2]
    assert first.loss == again.loss
    assert first.loss[2] < first.loss[0]
    assert first.seconds[0] == 0 < first.seconds[1] < first.seconds[2] < first.wall_seconds
    assert not first.failed
    other = runs.train(Key(tiny, ADAMW, 1e-2, 3), torch.get_num_threads())
    assert other.loss[0] == first.loss[0], "the same weights at the start"
    assert other.loss[1] != first.loss[1]


def explode(parameters, **options):
    return torch.optim.SGD(parameters, lr=math.inf)


def test_a_run_that_fails_is_said_to_fail(tiny):
    run = runs.train(Key(tiny, Method("explode", explode, (1.0,)), 1.0, 0), torch.get_num_threads())
    assert run.failed == "loss nan at step 1"
    assert run.lowest == math.inf
    assert run.steps == [0]
