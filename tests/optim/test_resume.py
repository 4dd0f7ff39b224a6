"""Stopping at any step and continuing is bit-equal; foreign states are refused."""

import copy

import pytest
import torch
from stepping import advance, assert_continues, through_a_file
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import (
    FiraAdamW,
    FiraRMSprop,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
)

EIGHT = {"state_bits": 8, "min_8bit_size": 1}
CASES = {
    "svd": (GaLoreAdamW, {}),
    "subspace": (GaLoreAdamW, {"refresh": "subspace"}),
    "rotate": (GaLoreAdamW, {"moments": "rotate"}),
    "reset": (GaLoreAdamW, {"moments": "reset"}),
    "full": (GaLoreAdamW, {"proj_type": "full"}),
    "8bit": (GaLoreAdamW, EIGHT),
    "rounding": (GaLoreAdamW, {"stochastic_rounding": True, "generator": 5}),
    "gemm": (GaLoreAdamW, {"gemm": "bfloat16"}),
    "adafactor": (GaLoreAdafactor, {"beta1": 0.9}),
    "adafactor8": (GaLoreAdafactor, {"beta1": 0.9, **EIGHT}),
    "fira": (FiraAdamW, {}),
    "fira8": (FiraAdamW, {**EIGHT, "stochastic_rounding": True}),
    "fira_rms": (FiraRMSprop, {"momentum": 0.9, "centered": True}),
    "fira_rms8": (FiraRMSprop, {"momentum": 0.9, **EIGHT}),
    "gradnorm": (GradNormLoRPAdamW, {}),
    "gradnorm8": (GradNormLoRPAdamW, {**EIGHT, "moments": "reset", "refresh": "subspace"}),
    "gradnorm_official": (GradNormLoRPAdamW, {"mode": "official"}),
    "frugal_block": (FrugalAdamW, {"density": 0.5}),
    "frugal_block_random": (FrugalAdamW, {"density": 0.5, "block_order": "random", **EIGHT}),
    "frugal_columns": (FrugalAdamW, {"subspace": "columns"}),
    "frugal_randk": (FrugalAdamW, {"subspace": "randk", "stochastic_rounding": True}),
    "frugal_random": (FrugalAdamW, {"subspace": "random", "generator": 3}),
    "frugal_svd": (FrugalAdamW, {"subspace": "svd", **EIGHT}),
    "frugal_gemm": (FrugalAdamW, {"subspace": "svd", "gemm": "bfloat16", "refresh": "subspace"}),
    "frugal_lion": (FrugalAdamW, {"subspace": "rows", "stateful": "lion", **EIGHT}),
    "frugal_sgdm": (FrugalAdamW, {"subspace": "svd", "stateful": "sgdm", **EIGHT}),
}


def build(case, dtype):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)).to(dtype)
    kind, options = CASES[case]
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    own = {"rank": 3, "update_proj_gap": 3}
    if kind is FrugalAdamW:
        own = {"is_proj_params": True, "update_gap": 3}
    group = {"params": weights, **own}
    return model, kind([group, {"params": others}], weight_decay=0.01, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_continuing_is_bit_equal_at_every_step(case, dtype):
    # Inside a period, at its end, and around the step that was skipped.
    assert_continues(lambda: build(case, dtype), range(9) if case == "svd" else (1, 3, 5, 8))


def test_loading_copies():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    state = optimizer.state_dict()
    twin, other = build("svd", torch.float32)
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    advance(twin, other, range(2, 4))
    loaded = other.state_dict()["state"][0]
    assert not torch.equal(loaded["exp_avg"], before["state"][0]["exp_avg"])
    assert torch.equal(state["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_bases_are_laid_out_alike_whatever_a_file_keeps():
    # Products round differently with other strides, which formats such as safetensors drop.
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    state = through_a_file(optimizer.state_dict())
    rows = state["state"][0]["basis_right"] = state["state"][0]["basis_right"].contiguous()
    twin, other = build("svd", torch.float32)
    twin.load_state_dict(through_a_file(model.state_dict()))
    other.load_state_dict(state)
    for each in (model, optimizer), (twin, other):
        advance(*each, range(2, 3))
    found = other.state[twin[0].weight]["basis_right"]
    assert found.stride() == optimizer.state[model[0].weight]["basis_right"].stride() == (1, 3)
    assert rows.stride() == (12, 1)
    torch.testing.assert_close(twin[0].weight, model[0].weight, rtol=0, atol=0)


def test_hooks_of_users_run_around_loading():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    _, other = build("svd", torch.float32)
    found = []

    def before(_, state):
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] * 2
        return state

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(
        lambda o: found.append(o.state[o.param_groups[0]["params"][0]]["exp_avg"])
    )
    mean = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].clone()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(found[0], 2 * mean)


def test_copies_of_an_optimizer_work():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    advance(model, optimizer, range(2, 5))
    advance(twin_model, twin, range(2, 5))
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_optimizer_is_refused():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    foreign = torch.optim.AdamW(groups, lr=0.1)
    foreign.step()
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert torch.equal(before["state"][0]["exp_avg"], after["state"][0]["exp_avg"])
    advance(model, optimizer, range(2, 5))


def test_state_of_other_shapes_is_refused():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    other = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12))
    weights = [p for p in other.parameters() if p.dim() == 2]
    biases = [p for p in other.parameters() if p.dim() < 2]
    wider = GaLoreAdamW([{"params": weights, "rank": 3}, {"params": biases}])
    with pytest.raises(InputError, match=r"exp_avg of parameter 0 of group 0.*expected \(24, 3\)"):
        wider.load_state_dict(optimizer.state_dict())


def test_a_missing_tensor_is_named():
    model, optimizer = build("svd", torch.float32)
    advance(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["basis_left"]
    with pytest.raises(InputError, match="basis_left"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "case", ["subspace", "8bit", "fira", "gradnorm", "frugal_columns", "frugal_random"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoint_allocates_without_refreshing(case, dtype, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = build(case, dtype)
    advance(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "step")
    twin, other = build(case, dtype)
    weights, state = get_state_dict(twin, other)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "step")
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)
    advance(model, optimizer, range(4, 9))
    advance(twin, other, range(4, 9))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


CHANGES = {
    "rank": (GaLoreAdamW, {}, 5),
    "state_bits": (GaLoreAdamW, EIGHT, 32),
    "proj_type": (FiraAdamW, {}, "full"),
    "density": (FrugalAdamW, {"subspace": "columns"}, 0.5),
    "limiter": (FiraAdamW, {"limiter": None}, 1.01),
    "momentum": (FiraRMSprop, {}, 0.9),
    "beta1": (GaLoreAdafactor, {}, 0.9),
}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("then", ["step", "copy", "add"])
def test_what_the_state_was_made_for_cannot_change(key, then):
    kind, options, value = CHANGES[key]
    W = nn.Parameter(torch.randn(12, 8))
    own = {"is_proj_params": True} if kind is FrugalAdamW else {"rank": 3}
    optimizer = kind([{"params": [W], **own}], **options)

    def step(optimizer):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step(optimizer)
    before = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    if then == "copy":
        optimizer = copy.deepcopy(optimizer)
    elif then == "add":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(InputError, match=r"has the state .*make a new optimizer"):
        step(optimizer)
    optimizer.param_groups[0][key] = before
    step(optimizer)


def test_before_the_first_step_everything_can_change():
    W = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [W], "rank": 3}])
    optimizer.param_groups[0]["rank"] = 5
    W.data = W.data.double()
    W.grad = torch.ones_like(W)
    optimizer.step()
    assert optimizer.state[W]["exp_avg"].shape == (12, 5)
    assert optimizer.state[W]["exp_avg"].dtype == torch.float64


def test_what_a_schedule_changes_costs_no_state():
    W = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [W], "rank": 3}])
    for lr in (0.1, 0.2):
        optimizer.param_groups[0].update(lr=lr, betas=(lr, 0.9), weight_decay=lr)
        W.grad = torch.ones_like(W)
        optimizer.step()
    assert optimizer.state[W]["step"] == 2


@pytest.mark.parametrize("subspace", ["columns", "rows", "randk"])
def test_coordinates_that_a_hook_chose_are_saved(subspace):
    def hook(weight, grad, side):
        count = {"columns": 2, "rows": 1, "randk": 12}[side]
        where = grad if side == "randk" else grad.norm(dim=0 if side == "columns" else 1)
        return where.flatten().topk(count).indices

    def make(param):
        groups = [{"params": [param], "is_proj_params": True}]
        return FrugalAdamW(groups, subspace=subspace, lr=0.1, update_gap=9, projection_hook=hook)

    p = nn.Parameter(torch.zeros(6, 8))
    one = make(p)
    grads = torch.randn(6, 6, 8, generator=torch.Generator().manual_seed(0))
    for grad in grads[:3]:
        p.grad = grad.clone()
        one.step()
    q = nn.Parameter(p.detach().clone())
    two = make(q)
    two.load_state_dict(through_a_file(one.state_dict()))
    for grad in grads[3:]:
        for param, optimizer in ((p, one), (q, two)):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(p, q)


def test_a_hook_may_come_and_go():
    def hook(weight, grad, side):
        return torch.tensor([1, 6])

    def make(param, hook):
        groups = [{"params": [param], "is_proj_params": True}]
        return FrugalAdamW(groups, subspace="columns", lr=0.1, projection_hook=hook)

    for before, after in ((hook, None), (None, hook)):
        p, q = (nn.Parameter(torch.zeros(6, 8)) for _ in range(2))
        one, two = make(p, before), make(q, after)
        for optimizer, param in ((one, p), (two, q), (two, q)):
            if optimizer is two:
                two.load_state_dict(through_a_file(one.state_dict()))
            param.grad = torch.ones(6, 8)
            optimizer.step()
        assert torch.equal(one.state[p]["seed"], two.state[q]["seed"])


def test_stepping_parameter_by_parameter_looks_at_each_once(monkeypatch):
    from fullrank.optim import foundation

    looked = []
    kind = foundation._kind
    monkeypatch.setattr(foundation, "_kind", lambda param: looked.append(1) or kind(param))
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(20)]
    optimizer = GaLoreAdamW(params, rank=2)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
            optimizer.step_parameter(param)
    assert len(looked) <= 4 * len(params)


def test_one_that_was_pickled_before_there_was_a_field():
    W = nn.Parameter(torch.ones(6, 4))
    optimizer = GaLoreAdamW([W], rank=2)
    W.grad = torch.ones_like(W)
    optimizer.step()
    state = optimizer.__getstate__()
    del state["_settled"]
    again = GaLoreAdamW.__new__(GaLoreAdamW)
    again.__setstate__(state)
    again.step()
