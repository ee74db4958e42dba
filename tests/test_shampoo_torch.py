"""What torch.optim's own tests ask of an optimizer, as far as it concerns this one."""

import copy
import inspect
import json

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims
from training import SOAP, gradients, parameters, train

from shampoo_kernels import Shampoo

INPUTS = [
    {},
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 1e-2, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"nesterov": True, "graft": "sgd"},
    SOAP,
]
every_input = pytest.mark.parametrize("options", INPUTS, ids=str)


@pytest.mark.parametrize(
    "case", get_error_inputs_for_all_optims("cpu", torch.float32),
    ids=lambda case: case.optimizer_error_input.desc,
)  # fmt: skip
def test_the_errors_of_all_optimizers(case):
    given = case.optimizer_error_input
    message = "one-element tensor" if "lr" in given.kwargs else case.error_regex
    params = parameters((2, 2)) if given.params is None else given.params
    if case.error_type is UserWarning:
        with pytest.warns(UserWarning, match=message):
            Shampoo(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=message):
            Shampoo(params, **given.kwargs)


@every_input
def test_the_loss_goes_in_the_right_direction(options):
    torch.manual_seed(0)
    layer, x, y = nn.Linear(4, 3), torch.randn(16, 4), torch.randn(16, 3)
    optimizer = Shampoo(layer.parameters(), **{"lr": 1e-2, **options})
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(20):
        assert optimizer.step(closure).item() == losses[-1]
    assert (losses[-1] > losses[0]) if options.get("maximize") else (losses[-1] < losses[0])


@every_input
def test_a_deepcopied_optimizer_has_all_public_attributes_and_the_same_state(options):
    own = parameters((4, 3), (3,))
    optimizer = Shampoo(own, **options)
    train(optimizer, [(p, gradients(p.shape, 2, torch.float32)) for p in own])
    twin = copy.deepcopy(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert {name for name in dir(twin) if not name.startswith("_")} == public
    a, b = optimizer.state_dict(), twin.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key, state in a["state"].items():
        assert all(torch.equal(value, b["state"][key][name]) for name, value in state.items())


def test_a_named_state_dict_loads_into_an_unnamed_optimizer_and_back():
    layer, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    for first, second in ((layer.named_parameters(), twin.parameters()),
                          (layer.parameters(), twin.named_parameters())):  # fmt: skip
        optimizer, other = Shampoo(first), Shampoo(second)
        train(optimizer, [(p, gradients(p.shape, 2, torch.float32)) for p in layer.parameters()])
        other.load_state_dict(optimizer.state_dict())
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_steer_it(name, tensor_lr):
    """Those that cycle the momentum write betas, which the next step takes."""
    (W,), (V,) = parameters((4, 3)), parameters((4, 3))
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    optimizer = Shampoo([W], lr=lr)
    scheduler = SCHEDULERS[name](optimizer)
    other = Shampoo([V])
    for grad in gradients((4, 3), 8, torch.float32):
        group = optimizer.param_groups[0]
        other.param_groups[0].update(lr=float(group["lr"]), betas=group["betas"])
        train(optimizer, [(W, [grad])])
        train(other, [(V, [grad])])
        scheduler.step()
    torch.testing.assert_close(W, V, rtol=1e-5, atol=1e-6)
    if name in ("OneCycleLR", "CyclicLR"):
        assert optimizer.param_groups[0]["betas"][0] != 0.9
    reloaded = SCHEDULERS[name](Shampoo([V], lr=0.01))
    reloaded.load_state_dict(scheduler.state_dict())
    assert reloaded.last_epoch == scheduler.last_epoch


def test_stochastic_weight_averaging():
    layer = nn.Linear(4, 3)
    optimizer = Shampoo(layer.parameters(), lr=0.1)
    average = swa_utils.AveragedModel(layer)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    seen = []
    for step in range(4):
        train(optimizer, [(p, gradients(p.shape, 1, torch.float32, step))
                          for p in layer.parameters()])  # fmt: skip
        average.update_parameters(layer)
        seen.append(layer.weight.detach().clone())
        scheduler.step()
    torch.testing.assert_close(average.module.weight.detach(), torch.stack(seen).mean(0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_gradient_scaler_unscales_and_skips():
    (W,), (V,) = parameters((4, 3)), parameters((4, 3))
    optimizer, plain = Shampoo([W]), Shampoo([V])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step, grad in enumerate(gradients((4, 3), 3, torch.float32)):
        loss = (W * grad).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 1:
            W.grad[0, 0] = torch.inf
        else:
            train(plain, [(V, [grad])])
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(W, V)


def test_foreach_fused_and_differentiable_are_no_options():
    """They say how torch's optimizers are implemented, which here is the same everywhere."""
    names = inspect.signature(Shampoo).parameters
    assert not {"foreach", "fused", "differentiable"} & set(names)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fused'"):
        Shampoo(parameters((2, 2)), fused=True)


@every_input
def test_it_changes_parameters_in_place(options):
    own = parameters((4, 3), (3,))
    pointers = [p.data_ptr() for p in own]
    grads = [gradients(p.shape, 3, torch.float32) for p in own]
    train(Shampoo(own, **options), list(zip(own, grads, strict=True)))
    assert [p.data_ptr() for p in own] == pointers
    for p, given in zip(own, grads, strict=True):
        assert torch.equal(p.grad, given[-1])  # and leaves gradients alone


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks behind the graph break
def test_a_compiled_training_step_is_the_training_step():
    """step() itself is not compiled: the graph breaks there, and goes on behind."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 3), torch.randn(8, 4)
        optimizer = Shampoo(layer.parameters(), lr=0.01)

        def train_step(layer=layer, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach() * 2

        step = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        losses = torch.stack([step() for _ in range(4)])
        results.append((losses, layer.weight.detach()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"root_method": "eigh"},
        {"rank_rtol": 1e-6},
        {"p": (2.5, 2)},
        {**SOAP, "basis_method": "eigh"},
        {"refresh_every": 2},
        {"start_step": 9},
    ],
    ids=str,
)
def test_a_cuda_graph_is_refused_where_a_step_would_wait_or_differ(options):
    """What step() asks while torch is capturing; no graph is made here."""
    (W,) = parameters((4, 3))
    optimizer = Shampoo([W], refresh_every=1)
    train(optimizer, [(W, gradients((4, 3), 2, torch.float32))])
    group = {**optimizer.param_groups[0], "capturable": True}
    optimizer._plans[0].check_capture(group)
    with pytest.raises(RuntimeError, match=r"^Shampoo: capturing .* needs .* got "):
        optimizer._plans[0].check_capture({**group, **options})
    optimizer._plans[0].check_capture({**group, **options, "precondition": False})


def test_a_cuda_graph_needs_start_step_steps_before_it_and_every_gradient():
    own = parameters((4, 3), (4, 3))
    optimizer = Shampoo(own, refresh_every=1, start_step=2)
    train(optimizer, [(p, gradients((4, 3), 2, torch.float32)) for p in own])
    group = {**optimizer.param_groups[0], "capturable": True}
    optimizer._plans[0].check_capture(group)
    own[1].grad = None
    with pytest.raises(RuntimeError, match=r"^Shampoo: capturing .* a gradient for every"):
        optimizer._plans[0].check_capture(group)


def test_a_group_that_has_had_no_gradient_hinders_no_cuda_graph():
    optimizer = Shampoo(parameters((4, 3)), capturable=True)
    optimizer.step()
    optimizer._plans[0].check_capture(optimizer.param_groups[0])


def test_the_state_goes_through_safetensors():
    """Tensors that share no memory, under plain names; the groups are plain values for a JSON."""
    safetensors = pytest.importorskip("safetensors.torch")
    own = parameters((7, 5), (5,))
    optimizer = Shampoo(own, block_size=4, statistic="kl", refresh_every=2)
    pairs = [(p, gradients(p.shape, 4, torch.float32)) for p in own]
    train(optimizer, [(p, grads[:3]) for p, grads in pairs])
    saved = optimizer.state_dict()
    flat = {f"{i}/{name}": x for i, state in saved["state"].items() for name, x in state.items()}
    flat = safetensors.load(safetensors.save(flat))
    state = {}
    for path, value in flat.items():
        key, name = path.split("/")
        state.setdefault(int(key), {})[name] = value
    twin = [nn.Parameter(p.detach().clone()) for p in own]
    other = Shampoo(twin)
    groups = json.loads(json.dumps(saved["param_groups"]))
    other.load_state_dict({"state": state, "param_groups": groups})
    for o, ps in ((optimizer, own), (other, twin)):
        train(o, [(p, grads[3:]) for p, (_, grads) in zip(ps, pairs, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(own, twin, strict=True))
