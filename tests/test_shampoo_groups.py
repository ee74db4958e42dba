"""split_params: every parameter of a model in one group, with the reason; state_bytes."""

import pytest
import torch
from torch import nn
from training import VARIANTS, gradients, train

from shampoo_kernels import Shampoo, split_params, state_bytes


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.own = nn.MultiheadAttention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.own(q, k, v)[0]


class Model(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.position_embedding = nn.Parameter(torch.randn(7, 12))
        self.attention = Attention(12, 3)
        self.experts = nn.Parameter(0.1 * torch.randn(4, 12, 8))
        self.back = nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(()))
        self.convolution = nn.Conv1d(12, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.transposed = nn.ConvTranspose1d(8, 12, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.lm_head = nn.Linear(12, 50, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position_embedding
        x = self.attention(x)
        x = self.back(torch.einsum("btw,ewf->btf", x, self.experts)) * self.scale
        x = self.transposed(self.depthwise(self.grouped(self.convolution(x.mT))))
        return self.lm_head(self.frozen(self.batch_norm(x).mT))


EXPECTED = {  # (preconditioned, split, batch_dims, what the reason says)
    "embedding.weight": (False, None, None, "embedding, tied"),
    "position_embedding": (False, None, None, "embedding, by its name"),
    "attention.qkv.weight": (True, (3, 1), None, "fused query, key and value"),
    "attention.qkv.bias": (False, None, None, "bias"),
    "attention.own.in_proj_weight": (True, (3, 1), None, "fused query, key and value"),
    "attention.own.in_proj_bias": (False, None, None, "bias"),
    "attention.own.out_proj.weight": (True, None, None, "matrix"),
    "attention.norm.weight": (False, None, None, "norm"),
    "experts": (True, None, 1, "stack of matrices"),
    "back.weight": (True, None, None, "matrix"),
    "scale": (False, None, None, "vector or scalar"),
    "convolution.weight": (True, None, None, "convolution"),
    "convolution.bias": (False, None, None, "bias"),
    "grouped.weight": (True, (2, 1), None, "grouped convolution"),
    "depthwise.weight": (True, None, None, "depthwise"),
    "transposed.weight": (True, None, None, "convolution"),
    "batch_norm.weight": (False, None, None, "norm"),
    "frozen.weight": (True, None, None, "matrix"),
}


def by_name(groups):
    return {name: group for group in groups for name, _ in group["params"]}


def test_every_parameter_is_where_it_belongs_and_says_why():
    model = Model()
    groups = split_params(model)
    found = by_name(groups)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, (precondition, split, batch_dims, reason) in EXPECTED.items():
        group = found[name]
        assert group["precondition"] is precondition, name
        assert (group.get("split"), group.get("batch_dims")) == (split, batch_dims), name
        assert groups.reasons[name].startswith(reason), name
    lines = str(groups).splitlines()
    assert len(lines) == 1 + len(found)
    assert lines[0].split() == ["parameter", "shape", "step", "because"]
    assert "position_embedding" in str(groups)
    assert "(7, 12)" in str(groups)


def test_a_model_of_everything_trains_and_keeps_what_is_frozen_or_tied():
    torch.manual_seed(0)
    model = Model()
    frozen, unused = model.frozen.weight.clone(), nn.Parameter(torch.ones(3, 3))
    model.unused = unused
    optimizer = Shampoo(split_params(model), lr=3e-3, block_size=8, refresh_every=2)
    tokens = torch.randint(50, (4, 7))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model.frozen.weight, frozen)
    assert torch.equal(unused, torch.ones(3, 3))
    assert model.lm_head.weight is model.embedding.weight
    assert unused not in optimizer.state
    # four experts, blocks of 6 x 8 each: 12 rows are two pieces
    names = optimizer.state[model.experts]
    assert sum(name.startswith("left_root") for name in names) == 4 * 2
    model.frozen.requires_grad_()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert not torch.equal(model.frozen.weight, frozen)


def test_heads_are_the_last_linear_layer_or_what_is_said():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    assert by_name(split_params(model))["0.weight"]["precondition"]
    assert not by_name(split_params(model))["2.weight"]["precondition"]
    assert by_name(split_params(model, heads=()))["2.weight"]["precondition"]
    said = split_params(model, heads=["0"])
    assert not by_name(said)["0.weight"]["precondition"]
    assert by_name(said)["2.weight"]["precondition"]
    assert said.reasons["0.weight"] == "a head, as said"
    with pytest.raises(ValueError, match=r"^split_params: the model has no .* 'fc'"):
        split_params(model, heads=["fc"])


class Names(nn.Module):
    """Where a name, or the order of modules, could mislead."""

    def __init__(self):
        super().__init__()
        self.tied_head = nn.Linear(12, 30, bias=False)  # comes before what makes it an embedding
        self.tokens = nn.Embedding(30, 12)
        self.tied_head.weight = self.tokens.weight
        self.types = nn.Embedding(3, 12)
        self.patch_embed = nn.Conv2d(3, 12, 4)
        self.Pos_Embed = nn.Parameter(torch.randn(1, 9, 12))
        self.fc1, self.fc10 = nn.Linear(12, 12), nn.Linear(12, 12)
        self.qkv = nn.ModuleDict({"out": nn.Linear(12, 36)})
        self.wqkv = nn.Linear(12, 30)
        self.multiplied = nn.Conv1d(4, 8, 3, groups=4)
        self.experts = nn.Parameter(torch.randn(2, 3, 4, 5))
        self.value = nn.Linear(12, 1)
        self.Classifier = nn.Linear(12, 5)
        self.projection = nn.Linear(5, 5)


def test_names_and_orders_do_not_mislead():
    model = Names()
    groups = split_params(model)
    found = {
        name: (group["precondition"], group.get("split"), group.get("batch_dims"))
        for name, group in by_name(groups).items() if name.rpartition(".")[2] != "bias"
    }  # fmt: skip
    assert found == {
        "tied_head.weight": (False, None, None),
        "types.weight": (False, None, None),
        "patch_embed.weight": (True, None, None),
        "Pos_Embed": (False, None, None),
        "fc1.weight": (True, None, None),
        "fc10.weight": (True, None, None),
        "qkv.out.weight": (True, None, None),  # made from query, key and value
        "wqkv.weight": (True, None, None),  # not three times as long as wide
        "multiplied.weight": (True, (4, 1), None),  # four matrices of two rows
        "experts": (True, None, 2),
        "value.weight": (False, None, None),  # one row
        "Classifier.weight": (False, None, None),
        "projection.weight": (False, None, None),
    }
    assert groups.reasons["tied_head.weight"] == "embedding, tied"
    assert groups.reasons["types.weight"] == "embedding"
    assert groups.reasons["value.weight"] == "vector or scalar"
    assert groups.reasons["Classifier.weight"] == "a head, by its name"
    assert groups.reasons["projection.weight"] == "a head: the last linear layer"


@pytest.mark.parametrize("heads", ["fc1", ["fc1"], ("fc1.weight",)], ids=str)
def test_a_head_is_said_by_its_module_or_parameter_and_no_other_is_meant(heads):
    found = split_params(Names(), heads=heads)
    assert [name for name, reason in found.reasons.items() if "head" in reason] == ["fc1.weight"]


def test_what_a_parameter_is_counts_more_than_the_options_of_all():
    found = by_name(split_params(Names(), precondition=True, split=1))
    assert not found["types.weight"]["precondition"]
    assert found["multiplied.weight"]["split"] == (4, 1)


def test_query_key_and_value_whole_or_by_head():
    model = Attention(12, 3)
    whole = by_name(split_params(model, qkv="whole", heads=()))
    assert "split" not in whole["qkv.weight"]
    heads = by_name(split_params(model, qkv="head", heads=(), num_heads=4))
    assert heads["qkv.weight"]["split"] == (12, 1)
    assert heads["own.in_proj_weight"]["split"] == (9, 1)  # it knows its three heads
    with pytest.raises(ValueError, match=r"^split_params: .*num_heads that divides 12 .* got 5"):
        split_params(model, qkv="head", num_heads=5)
    with pytest.raises(ValueError, match=r"^split_params: .*num_heads .* got None"):
        split_params(model, qkv="head")
    with pytest.raises(ValueError, match=r"^split_params: qkv must be one of .* got 'rows'"):
        split_params(model, qkv="rows")


def test_a_transposed_weight_is_split_by_columns():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 12))

    model = nn.ModuleDict({"c_attn": Conv1D()})
    assert by_name(split_params(model))["c_attn.weight"]["split"] == (1, 3)


def test_options_are_those_of_all_groups():
    groups = split_params(Model(), weight_decay=0.3)
    optimizer = Shampoo(groups, lr=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert set(names) == {name for name, _ in Model().named_parameters()}


def real_bytes(optimizer):
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values())


MORE = {
    "blocks": {"block_size": 3},
    "no long side": {"max_dimension": 9},
    "adamw": {"precondition": False},
}


@pytest.mark.parametrize("options", [*VARIANTS.values(), *MORE.values()], ids=[*VARIANTS, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_bytes_are_those_of_the_real_state(options, dtype):
    model = nn.Sequential(nn.Linear(7, 12), nn.Conv2d(3, 5, 2), nn.LayerNorm(4)).to(dtype)
    model[0].bias.requires_grad_(False)
    expected = state_bytes(model, **options)
    optimizer = Shampoo(model.parameters(), **options)
    own = [p for p in model.parameters() if p.requires_grad]
    train(optimizer, [(p, gradients(p.shape, 1, dtype)) for p in own])
    assert expected.total == real_bytes(optimizer)
    assert expected.total == (
        expected.moments + expected.statistics + expected.roots + expected.other
    )


def test_state_bytes_of_groups_and_of_a_model_that_is_nowhere():
    model = Model()
    groups = split_params(model)
    expected = state_bytes(groups, block_size=8)
    optimizer = Shampoo(groups, block_size=8)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert expected.total == real_bytes(optimizer)
    with torch.device("meta"):
        nowhere = Model()
    nowhere.lm_head.weight = nowhere.embedding.weight
    assert state_bytes(split_params(nowhere), block_size=8) == expected


def test_a_square_matrix_takes_24_bytes_a_parameter():
    """AdamW's 8, and as much for the statistics and for the roots."""
    with torch.device("meta"):
        layer = nn.Linear(1024, 1024, bias=False)
    counted = state_bytes(layer)
    assert (counted.moments, counted.statistics, counted.roots) == (8 << 20, 8 << 20, 8 << 20)
    assert counted.other == 8  # two counts
    assert state_bytes(layer, root_dtype=torch.bfloat16).roots == 4 << 20
    assert state_bytes(layer, graft="sgd").moments == 4 << 20
    assert state_bytes(layer, p=(2, None)).roots == 4 << 20
