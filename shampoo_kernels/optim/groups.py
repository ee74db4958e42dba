"""Which parameters of a model to precondition, and as what matrices."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shampoo_kernels.optim.blocks import matrix_shape

QKV = ("whole", "projection", "head")
HEAD_NAMES = ("head", "lm_head", "classifier", "logits", "unembed", "output_projection")
QKV_NAMES = ("qkv", "c_attn", "query_key_value", "wqkv", "in_proj_weight")

_CONVOLUTIONS = nn.modules.conv._ConvNd
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)  # fmt: skip


@dataclass(frozen=True)
class Use:
    """What becomes of a parameter: the options of its group, and the reason in words."""

    reason: str
    precondition: bool = True
    split: tuple[int, int] = (1, 1)
    batch_dims: int = 0

    def options(self) -> dict[str, Any]:
        if not self.precondition:
            return {"precondition": False}
        chosen: dict[str, Any] = {"precondition": True}
        if self.split != (1, 1):
            chosen["split"] = self.split
        if self.batch_dims:
            chosen["batch_dims"] = self.batch_dims
        return chosen


class ParamGroups(list):
    """Param groups for `Shampoo`; printed, a table with the reason for every parameter.

    `reasons`: {name of the parameter: why it is where it is}.
    """

    def __init__(self, groups: list[dict], rows: list[tuple[str, str, str, str]]) -> None:
        super().__init__(groups)
        self.rows = rows
        self.reasons = {name: reason for name, _, _, reason in rows}

    def __str__(self) -> str:
        rows = [("parameter", "shape", "step", "because"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


@dataclass
class _Owners:
    """The modules that hold one parameter, more than one where weights are tied."""

    names: list[str] = field(default_factory=list)  # of the parameter, in each of them
    modules: list[nn.Module] = field(default_factory=list)


def split_params(
    model: nn.Module,
    *,
    heads: Collection[str] | None = None,
    qkv: str = "projection",
    num_heads: int | None = None,
    **options: Any,
) -> ParamGroups:
    """The param groups of `model` for `Shampoo`: what is preconditioned, and what runs AdamW.

    Preconditioned are the matrices: weights of linear layers and convolutions (of grouped ones each
    group by itself, unless its matrices have one row), and parameters with more dimensions as
    stacks of matrices (experts). Embeddings, heads, norms, biases and other vectors are not. Of
    tied weights one embedding or head makes all.

    Args:
        model: every parameter comes into exactly one group, frozen ones too.
        heads: names of modules or parameters; None: the last linear layer in the order of the
            model, and layers called head, lm_head, classifier, ...; () for none.
        qkv: "projection" cuts a fused query, key and value (in_proj_weight of MultiheadAttention;
            layers called qkv, c_attn, ... with one side three times the other) in three, "head"
            each of these into its heads, "whole" not at all.
        num_heads: for qkv="head", where it is not a MultiheadAttention, which knows.
        options: of all groups, as in `Shampoo`.

    Returns:
        A list of param groups with named parameters; print it to see every reason.

    Raises:
        ValueError: a head that does not exist, or qkv="head" without a number of heads that fits.
    """
    if qkv not in QKV:
        raise ValueError(f"split_params: qkv must be one of {QKV}, got {qkv!r}")
    owners = _owners(model)
    chosen = _heads(model, owners, heads)
    groups: dict[tuple, dict] = {}
    rows = []
    for name, parameter in model.named_parameters():
        use = _use(parameter, owners[id(parameter)], chosen, qkv, num_heads)
        own = use.options()
        group = groups.setdefault(tuple(own.items()), {**options, **own, "params": []})
        group["params"].append((name, parameter))
        step = "Shampoo" if use.precondition else "graft"
        rows.append((name, str(tuple(parameter.shape)), step, use.reason))
    return ParamGroups(list(groups.values()), rows)


def _owners(model: nn.Module) -> dict[int, _Owners]:
    found: dict[int, _Owners] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owner = found.setdefault(id(parameter), _Owners())
            owner.names.append(f"{path}.{name}" if path else name)
            owner.modules.append(module)
    return found


def _heads(
    model: nn.Module, owners: dict[int, _Owners], heads: Collection[str] | None
) -> dict[int, str]:
    """{id of a parameter: why it is a head}."""
    if heads is None:
        return dict(_guessed_heads(model))
    found = {}
    for wanted in [heads] if isinstance(heads, str) else heads:
        matching = [
            key
            for key, owner in owners.items()
            if any(name == wanted or name.startswith(f"{wanted}.") for name in owner.names)
        ]
        if not matching:
            raise ValueError(f"split_params: the model has no module or parameter {wanted!r}")
        found.update(dict.fromkeys(matching, "a head, as said"))
    return found


def _guessed_heads(model: nn.Module) -> Iterator[tuple[int, str]]:
    last = None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = module
            if path.rpartition(".")[2].lower() in HEAD_NAMES:
                yield id(module.weight), "a head, by its name"
    if last is not None:
        yield id(last.weight), "a head: the last linear layer"


def _use(
    parameter: Tensor, owner: _Owners, heads: dict[int, str], qkv: str, num_heads: int | None
) -> Use:
    """The first rule that applies."""
    if any(isinstance(module, _EMBEDDINGS) for module in owner.modules):
        tied = ", tied" if len(owner.modules) > 1 else ""
        return Use(f"embedding{tied}", precondition=False)
    if any(isinstance(module, _NORMS) for module in owner.modules):
        return Use("norm", precondition=False)
    if matrix_shape(parameter.shape)[0] < 2:
        last = owner.names[0].rpartition(".")[2]
        return Use("bias" if "bias" in last else "vector or scalar", precondition=False)
    if id(parameter) in heads:
        return Use(heads[id(parameter)], precondition=False)
    module, name = owner.modules[0], owner.names[0]
    if isinstance(module, _CONVOLUTIONS):
        return _convolution(parameter, module)
    if "embed" in name.lower():
        return Use("embedding, by its name", precondition=False)
    if parameter.ndim > 2:
        return Use("stack of matrices", batch_dims=parameter.ndim - 2)
    pieces = (1, 1) if qkv == "whole" else _qkv_pieces(parameter, module, name, qkv, num_heads)
    if pieces != (1, 1):
        return Use(f"fused query, key and value: {pieces[0]} x {pieces[1]} pieces", split=pieces)
    return Use("matrix")


def _convolution(parameter: Tensor, module: Any) -> Use:
    """As (first dimension x all others); where there are groups, the first is all of them."""
    if module.groups == 1:
        return Use("convolution")
    if parameter.shape[0] == module.groups:
        return Use("depthwise convolution, as one matrix")
    return Use(f"grouped convolution: {module.groups} matrices", split=(module.groups, 1))


def _qkv_pieces(
    parameter: Tensor, module: nn.Module, name: str, qkv: str, num_heads: int | None
) -> tuple[int, int]:
    m, n = parameter.shape
    parts = name.lower().split(".")
    if not any(part in QKV_NAMES for part in parts[-2:]) or 3 * min(m, n) != max(m, n):
        return 1, 1
    count = 3
    if qkv == "head":
        heads = module.num_heads if isinstance(module, nn.MultiheadAttention) else num_heads
        if not heads or min(m, n) % heads:
            raise ValueError(
                f'split_params: qkv="head" needs a num_heads that divides {min(m, n)} for {name}, '
                f"got {heads!r}"
            )
        count *= heads
    return (count, 1) if m > n else (1, count)
