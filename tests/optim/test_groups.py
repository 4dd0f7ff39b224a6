"""Param groups of models, their report, and the memory table."""

import functools
import math

import pytest
import torch
from torch import nn

from fullrank.core import PlanEntry, RankPlan
from fullrank.core.errors import InputError, PlanError
from fullrank.core.rank_rules import Fixed
from fullrank.optim import (
    LIFT,
    MKOR,
    AdamP,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    galore_param_groups,
    gradient_plan,
    memory_table,
    param_groups,
    state_bytes,
)
from fullrank.optim.patterns import matches


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(32, 32)
        self.mlp = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(16, 24, 3)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def covered(groups):
    return [id(p) for group in groups for p in group["params"]]


def test_attributes_named_as_a_wrappers_are_lose_no_parameter():
    inner = nn.ModuleDict({"model": nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))})
    model = nn.Sequential(inner, nn.Linear(32, 32))
    groups = param_groups(model, rank=4, verbose=False)
    assert sorted(covered(groups)) == sorted(map(id, model.parameters()))
    assert len(groups[0]["params"]) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_but_embeddings_and_head(tied):
    model = Model(tied)
    groups = param_groups(model, rank=4, verbose=False)
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp", "down")]
    assert list(groups.projected) == [*names, "conv"]
    assert sorted(covered(groups)) == sorted(id(p) for p in model.parameters())
    assert groups.projected["conv"] == ((24, 16, 3, 3), 4)
    assert "embed.weight" in groups.others


def test_targets_by_part_of_a_name_or_by_pattern():
    model = Model()
    assert list(galore_param_groups(model, 4).projected) == [
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.1.attn",
        "blocks.1.mlp",
    ]
    pick = {"rank": 4, "verbose": False}
    assert list(param_groups(model, targets="blocks.1.*", exclude="down", **pick).projected) == [
        "blocks.1.attn",
        "blocks.1.mlp",
    ]
    # Whoever names the head means it.
    assert list(param_groups(model, targets="head", **pick).projected) == ["head"]


def test_frozen_shared_and_narrow_weights():
    model = Model()
    model.blocks[0].attn.weight.requires_grad_(False)
    model.blocks[1].down.weight = model.blocks[0].down.weight
    model.blocks[1].mlp = nn.Linear(32, 4)
    groups = param_groups(model, rank=8, verbose=False)
    assert list(groups.projected) == ["blocks.0.mlp", "blocks.0.down", "blocks.1.attn", "conv"]
    assert len(covered(groups)) == len(set(covered(groups)))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(covered(groups)) == trainable


def test_multihead_attention_of_torch():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    groups = param_groups(layer, rank=2, verbose=False)
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert list(groups.projected) == names


def test_ranks_of_a_plan_share_one_group():
    model = Model()
    plan = RankPlan(
        {
            "blocks.0.attn": PlanEntry((32, 32), 3),
            "blocks.0.mlp": PlanEntry((64, 32), 5),
            "blocks.1.attn": PlanEntry((32, 32), None),
        },
        purpose="optimizer",
    )
    groups = param_groups(model, plan=plan, update_proj_gap=7, verbose=False)
    assert len(groups) == 2
    assert groups[0]["rank"] == [3, 5]
    optimizer = GaLoreAdamW(groups)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[model.blocks[0].mlp.weight]["exp_avg"].shape == (64, 5)
    assert optimizer.param_groups[0]["update_proj_gap"] == 7
    with pytest.raises(PlanError, match="optimizer"):
        param_groups(model, plan=RankPlan(dict(plan)), verbose=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdafactor])
def test_memory_table_equals_what_is_allocated(kind, state_bits, dtype):
    options = {"state_bits": state_bits} if kind is GaLoreAdamW else {"beta1": 0.9}
    model = Model().to(dtype)
    groups = param_groups(model, kind, rank=4, verbose=False)
    table = groups.memory(**options)
    assert memory_table(kind(groups, **options)).rows == table.rows
    optimizer = kind(groups, **options)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    numbers = sum(p.numel() for p in model.parameters())
    assert row["part"] == "all"
    assert row["parameters"] == numbers
    assert row["weights"] == row["gradients"] == numbers * dtype.itemsize
    assert row["optimizer state"] == state_bytes(optimizer)
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    assert row["AdamW's state"] == state_bytes(adamw)


@pytest.mark.parametrize("blend", [0.95, 0.5], ids=["matrices", "columns"])
@pytest.mark.parametrize(
    "inner",
    [
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        functools.partial(torch.optim.AdamW, fused=True),
        functools.partial(AdamP, lr=0.01),
    ],
    ids=["sgd", "adamw", "adamp"],
)
def test_memory_table_of_mkor_counts_the_inner_state_and_the_factors(inner, blend):
    model = nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 3))
    optimizer = MKOR(model, inner, inv_freq=1, blend=blend)
    table = memory_table(optimizer)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert not optimizer.state
    for _ in range(45):
        model(torch.randn(4, 70)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert list(rows) == ["not projected", "factors", "all"]
    assert rows["factors"]["optimizer state"] == optimizer.factor_bytes()
    assert rows["all"]["optimizer state"] == state_bytes(optimizer)
    assert rows["all"]["parameters"] == 70 * 80 + 80 + 80 * 3 + 3


def test_memory_table_of_an_optimizer_that_does_not_say():
    with pytest.raises(InputError, match="LBFGS does not say"):
        memory_table(torch.optim.LBFGS([nn.Parameter(torch.zeros(2))]))


def test_report_is_printed(capsys):
    groups = param_groups(Model(), rank=4)
    printed = capsys.readouterr().out
    assert printed == f"{groups}\n"
    assert "blocks.*.mlp" in printed
    assert "2 x (64, 32), rank 4" in printed
    assert "| projected |" in printed
    assert "KiB" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either rank= .* or plan="),
        ({"rank": 4, "plan": RankPlan({}, purpose="optimizer")}, "either rank= .* or plan="),
        ({"rank": 0}, "rank=0"),
        ({"rank": 4, "targets": "attention"}, r"nothing to project.*blocks\.0\.attn"),
        ({"rank": 4, "exclude": "lm_head"}, "no layer is named like 'lm_head'"),
        ({"rank": 1000}, "no layer wider than rank 1000"),
        ({"rank": 4, "gap": 3}, "have no 'gap'.*update_proj_gap"),
        ({"rank": 4, "optimizer": torch.optim.AdamW}, "not a class of fullrank"),
        ({"plan": RankPlan({}, purpose="optimizer")}, "no trainable weight"),
        ({"plan": RankPlan({}, purpose="optimizer"), "targets": "mlp"}, "a plan says"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(InputError, match=message):
        param_groups(Model(), verbose=False, **options)


def test_memory_of_bare_groups_needs_a_class():
    with pytest.raises(InputError, match="kind="):
        memory_table([{"params": [torch.zeros(3, 4)]}])


# -- named parameters with a rank or a plan --------------------------------------------------


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW, GradNormLoRPAdamW, GaLoreAdafactor])
def test_named_parameters_with_a_plan(kind):
    model = Model()
    plan = RankPlan(
        {
            "blocks.0.attn": PlanEntry((32, 32), 3),
            "blocks.1.down": PlanEntry((32, 64), 5),
            "blocks.1.attn": PlanEntry((32, 32), None),
        },
        purpose="optimizer",
    )
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)  # as DDP names it
    optimizer = kind(wrapped.named_parameters(), plan=plan)
    (group,) = optimizer.param_groups
    assert {n for n, r in zip(group["param_names"], group["rank"], strict=True) if r} == {
        "module.blocks.0.attn.weight",
        "module.blocks.1.down.weight",
    }
    assert optimizer.projects(model.blocks[0].attn.weight)
    assert not optimizer.projects(model.blocks[1].attn.weight)
    with pytest.raises(PlanError, match=r"no parameter belongs to 'blocks\.1\.down'"):
        kind(model.blocks[0].named_parameters(prefix="blocks.0"), plan=plan)
    with pytest.raises(PlanError, match="make one for 'optimizer'"):
        kind(model.named_parameters(), plan=RankPlan(dict(plan)))
    with pytest.raises(InputError, match="named_parameters"):
        kind(model.parameters(), plan=plan)
    with pytest.raises(InputError, match=r"either rank= .* or plan="):
        kind(model.named_parameters(), plan=plan, rank=4)
    other = RankPlan({"blocks.0.attn": PlanEntry((32, 16), 3)}, purpose="optimizer")
    with pytest.raises(PlanError, match=r"the plan is for \(32, 16\)"):
        kind(model.named_parameters(), plan=other)


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW, GradNormLoRPAdamW])
def test_nothing_projected_warns(kind):
    with pytest.warns(UserWarning, match=f"{kind.__name__} projects nothing"):
        kind(Model().named_parameters())


def test_a_rank_that_is_too_large_says_for_what():
    small, large = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(32, 16))
    # One rank for all leaves small ones whole, ...
    optimizer = GaLoreAdamW([small, large], rank=8)
    assert [optimizer.projects(p) for p in (small, large)] == [False, True]
    # ... but not all of them, nor one that it was given for.
    message = r"rank=20 is larger than parameter 'a' of shape \(4, 6\)"
    with pytest.raises(InputError, match=message):
        GaLoreAdamW([("a", small), ("b", large)], rank=20)
    with pytest.raises(InputError, match="rank=8 is larger than parameter 0"):
        GaLoreAdamW([{"params": [small, large], "rank": [8, 8]}])


@pytest.mark.parametrize("kind", [FiraAdamW, GradNormLoRPAdamW, FrugalAdamW])
def test_groups_of_the_other_optimizers(kind):
    model = Model()
    options = {"subspace": "svd"} if kind is FrugalAdamW else {}
    groups = param_groups(model, kind, rank=4, verbose=False, **options)
    optimizer = kind(groups)
    table = memory_table(optimizer)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    assert row["optimizer state"] == state_bytes(optimizer)


# -- other models, other ways to name layers --------------------------------------------------


def test_patterns():
    assert matches("blocks.10.attn.q", "blocks.*.q")
    assert matches("blocks.10.attn.q", "attn")
    assert matches("blocks.1.fc", "blocks.[01].fc")
    assert not matches("blocks.10.fc", "blocks.?.fc")
    # A wildcard must match the whole name.
    assert not matches("blocks.10.attn.q", "*.attn")


def test_wrapped_models_have_the_same_groups():
    model = Model()
    plain = param_groups(model, rank=4, verbose=False)
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    compiled = torch.compile(model, backend="eager")
    for other in (wrapped, compiled):
        groups = param_groups(other, rank=4, verbose=False)
        assert groups.projected == plain.projected
        assert groups.others == plain.others


def test_conv1d_of_transformers_and_separate_attention_weights():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"c_attn": utils.Conv1D(48, 16)})
    model["cross"] = nn.MultiheadAttention(16, 2, kdim=12, vdim=20)
    groups = param_groups(model, rank=2, verbose=False)
    assert groups.projected["c_attn"] == ((16, 48), 2)
    parts = ["cross.q_proj", "cross.k_proj", "cross.v_proj", "cross.out_proj"]
    assert list(groups.projected) == ["c_attn", *parts]
    optimizer = GaLoreAdamW(groups)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[model["c_attn"].weight]["exp_avg"].shape == (2, 48)


def test_masked_weights_of_a_model():
    model = Model()
    groups = param_groups(model, LIFT, rank=1, lra_rank=4, exclude="conv", verbose=False)
    optimizer = LIFT(groups, lr=0.01)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    weight = model.blocks[0].attn.weight
    assert optimizer.state[weight]["indices"].shape == (64,)
    row = dict(zip(groups.memory().columns, groups.memory().rows[-1], strict=True))
    assert row["optimizer state"] == state_bytes(optimizer)


# -- ranks from gradients ---------------------------------------------------------------------


def with_gradients(model, ranks):
    """Gradients whose rank is known: as many equal singular values."""
    for name, rank in ranks.items():
        weight = model.get_submodule(name).weight
        m, n = weight.shape[0], weight[0].numel()
        U, V = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (m, n))
        weight.grad = (U @ V.T).view(weight.shape)
    return model


def test_a_plan_from_gradients():
    ranks = {"blocks.0.attn": 5, "blocks.0.mlp": 20, "blocks.1.down": 1, "conv": 7, "head": 3}
    model = with_gradients(Model(), ranks)
    model.blocks[1].attn.weight.grad = torch.zeros(32, 32)
    plan = gradient_plan(model)
    assert plan.purpose == "optimizer"
    assert plan.source == "gradient"
    found = {name: entry.rank for name, entry in plan.items()}
    # 90 % of so many equal values; the head is not projected.
    del ranks["head"]
    assert found == {n: math.ceil(0.9 * r) for n, r in ranks.items()} | {"blocks.1.attn": None}
    groups = param_groups(model, plan=plan, verbose=False)
    assert groups[0]["rank"] == [5, 18, 1, 7]
    # Whoever names the head means it; other rules see the same spectra.
    assert gradient_plan(model, targets="head")["head"].rank == 3
    assert gradient_plan(model, Fixed(4), exclude="blocks")["conv"].rank == 4
    full = gradient_plan(model, Fixed(32), targets="blocks.0.attn")["blocks.0.attn"]
    assert full.rank is None
    assert "all directions" in full.reason


def test_gradients_that_give_no_plan():
    with pytest.raises(InputError, match=r"loss\.backward"):
        gradient_plan(Model())
    model = with_gradients(Model(), {"conv": 3})
    model.conv.weight.grad[0, 0] = math.inf
    with pytest.raises(InputError, match="gradient of conv holds NaN or infinity"):
        gradient_plan(model)


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW, LIFT])
def test_weights_that_are_computed_are_stepped_by_what_they_are_computed_from(kind):
    def normed(layer):
        return nn.utils.parametrizations.weight_norm(layer)

    model = nn.Sequential(normed(nn.Linear(12, 16)), nn.Tanh(), nn.Linear(16, 14))
    groups = param_groups(model, kind, rank=2, verbose=False)
    optimizer = kind(groups)
    model(torch.ones(3, 12)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [each.name for each in MKOR(model, None).layers] == ["2"]
