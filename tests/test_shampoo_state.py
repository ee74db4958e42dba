"""The state of Shampoo: what is saved, and that a run resumes bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from shampoo_kernels import Shampoo

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(7, 5), (7, 5), (5,), (3, 2, 2, 2), (), (8, 5)]
OPTIONS = {"block_size": 4, "start_step": 3, "refresh_every": 3, "lr": 0.01}


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def steps(optimizer, own, first, last):
    """Steps first..last - 1, whose gradients depend on the step and on the weights."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in own:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = parameter.detach() + noise
        optimizer.step()


def same_state(a, b):
    assert len(a.state) == len(b.state)
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype, name
            assert torch.equal(x[name], y[name]), name


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_resumes_bit_for_bit_from_a_file(dtype, stop):
    """Before start_step, at it, and within a cycle of refreshes."""
    own = parameters(dtype)
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, stop)
    saved = through_a_file({"model": own, "optimizer": optimizer.state_dict()})
    steps(optimizer, own, stop, 10)
    resumed = [nn.Parameter(p.detach().clone()) for p in saved["model"]]
    other = Shampoo(resumed, lr=1.0)
    other.load_state_dict(saved["optimizer"])
    steps(other, resumed, stop, 10)
    for a, b in zip(own, resumed, strict=True):
        assert torch.equal(a, b)
    same_state(optimizer, other)


@pytest.mark.parametrize(
    "round_trip", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_copy_goes_on_like_the_original(round_trip, stop):
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, stop)
    copied, twin = round_trip((own, optimizer))
    steps(optimizer, own, stop, 8)
    untouched = [p.clone() for p in copied]
    assert all(torch.equal(a, b) for a, b in zip(copied, untouched, strict=True))
    steps(twin, copied, stop, 8)
    for a, b in zip(own, copied, strict=True):
        assert torch.equal(a, b)
    same_state(optimizer, twin)


@pytest.mark.parametrize("blocks", [4, 16])
def test_a_pickled_optimizer_is_as_large_as_its_state(blocks):
    """A view pickles the whole stack behind it."""
    own = parameters(shapes=[(64, 64)] * blocks)
    optimizer = Shampoo(own)
    steps(optimizer, own, 0, 1)
    size = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    size += sum(2 * p.nbytes for p in own)  # the parameters and their gradients
    assert len(pickle.dumps(optimizer)) < 1.1 * size + 2000 * blocks


def test_state_is_tensors_keyed_by_block_and_side():
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 1)
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[own[0]].items()}
    pieces = {0: (4, 3), 1: (4, 2), 2: (3, 3), 3: (3, 2)}
    expected = {"step": (), "exp_avg": (7, 5), "exp_avg_sq": (7, 5)}
    for index, (m, n) in pieces.items():
        expected[f"block_step.{index}"] = ()
        expected[f"left.{index}"] = expected[f"left_root.{index}"] = (m, m)
        expected[f"right.{index}"] = expected[f"right_root.{index}"] = (n, n)
    assert shapes == expected
    assert set(optimizer.state[own[2]]) == {"step", "exp_avg", "exp_avg_sq", "block_step.0"}
    assert optimizer.param_groups[0]["version"] == 2


def test_blocks_of_one_shape_share_one_storage():
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 2)
    pointers = {optimizer.state[own[i]]["left.0"].untyped_storage().data_ptr() for i in (0, 1, 5)}
    assert len(pointers) == 1


def test_a_state_dict_is_a_snapshot_that_saves_no_stack():
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 2)
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    steps(optimizer, own, 2, 4)
    for key, state in state_dict["state"].items():
        assert all(torch.equal(state[name], before["state"][key][name]) for name in state)


def test_loading_leaves_the_loaded_dict_alone_and_keeps_dtypes():
    own = parameters(torch.bfloat16)
    optimizer = Shampoo(own, **OPTIONS, root_dtype=torch.bfloat16)
    steps(optimizer, own, 0, 4)
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    other = Shampoo(own, **OPTIONS)
    other.load_state_dict(state_dict)
    same_state(optimizer, other)
    steps(other, own, 4, 6)
    for key, state in state_dict["state"].items():
        assert all(torch.equal(state[name], before["state"][key][name]) for name in state)
    assert state["left.0"].dtype == torch.float32
    assert state["left_root.0"].dtype == torch.bfloat16


def test_hooks_of_users_see_and_change_what_is_saved_and_loaded():
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 2)

    def mark(_, state_dict):
        for state in state_dict["state"].values():
            state["exp_avg"].zero_()
        return {**state_dict, "marked": True}

    optimizer.register_state_dict_post_hook(mark)
    saved = optimizer.state_dict()
    assert saved["marked"]
    assert optimizer.state[own[0]]["exp_avg"].abs().max() > 0
    other, loaded = Shampoo(parameters(torch.bfloat16), **OPTIONS), []

    def rename(_, state_dict):
        return {"state": state_dict["inner"], "param_groups": state_dict["param_groups"]}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(
        lambda o: loaded.extend(s["left.0"].dtype for s in o.state.values() if "left.0" in s)
    )
    other.load_state_dict({"inner": saved["state"], "param_groups": saved["param_groups"]})
    assert set(loaded) == {torch.float32}


def test_a_first_step_without_gradient_and_learning_rate_makes_the_whole_state():
    own, twin = parameters(), parameters()
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Shampoo(own, **{**OPTIONS, "lr": 0.0})
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own, twin, strict=True))
    trained = Shampoo(twin, **OPTIONS)
    steps(trained, twin, 0, 6)
    for a, b in zip(own, twin, strict=True):
        assert optimizer.state[a].keys() == trained.state[b].keys()
    optimizer.load_state_dict(trained.state_dict())
    same_state(optimizer, trained)


def test_state_survives_late_gradients_and_late_groups():
    own = parameters()
    optimizer = Shampoo(own[:2], **OPTIONS)
    steps(optimizer, own[:1], 0, 4)
    before = {name: value.clone() for name, value in optimizer.state[own[0]].items()}
    own[0].grad = None
    optimizer.add_param_group({"params": own[2:]})
    for parameter in own[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = optimizer.state[own[0]]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "root" not in name)


def test_moved_and_cleared_state_is_noticed():
    """Recipes that offload state replace its tensors; what is in the state is what counts."""
    own, twin = parameters(), parameters()
    a, b = Shampoo(own, **OPTIONS), Shampoo(twin, **OPTIONS)
    steps(a, own, 0, 5)
    steps(b, twin, 0, 5)
    for state in b.state.values():
        for name, value in state.items():
            state[name] = value.clone()
    steps(a, own, 5, 8)
    steps(b, twin, 5, 8)
    same_state(a, b)
    b.state.clear()
    steps(b, twin, 0, 1)
    assert b.state[twin[0]]["step"] == 1


def test_options_that_shape_the_state_cannot_change_in_flight():
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 2)
    optimizer.param_groups[0]["block_size"] = 5
    with pytest.raises(ValueError, match="block_size"):
        optimizer.step()
    optimizer.param_groups[0]["block_size"] = 4
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.param_groups[0]["p"] = 4
    optimizer.step()
    assert optimizer.param_groups[0]["p"] == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_roots_may_be_kept_in_another_dtype_from_now_on(dtype):
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 4)
    before = optimizer.state[own[0]]["left_root.0"].clone()
    optimizer.param_groups[0].update(root_dtype=dtype, refresh_every=1000)
    steps(optimizer, own, 4, 5)
    after = optimizer.state[own[0]]["left_root.0"]
    assert torch.equal(after, before.to(dtype))
    assert after.dtype == dtype
    assert before.any()


def test_parameters_that_change_dtype_take_their_state_along_and_no_other_shape():
    """As module.double() does, which leaves the parameters the objects that they were."""
    own = parameters()
    optimizer = Shampoo(own, **OPTIONS)
    steps(optimizer, own, 0, 4)
    for p in own:
        p.grad = None
        p.data = p.data.double()
    average = optimizer.state[own[0]]["exp_avg"].double()
    steps(optimizer, own, 4, 5)
    for state in optimizer.state.values():
        assert {x.dtype for name, x in state.items() if name != "step"} == {torch.float64}
        assert state["step"] == 5
    p = own[0]
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * average + 0.1 * p.grad)
    p.grad, p.data = None, p.data[:6].clone()
    with pytest.raises(ValueError, match=r"'exp_avg' of a parameter \(6, 5\) must be .*\(6, 5\)"):
        steps(optimizer, own, 5, 6)


def test_in_an_eigenbasis_no_statistic_needs_more_state_than_another():
    names = []
    for statistic in ("shampoo", "frobenius", "kl"):
        own = parameters()
        optimizer = Shampoo(own, application="soap", graft=None, statistic=statistic)
        steps(optimizer, own, 0, 1)
        names.append([sorted(state) for state in optimizer.state.values()])
    assert names[0] == names[1] == names[2]
