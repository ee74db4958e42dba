"""What one param group needs for a step: its stacks, and its tensors seen as matrices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shampoo_kernels.optim.layout import MOMENTS, STRUCTURE
from shampoo_kernels.optim.stacks import build, cut_parameter
from shampoo_kernels.optim.state import check_state
from shampoo_kernels.optim.update import Inputs, step_


def check_gradients(group: dict) -> None:
    """Refuse what cannot be stepped, before anything changes."""
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            raise RuntimeError("Shampoo: sparse gradients are not supported; got one for a "
                               f"parameter {tuple(parameter.shape)}")  # fmt: skip
        if not parameter.is_floating_point():
            raise RuntimeError(
                f"Shampoo: parameters must be real and floating, got {parameter.dtype}"
            )
        if hasattr(parameter, "device_mesh"):
            raise RuntimeError("Shampoo: DTensor parameters are not supported yet")
        if group["capturable"] and parameter.device.type in ("cpu", "mps"):
            raise RuntimeError(
                "Shampoo: capturable=True needs parameters on an accelerator, got one on "
                f"{parameter.device}"
            )


def check_states(group: dict, states: Mapping[Tensor, dict]) -> None:
    """Refuse a state that does not hold what the options of its group ask for."""
    for parameter in _stepped(group, states):
        check_state(parameter, states.get(parameter, {}), group)


class Plan:
    """The stacks of a param group, whose states were checked; valid while `fits` says so."""

    def __init__(self, group: dict, states: Mapping[Tensor, dict]) -> None:
        self.parameters = _stepped(group, states)
        self.structure = _structure(group, self.parameters)
        own = [states[parameter] for parameter in self.parameters]
        self.stacks = build(self.parameters, own, group)
        self.shapes = [cut_parameter(parameter, group).matrix for parameter in self.parameters]
        self.step_tensors = [state["step"] for state in own]
        self.steps = [int(step) for step in self.step_tensors]
        average, square = MOMENTS
        self.averages = [state[average] for state in own]
        self.squares = {i: state[square] for i, state in enumerate(own) if square in state}

    def fits(self, group: dict, states: Mapping[Tensor, dict]) -> bool:
        """No parameter joined, and neither options nor state tensors were replaced."""
        parameters = _stepped(group, states)
        return _structure(group, parameters) == self.structure and all(
            states[parameter].get(MOMENTS[0]) is exp_avg
            for parameter, exp_avg in zip(parameters, self.averages, strict=True)
        )

    def step_(self, group: dict, position: int) -> int:
        """Step every stack; `position` counts the blocks with a factor before and after it."""
        grads = {
            i: parameter.grad.reshape(shape)
            for i, (parameter, shape) in enumerate(zip(self.parameters, self.shapes, strict=True))
            if parameter.grad is not None
        }
        if grads:
            torch._foreach_add_([self.step_tensors[i] for i in grads], 1)
        for i in grads:
            self.steps[i] += 1
        weights = self._matrices(self.parameters)
        inputs = Inputs(
            weights=weights,
            grads=grads,
            exp_avgs=self._matrices(self.averages),
            exp_avg_sqs={i: x.reshape(self.shapes[i]) for i, x in self.squares.items()},
            steps=self.steps,
        )
        for stack in self.stacks:
            step_(stack, inputs, group, position)
            position += len(stack.blocks) if stack.key.sides else 0
        for i in grads:
            if weights[i].data_ptr() != self.parameters[i].data_ptr():  # no matrix is a view of it
                self.parameters[i].copy_(weights[i].view(self.parameters[i].shape))
        return position

    def _matrices(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views (M, N), or copies where the strides (channels_last, say) allow no view."""
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]

    def check_capture(self, group: dict) -> None:
        """A graph repeats one step: all gradients, past start_step, and every root in each step."""
        if not self.parameters:
            return
        if not group["capturable"]:
            raise RuntimeError("Shampoo: capturing step() in a CUDA graph needs capturable=True")
        complete = all(parameter.grad is not None for parameter in self.parameters)
        started = complete and min(self.steps) >= group["start_step"]
        if group["precondition"] and _by_eigh(group):
            raise RuntimeError(
                "Shampoo: capturing step() in a CUDA graph needs roots and bases without eigh "
                f"(it waits for the device), got {_by_eigh(group)}"
            )
        if group["precondition"] and not (group["refresh_every"] == 1 and started):
            raise RuntimeError(
                "Shampoo: capturing step() in a CUDA graph needs refresh_every=1, a gradient for "
                f"every parameter, and start_step ({group['start_step']}) steps made before; "
                f"got refresh_every={group['refresh_every']} after {min(self.steps)} steps"
            )


def _by_eigh(group: dict) -> str:
    """The option that asks for eigh, in words; empty where none does."""
    if group["application"] == "soap":
        return 'basis_method="eigh"' if group["basis_method"] == "eigh" else ""
    if group["root_method"] == "eigh":
        return 'root_method="eigh"'
    if group["rank_rtol"] is not None:
        return f"rank_rtol={group['rank_rtol']}"
    fractions = [root for root in group["p"] if isinstance(root, float)]
    return f"p={fractions[0]}" if fractions else ""


def _stepped(group: dict, states: Mapping[Tensor, dict]) -> list[Tensor]:
    """Parameters with a gradient now or earlier."""
    return [
        parameter
        for parameter in dict.fromkeys(group["params"])
        if parameter.grad is not None or states.get(parameter)
    ]


def _structure(group: dict, parameters: list[Tensor]) -> tuple:
    return (
        *(group[name] for name in STRUCTURE),
        *((id(p), p.dtype, p.device, p.shape) for p in parameters),
    )
