"""PyTorch's OptimizerInfo of Shampoo, and what TestOptimRenewed asks of whatever has one."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.optim import swa_utils
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)
from training import SOAP, VARIANTS, gradients, parameters, train

from shampoo_kernels import Shampoo
from shampoo_kernels.ops import roots

KNOWN = {info.name: info for info in optim_db}


def inputs(device, dtype=None):
    """Those of AdamW that Shampoo has options for, and its own."""
    shared = [
        given for given in KNOWN["AdamW"].optim_inputs_func(device) if "amsgrad" not in given.kwargs
    ]
    own = [
        OptimizerInput(params=None, kwargs={"lr": 0.01, **options}, desc=name)
        for name, options in VARIANTS.items()
    ]
    return [*shared, *own]


INFO = OptimizerInfo(
    Shampoo,
    optim_inputs_func=inputs,
    optim_error_inputs_func=get_error_inputs_for_all_optims,
    scheduler_inputs=KNOWN["SGD"].scheduler_inputs,
    supported_impls=(),
    not_og_supported_flags=(),
    has_capturable_arg=True,
    supports_complex=False,
)
every_input = pytest.mark.parametrize(
    "given", INFO.optim_inputs_func("cpu"), ids=lambda given: given.desc
)


def closure_of(weight, bias, x, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = (weight @ x + bias).square().sum()
        loss.backward()
        return loss

    return closure


def fresh(contiguous=True, dtype=torch.float32):
    """A weight, a bias and an input; else the first two are every other element of their memory."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*s, 2, generator=draw, dtype=dtype) for s in ((10, 5), (10,)))
    weight, bias = weight[..., 0], bias[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return nn.Parameter(weight), nn.Parameter(bias), torch.randn(5, generator=draw, dtype=dtype)


def goes_in_the_right_direction(optimizer, closure, schedulers=(), steps=20):
    first = closure().item()
    for _ in range(steps):
        loss = optimizer.step(closure).detach()
        for scheduler in schedulers:
            scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
    last = closure().item()
    assert (last > first) if optimizer.param_groups[0]["maximize"] else (last < first)


@every_input
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_it_goes_in_the_right_direction(given, contiguous):
    weight, bias, x = fresh(contiguous)
    optimizer = INFO.optim_cls([weight, bias], **given.kwargs)
    goes_in_the_right_direction(optimizer, closure_of(weight, bias, x, optimizer))


@every_input
def test_strided_parameters_are_trained_as_contiguous_ones_are(given):
    results = []
    for contiguous in (True, False):
        weight, bias, _ = fresh(contiguous, torch.float64)
        optimizer = INFO.optim_cls([weight, bias], **given.kwargs)
        train(optimizer, [(p, gradients(p.shape, 4)) for p in (weight, bias)])
        assert weight.is_contiguous() == contiguous
        results.append((weight.detach(), bias.detach()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("number", range(len(INFO.scheduler_inputs)))
@pytest.mark.parametrize("options", [{}, SOAP, {"maximize": True}], ids=str)
def test_it_goes_in_the_right_direction_with_schedulers(options, number):
    weight, bias, x = fresh()
    optimizer, rates = INFO.optim_cls([weight, bias], lr=0.02, **options), set()
    schedulers = [make(optimizer) for make in INFO.scheduler_inputs[number]]
    optimizer.register_step_pre_hook(lambda o, *_: rates.add(float(o.param_groups[0]["lr"])))
    goes_in_the_right_direction(optimizer, closure_of(weight, bias, x, optimizer), schedulers)
    assert len(rates) > 1


@every_input
def test_groups_with_a_learning_rate_of_their_own_use_it(given):
    """A group whose learning rate is 0 stands still while the other one moves."""
    weight, bias, x = fresh()
    groups = [{"params": [weight], "lr": 0.01}, {"params": [bias]}]
    optimizer = INFO.optim_cls(groups, **{**given.kwargs, "lr": 0.0})
    before = weight.detach().clone(), bias.detach().clone()
    goes_in_the_right_direction(optimizer, closure_of(weight, bias, x, optimizer))
    assert not torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@every_input
def test_a_step_without_gradients_does_nothing(given):
    own = parameters((4, 3), (3,))
    before = [p.detach().clone() for p in own]
    optimizer = INFO.optim_cls(own, **given.kwargs)
    for _ in range(2):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@every_input
def test_a_step_leaves_state_of_every_parameter(given):
    own = parameters((4, 3), (3,), ())
    optimizer = INFO.optim_cls(own, **given.kwargs)
    train(optimizer, [(p, gradients(p.shape, 1, torch.float32)) for p in own])
    for p in own:
        assert optimizer.state[p]["step"] == 1
        assert optimizer.state[p]["exp_avg"].any()


@every_input
def test_equal_runs_have_equal_state_dicts(given):
    """And repeated groups are represented alike."""
    dicts = []
    for _ in range(2):
        own = parameters((4, 3), (3,))
        optimizer = INFO.optim_cls(own, **given.kwargs)
        train(optimizer, [(p, gradients(p.shape, 5, torch.float32)) for p in own])
        dicts.append(optimizer.state_dict())
    a, b = dicts
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for key, state in a["state"].items():
        assert list(state) == list(b["state"][key])
        assert all(torch.equal(value, b["state"][key][name]) for name, value in state.items())
    optimizer.param_groups.extend(optimizer.param_groups)
    assert optimizer.state_dict()["param_groups"][-1] == a["param_groups"][-1]


def test_hooks_of_all_optimizers_and_of_one_come_in_their_order():
    (W,) = parameters((4, 3))
    optimizer, seen = INFO.optim_cls([W]), []

    def note(word):
        return lambda *_: seen.append(word)

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("all, before")),
        torch_optimizer.register_optimizer_step_post_hook(note("all, after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        train(optimizer, [(W, gradients((4, 3), 1, torch.float32))])
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all, before", "before", "after", "all, after"]
    optimizer.step()
    assert len(seen) == 4


def test_a_pre_hook_may_put_in_a_closure():
    weight, bias, x = fresh()
    optimizer = INFO.optim_cls([weight, bias])
    closure = closure_of(weight, bias, x, optimizer)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert optimizer.step().item() > 0
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_the_state_dict_are_called_in_the_order_of_their_making(when):
    own = parameters((4, 3))
    optimizer, seen = INFO.optim_cls(own), []
    train(optimizer, [(own[0], gradients((4, 3), 1, torch.float32))])
    for register in (f"register_state_dict_{when}_hook", f"register_load_state_dict_{when}_hook"):
        getattr(optimizer, register)(lambda *_: seen.append("second"))
        getattr(optimizer, register)(lambda *_: seen.append("first"), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["first", "second"] * 2
    # what it put there for itself is gone again
    assert len(optimizer._optimizer_state_dict_pre_hooks) == (when == "pre") * 2
    assert len(optimizer._optimizer_state_dict_post_hooks) == (when == "post") * 2
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == (when == "pre") * 2
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == (when == "post") * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_input
def test_the_default_dtype_makes_no_difference(given, dtype):
    results = []
    for default in (torch.float32, dtype):
        own = parameters((4, 3), (3,))
        roots.native_steps.cache_clear()
        torch.set_default_dtype(default)
        try:
            optimizer = INFO.optim_cls(own, refresh_every=1, **given.kwargs)
            train(optimizer, [(p, gradients(p.shape, 4, torch.float32)) for p in own])
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([*own, *(x for state in optimizer.state.values() for x in state.values())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_zeroed_gradients_count_as_gradients_and_missing_ones_do_not():
    own = parameters((4, 3), (3,))
    optimizer = INFO.optim_cls(own)
    train(optimizer, [(p, gradients(p.shape, 1, torch.float32)) for p in own])
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in own)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in own] == [2, 2]
    optimizer.zero_grad()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in own] == [2, 2]


def test_a_step_in_the_backward_pass():
    """The recipe that frees each gradient at once: an optimizer per parameter, in its hook."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    twin, x = copy.deepcopy(net), torch.randn(8, 6)
    each = {p: INFO.optim_cls([p], lr=0.01, refresh_every=2) for p in twin.parameters()}

    def step(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    for p in twin.parameters():
        p.register_post_accumulate_grad_hook(step)
    # "together", so that turns do not depend on who is beside
    optimizer = INFO.optim_cls(net.parameters(), lr=0.01, refresh_every=2, refresh="together")
    for one in each.values():
        one.param_groups[0]["refresh"] = "together"
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        twin(x).square().mean().backward()
    assert all(p.grad is None for p in twin.parameters())
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_profiler_names_its_steps():
    (W,) = parameters((4, 3))
    optimizer = INFO.optim_cls([W])
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, [(W, gradients((4, 3), 1, torch.float32))])
    assert "Optimizer.step#Shampoo.step" in {event.name for event in profile.function_events}


def test_an_exponential_average_of_the_weights():
    layer = nn.Linear(4, 3)
    optimizer = INFO.optim_cls(layer.parameters(), lr=0.1)
    average = swa_utils.AveragedModel(layer, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(4):
        train(optimizer, [(p, gradients(p.shape, 1, torch.float32, step))
                          for p in layer.parameters()])  # fmt: skip
        average.update_parameters(layer)
        weight = layer.weight.detach().clone()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average.module.weight.detach(), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks behind the graph break
@pytest.mark.parametrize("options", [{}, SOAP, {"statistic": "kl"}], ids=str)
def test_a_compiled_training_step_with_clipping_and_a_schedule_is_the_training_step(options):
    """To the bit: the step itself runs as it is, and a schedule's new rates compile nothing anew.

    The loss is compiled once; that it was shows that there is a graph at all.
    """
    results, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(8, 6)
        optimizer = INFO.optim_cls(net.parameters(), lr=0.05, refresh_every=2, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        loss_of = torch.compile(net, backend=backend) if compiled else net

        def train_step(loss_of=loss_of, net=net, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(x).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            return loss.detach()

        step = torch.compile(train_step, backend=backend) if compiled else train_step
        losses = []
        for number in range(5):
            losses.append(step())
            schedule.step()
            if number == 1:
                after_two = len(graphs)
        results.append([torch.stack(losses), *(p.detach() for p in net.parameters())])
    assert after_two == len(graphs) > 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
