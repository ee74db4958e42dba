"""Killed by SIGKILL in the middle of a step or of a save, a run resumes to the same bits."""

import itertools
import random
import signal

import killing
import pytest
import ranks
import torch
from killing import Death, local
from training import SOAP, VARIANTS

STEPS = 7
EVERY = {
    "statistic": ("shampoo", "frobenius", "kl"),
    "graft": ("adam", "rmsprop", "adagrad", "sgd", None),
    "scale": ("trace", "least_squares", None),
    "p": (2, (2, None)),
    "refresh": ("staggered", "level"),
}


def same(path, other):
    """Weights, state and options in two files."""
    a, b = (torch.load(each, weights_only=False) for each in (path, other))
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(a[name]["weights"], b[name]["weights"], strict=True):
            assert equal(x, y), name
            assert local(x).isfinite().all(), name
        one, two = a[name]["optimizer"], b[name]["optimizer"]
        assert one["param_groups"] == two["param_groups"]
        for key, state in one["state"].items():
            assert state.keys() == two["state"][key].keys()
            for what, value in state.items():
                assert equal(value, two["state"][key][what]), (name, what)


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(local(a), local(b))


def trained(folder, variants):
    """The file of a run that nothing interrupts."""
    killing.end(killing.start(killing.alone, folder, variants, STEPS, None), 0)
    return folder / f"{STEPS}.pt"


def survives(folder, variants, deaths, expected):
    """Killed again and again, each time in a new process, and at last run to its end."""
    for death in deaths:
        process = killing.start(killing.alone, folder, variants, STEPS, death)
        killing.end(process, -signal.SIGKILL)
        assert not (folder / f"{STEPS}.pt").exists()
    same(trained(folder, variants), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), VARIANTS)


def test_a_run_of_every_variant_killed_again_and_again_ends_in_the_same_bits(tmp_path, whole):
    """Before there is a checkpoint, in the middle of a step, of a file, before it is renamed."""
    deaths = [Death(1, "step", 900), Death(2, "save", 50_000), Death(4, "step", 1700),
              Death(6, "rename")]  # fmt: skip
    survives(tmp_path, VARIANTS, deaths, whole)


def test_a_run_killed_from_outside_at_any_moment_ends_in_the_same_bits(tmp_path, whole):
    wait = random.SystemRandom().uniform(0, 0.2)
    print(f"killed {wait} s after step 3 was saved")  # which pytest shows when this fails
    killing.killed_outside(tmp_path, 3, wait, killing.alone, tmp_path, VARIANTS, 10_000, None)
    last = max(int(path.stem) for path in tmp_path.glob("*.pt"))
    if last < STEPS:
        same(trained(tmp_path, VARIANTS), whole)
    else:  # a machine so fast that the run went on beyond: then the steps until then were enough
        assert last < 10_000


def many(folder, world, kind, variants, deaths):
    """Runs of `world` ranks, the last of which is killed; then the others are."""
    folder.mkdir()
    for attempt, death in enumerate([*deaths, None]):
        given = (world, folder, attempt, kind, variants, STEPS, death)
        processes = [
            killing.start(killing.one_of_many, rank, *given) for rank in range(world)
        ]  # fmt: skip
        if death is not None:
            killing.end(processes.pop(), -signal.SIGKILL)
            for process in processes:
                process.kill()
                process.join()
        for process in processes if death is None else ():
            killing.end(process, 0)
    return [folder / str(rank) / f"{STEPS}.pt" for rank in range(world)]


SHARED = ("default", "sum", "one-sided kl", "least squares", "soap", "kl soap", "sgd", "level",
          "adaptive", "coupled", "bfloat16 roots")  # fmt: skip


@ranks.pytestmark
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("replicas", SHARED),
        pytest.param("replicas", VARIANTS, marks=pytest.mark.slow),
        pytest.param("shards", VARIANTS, marks=pytest.mark.slow),
    ],
    ids=["replicas", "replicas, every variant", "shards, every variant"],
)
def test_ranks_killed_and_started_again_end_in_the_same_bits(tmp_path, kind, names):
    variants = {name: VARIANTS[name] for name in names}
    expected = many(tmp_path / "whole", 2, kind, variants, [])
    deaths = [Death(3, "step", 700), Death(5, "save", 20_000)]
    found = many(tmp_path / "killed", 2, kind, variants, deaths)
    for path, other in zip(found, expected, strict=True):
        same(path, other)


def every_combination():
    """Every statistic with every graft, scale, side and turn; SOAP with all that it allows."""
    found = {}
    for values in itertools.product(*EVERY.values()):
        options = dict(zip(EVERY, values, strict=True))
        found[str(options)] = options
    shared = {name: EVERY[name] for name in ("statistic", "p", "refresh")}
    soap = {**shared, "basis_method": ("orthogonal_iteration", "eigh")}
    for values in itertools.product(*soap.values()):
        own = dict(zip(soap, values, strict=True))
        found[f"soap {own}"] = {**SOAP, **own}
    return found


@pytest.mark.slow
def test_a_run_of_every_combination_of_options_killed_resumes_to_the_same_bits(
    tmp_path, tmp_path_factory
):
    variants = every_combination()
    deaths = [Death(2, "step", 9000), Death(5, "save", 1_000_000)]
    survives(tmp_path, variants, deaths, trained(tmp_path_factory.mktemp("whole"), variants))


@pytest.mark.slow
def test_a_run_killed_in_every_step_and_every_save_ends_in_the_same_bits(tmp_path, whole):
    generator = random.Random(0)
    deaths = [
        death
        for step in range(1, STEPS + 1)
        for death in (
            Death(step, "step", generator.randrange(2000)),
            Death(step, "save", generator.randrange(90_000)),
            Death(step, "rename"),
        )
    ]
    survives(tmp_path, VARIANTS, deaths, whole)


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(tmp_path):
    """What a killed writer leaves behind has another name, and torch refuses it."""
    variants = {"default": {}}
    process = killing.start(killing.alone, tmp_path, variants, 3, Death(3, "save", 5000))
    killing.end(process, -signal.SIGKILL)
    assert killing.Run(variants, tmp_path).saved() == [1, 2]
    assert (tmp_path / "new").stat().st_size == 5000
    with pytest.raises((RuntimeError, OSError)):
        torch.load(tmp_path / "new", weights_only=True)
