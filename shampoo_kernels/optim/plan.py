"""What one param group needs for a step: its stacks, and its tensors seen as matrices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shampoo_kernels.optim.stacks import MOMENTS, build, cut_parameter
from shampoo_kernels.optim.update import Members, StackStep

# The options that decide what the state of a parameter looks like.
STRUCTURE = ("p", "block_size", "max_dimension", "precondition", "root_dtype", "capturable")


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


class Plan:
    """The stacks of a param group; valid while `fits` says so."""

    def __init__(self, group: dict, states: Mapping[Tensor, dict]) -> None:
        self.group = group
        self.parameters = _stepped(group, states)
        self.structure = _structure(group, self.parameters)
        own = [states[parameter] for parameter in self.parameters]
        self.stacks = build(self.parameters, own, group)
        self.shapes = [cut_parameter(parameter, group).matrix for parameter in self.parameters]
        self.step_tensors = [state["step"] for state in own]
        self.steps = [int(step) for step in self.step_tensors]
        self.exp_avgs = [state["exp_avg"] for state in own]
        moments = (_matrices([state[name] for state in own], self.shapes) for name in MOMENTS)
        self.moments = tuple(moments)

    def fits(self, group: dict, states: Mapping[Tensor, dict]) -> bool:
        """No parameter joined, and neither options nor state tensors were replaced."""
        parameters = _stepped(group, states)
        return _structure(group, parameters) == self.structure and all(
            states[parameter].get("exp_avg") is exp_avg
            for parameter, exp_avg in zip(parameters, self.exp_avgs, strict=True)
        )

    def step_(self) -> None:
        """Step every stack."""
        grads = [parameter.grad for parameter in self.parameters]
        present = [grad is not None for grad in grads]
        if not any(present):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._check_capture(all(present))
        torch._foreach_add_(
            [s for s, here in zip(self.step_tensors, present, strict=True) if here], 1
        )
        self.steps = [step + here for step, here in zip(self.steps, present, strict=True)]
        weights = _matrices(self.parameters, self.shapes)
        members = Members(
            weights=weights,
            grads=[
                weight.new_zeros(()).expand(shape) if grad is None else grad.reshape(shape)
                for weight, grad, shape in zip(weights, grads, self.shapes, strict=True)
            ],
            exp_avgs=self.moments[0],
            exp_avg_sqs=self.moments[1],
            present=present,
            steps=self.steps,
        )
        for stack in self.stacks:
            StackStep(stack, members, self.group).run()
        for parameter, weight in zip(self.parameters, weights, strict=True):
            if weight.data_ptr() != parameter.data_ptr():  # no view of it as a matrix exists
                parameter.copy_(weight.view(parameter.shape))

    def _check_capture(self, complete: bool) -> None:
        """A graph repeats one step: all gradients, past start_step, and every root in each step."""
        group = self.group
        if not group["capturable"]:
            raise RuntimeError("Shampoo: capturing step() in a CUDA graph needs capturable=True")
        started = complete and min(self.steps) >= group["start_step"]
        if group["precondition"] and not (group["refresh_every"] == 1 and started):
            raise RuntimeError(
                "Shampoo: capturing step() in a CUDA graph needs refresh_every=1, a gradient for "
                f"every parameter, and start_step ({group['start_step']}) steps made before; "
                f"got refresh_every={group['refresh_every']} after {min(self.steps)} steps"
            )


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


def _matrices(tensors: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Views (M, N), or copies where the strides (channels_last, say) allow no view."""
    return [tensor.reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
