"""What one param group needs for a step: its stacks, and its tensors seen as matrices."""

import functools
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from shampoo_kernels.optim.batch import Batch, Moments, batches
from shampoo_kernels.optim.blocks import Cut
from shampoo_kernels.optim.distributed.team import Share, is_dtensor
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
        if is_dtensor(parameter) and parameter.grad.placements != parameter.placements:
            raise RuntimeError(
                "Shampoo: the gradient of a DTensor must be placed like it, as "
                f"{parameter.placements}, got {parameter.grad.placements}"
            )
        if group["capturable"] and parameter.device.type in ("cpu", "mps"):
            raise RuntimeError(
                "Shampoo: capturable=True needs parameters on an accelerator, got one on "
                f"{parameter.device}"
            )


def check_states(group: dict, states: Mapping[Tensor, dict], share: Share | None) -> None:
    """Refuse a state that does not hold what the options of its group ask for."""
    for parameter in members(group, states, share):
        state = states.get(parameter, {})
        if share is not None and state:
            _check_own_blocks(parameter, state, share)
        check_state(parameter, state, group, share.others(parameter) if share else ())


def _check_own_blocks(parameter: Tensor, state: Mapping, share: Share) -> None:
    for index, rank in enumerate(share.owners[parameter]):
        if rank == share.team.rank and f"block_step.{index}" not in state:
            raise ValueError(
                f"Shampoo: rank {rank} of {share.team.size} owns block {index} of a parameter "
                f"{tuple(parameter.shape)}, and the state has none of it; state_dict() holds the "
                "blocks of one rank, and torch.distributed.checkpoint brings those of all"
            )


def members(group: dict, states: Mapping[Tensor, dict], share: Share | None) -> list[Tensor]:
    """Parameters with a gradient now or earlier; where ranks share the work, all that can have one.

    Ranks must not wait for each other's blocks of different parameters.
    """
    return [
        parameter
        for parameter in dict.fromkeys(group["params"])
        if parameter.grad is not None
        or states.get(parameter)
        or (share is not None and parameter.requires_grad)
    ]


class Plan:
    """The stacks of a param group, whose states were checked; valid while `fits` says so."""

    def __init__(
        self, group: dict, states: Mapping[Tensor, dict], share: Share | None = None
    ) -> None:
        self.share = share
        self.parameters = members(group, states, share)
        self.structure = _structure(group, self.parameters)
        self.cuts = self._cuts(group)
        self.shapes = [one.matrix for one in self.cuts]
        own = [states[parameter] for parameter in self.parameters]
        others = [share.others(parameter) for parameter in self.parameters] if share else None
        self.stacks = build(self.parameters, own, group, self.cuts, others)
        self.step_tensors = [state["step"] for state in own]
        self.ones = [torch.ones_like(step) for step in self.step_tensors]
        self.steps = [int(step) for step in self.step_tensors]
        average, square = MOMENTS
        self.averages = [state[average] for state in own]
        self.squares = {i: state[square] for i, state in enumerate(own) if square in state}
        self._present: list[int] = []
        self._batches: list[Batch] = []  # of the parameters in `_present`

    def fits(self, group: dict, states: Mapping[Tensor, dict], share: Share | None) -> bool:
        """No parameter joined, and neither options nor state tensors were replaced."""
        parameters = members(group, states, share)
        return (
            share is self.share
            and _structure(group, parameters) == self.structure
            and all(
                states[parameter].get(MOMENTS[0]) is exp_avg
                for parameter, exp_avg in zip(parameters, self.averages, strict=True)
            )
        )

    def step_(self, group: dict) -> None:
        """Step every stack."""
        inputs = self._inputs()
        present = list(inputs.grads)
        if present != self._present:  # as a rule it is the same in every step
            self._batches = list(batches(self.stacks, present, self.moments))
            self._present = present
        for batch in self._batches:
            step_(batch, inputs, group)
        self._write_back(inputs.weights, inputs.grads)

    @functools.cached_property
    def moments(self) -> Moments:
        averages = dict(enumerate(self.averages))
        return Moments(self._matrices(averages), self._matrices(self.squares))

    def _cuts(self, group: dict) -> list[Cut]:
        return [cut_parameter(parameter, group) for parameter in self.parameters]

    def _inputs(self) -> Inputs:
        """Everything as matrices, and one more gradient seen."""
        grads = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        self._count(grads)
        return Inputs(
            weights=self._matrices(dict(enumerate(self.parameters))),
            grads=self._matrices(grads),
            steps=self.steps,
        )

    def _count(self, stepped: Collection[int]) -> None:
        if stepped:
            steps, ones = ([x[i] for i in stepped] for x in (self.step_tensors, self.ones))
            torch._foreach_add_(steps, ones)  # on a CPU a third of what adding the number 1 takes
        for i in stepped:
            self.steps[i] += 1

    def _write_back(self, weights: Mapping[int, Tensor], stepped: Iterable[int]) -> None:
        for i in stepped:
            held = self._held(self.parameters[i])
            if weights[i].data_ptr() != held.data_ptr():  # no matrix is a view of it
                held.copy_(weights[i].view(held.shape))

    def _matrices(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Views (M, N), or copies where the strides (channels_last, say) allow no view."""
        return {
            i: held if (held := self._held(tensor)).shape == self.shapes[i]
            else held.reshape(self.shapes[i])
            for i, tensor in tensors.items()
        }  # fmt: skip

    def _held(self, tensor: Tensor) -> Tensor:
        """What this process has of a parameter, its gradient or its moments."""
        return tensor

    def check_capture(self, group: dict) -> None:
        """A graph repeats one step: all gradients, past start_step, and every root in each step."""
        if not self.parameters:
            return
        if self.share is not None:
            raise RuntimeError(
                "Shampoo: capturing step() in a CUDA graph needs a process that works alone, got "
                f"one of {self.share.team.size} that share the blocks"
            )
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


def _structure(group: dict, parameters: list[Tensor]) -> tuple:
    return (
        *(group[name] for name in STRUCTURE),
        *((id(p), p.dtype, p.device, p.shape) for p in parameters),
    )
