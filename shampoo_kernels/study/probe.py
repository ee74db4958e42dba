"""Watch how good the Kronecker approximation of chosen layers is, while a model trains."""

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shampoo_kernels.ops import common
from shampoo_kernels.study.approximations import check_names
from shampoo_kernels.study.gradients import Gradients, Unmeasurable
from shampoo_kernels.study.history import GradientHistory
from shampoo_kernels.study.layers import find_layers
from shampoo_kernels.study.measure import measure
from shampoo_kernels.study.pullback import pull_back
from shampoo_kernels.study.sampling import LABELS, LOSSES, cotangents_of

_OP = "KroneckerProbe"


class KroneckerProbe:
    """Measures layers of `model` before every k-th step of `optimizer`, on the batch of that step.

    Nothing of the training changes: the same numbers to the bit with and without the probe. Rows
    gather in `table`; what they cost stands in `seconds` and `overhead`. Numbers never raise: a
    layer whose gradients are zero or not finite has a row that says so in `note`.

    Args:
        model: called with one tensor (N, *), gives one tensor (N, *, C), C last; of several calls
            before a step the last one counts. With DistributedDataParallel, its `module`.
        optimizer: any torch.optim.Optimizer.
        layers: names of modules or parameters; None: every matrix that requires grad and has no
            side longer than 8192.
        every: measure before steps 0, every, 2 * every, ...
        labels: what the Gauss-Newton view is made of. "sampled" from the model or "expected"
            (exact; outputs (N, C) with few classes) need no labels and `loss`, "cross_entropy" or
            "squared". "real": with the gradient that the training's own loss has at the output,
            whatever that loss is; taken as that of a mean over the batch.
        examples: at most so many of the batch.
        seconds: budget of one measurement. Layers take turns: one whose last measurement took
            longer than what is left waits for the next time, where it comes first.
        beta: also the Adagrad view: gradients of the last steps are kept, with weights beta^age
            (see `GradientHistory` for what that takes).
        names: the approximations, keys of `NAMES`.
        writer: an object with add_scalar(tag, value, step), or a folder for TensorBoard's.

    Raises:
        ValueError: no such layer, one without gradient, or an option that does not exist.
        ModuleNotFoundError: `writer` is a folder and tensorboard is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: str | Sequence[str] | None = None,
        every: int = 100,
        labels: str = "sampled",
        loss: str = "cross_entropy",
        examples: int = 64,
        seconds: float = 1.0,
        beta: float | None = None,
        names: Sequence[str] = ("optimal", "shampoo_squared", "shampoo"),
        writer: Any = None,
    ) -> None:
        self.layers = find_layers(_OP, model, layers)
        common.check_option(_OP, "labels", labels, LABELS)
        common.check_option(_OP, "loss", loss, LOSSES)
        check_names(_OP, names)
        for option, value in (("every", every), ("examples", examples)):
            if value < 1:
                raise ValueError(f"{_OP}: {option} must be at least 1, got {value}")
        if not seconds > 0:
            raise ValueError(f"{_OP}: seconds must be above 0, got {seconds}")
        self.model, self.every, self.examples, self.budget = model, every, examples, seconds
        self.labels, self.loss, self.names = labels, loss, tuple(names)
        self.table: list[dict[str, Any]] = []
        self.step = 0  # of the optimizer, since the probe was attached
        self.seconds = 0.0  # spent here
        self._histories = (
            {}
            if beta is None
            else {x.name: GradientHistory(beta, layer=x.name) for x in self.layers}
        )
        self._turns = [(view, x) for x in self.layers for view in self._views()]
        self._took: dict[tuple[str, str], float] = {}
        self._inputs: Tensor | None = None
        self._output_grads: Tensor | None = None
        self._busy = False
        self._generator: torch.Generator | None = None
        self._writer, self._own_writer = _writer(writer)
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._handles = [
            model.register_forward_hook(self._see_forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
        ]

    @property
    def overhead(self) -> float:
        """The share of the time that the probe was attached that was spent in it."""
        end = self._ended if self._ended is not None else time.perf_counter()
        return self.seconds / max(end - self._started, 1e-9)

    def detach(self) -> None:
        """Take every hook off the model and the optimizer; the table stays."""
        if self._ended is None:
            self._ended = time.perf_counter()
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._output_grads = [], None, None
        self._histories = {}
        if self._own_writer:
            self._writer.close()

    def __enter__(self) -> "KroneckerProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def to_csv(self, path: str | Path) -> None:
        columns = list(dict.fromkeys(key for row in self.table for key in row))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.table)

    def to_json(self, path: str | Path) -> None:
        found = {"seconds": self.seconds, "overhead": self.overhead, "table": self.table}
        Path(path).write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")

    def _views(self) -> list[str]:
        return ["gauss_newton", "adagrad"] if self._histories else ["gauss_newton"]

    def _see_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep the batch, where the next step is one that is measured."""
        if self._busy or not model.training or self.step % self.every:
            return
        start = time.perf_counter()
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{_OP}: the model must be called with one tensor, got {len(args)} positional and "
                f"{len(kwargs)} keyword arguments"
            )
        self._inputs, self._output_grads = args[0][: self.examples].detach().clone(), None
        if self.labels == "real" and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._see_output_grad)
        self.seconds += time.perf_counter() - start

    def _see_output_grad(self, grad: Tensor) -> None:
        if not self._busy and self._handles:
            self._output_grads = grad[: self.examples].detach() * len(grad)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        start = time.perf_counter()
        for layer in self.layers if self._histories else ():
            if layer.weight.grad is not None:
                self._histories[layer.name].append(layer.weight.grad)
        if self.step % self.every == 0 and self._inputs is not None:
            self._busy = True
            try:
                devices = [self._inputs.device] if self._inputs.is_cuda else []
                with torch.random.fork_rng(devices):
                    self._measure(start)
            finally:
                self._busy, self._inputs, self._output_grads = False, None, None
        self.step += 1
        self.seconds += time.perf_counter() - start

    def _measure(self, start: float) -> None:
        """Layers in turn, at least one, as long as the last duration of the next one fits."""
        for count in range(len(self._turns)):
            view, layer = self._turns[0]
            left = self.budget - (time.perf_counter() - start)
            if count and self._took.get((view, layer.name), 0.0) > left:
                return
            self._turns.append(self._turns.pop(0))
            began = time.perf_counter()
            row: dict[str, Any] = {"step": self.step, "view": view, "layer": layer.name}
            try:
                found = measure(self._gradients(view, layer), names=self.names)
                row |= {key: _plain(value) for key, value in found.row().items()} | {"note": ""}
            except Unmeasurable as reason:
                row["note"] = str(reason)
            took = self._took[view, layer.name] = time.perf_counter() - began
            self.table.append(row | {"seconds": took})
            if self._writer is not None and not row["note"]:
                for name in self.names:
                    tag = f"kronecker/{view}/{layer.name}/{name}"
                    self._writer.add_scalar(tag, found.cosines[name], self.step)

    def _gradients(self, view: str, layer: Any) -> Gradients:
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        if view == "adagrad":
            return self._histories[layer.name].gradients(dtype)
        assert self._inputs is not None
        if self._generator is None:
            self._generator = torch.Generator(self._inputs.device).manual_seed(0)

        def cotangents(outputs: Tensor, start: int) -> Tensor:
            if self.labels != "real":
                return cotangents_of(
                    outputs, None, self.loss, self.labels, self._generator, [layer]
                )
            if self._output_grads is None:
                raise Unmeasurable(f"{_OP}: no gradient came to the output of the model")
            return self._output_grads[start : start + len(outputs)].unsqueeze(1)

        return pull_back(self.model, [layer], self._inputs, cotangents, dtype=dtype)[layer.name]


def _plain(value: Any) -> Any:
    """None in place of a number that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writer(given: Any) -> tuple[Any, bool]:
    if not isinstance(given, str | Path):
        if given is not None and not hasattr(given, "add_scalar"):
            raise TypeError(f"{_OP}: writer must have add_scalar, got {type(given).__name__}")
        return given, False
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{_OP}: writer={str(given)!r} needs TensorBoard: pip install tensorboard"
        ) from error
    return SummaryWriter(given), True
