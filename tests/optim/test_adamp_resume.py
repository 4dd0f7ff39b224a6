"""AdamP and SGDP: resume, foreign states, schedules, scaling, bad input."""

import copy
import math

import pytest
import torch
from adamp_cases import MAKE, advance, parameters
from stepping import through_a_file
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import state_bytes
from fullrank.optim.adamp import SGDP, AdamP


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


# -- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuing_is_bit_equal(make, dtype):
    whole = parameters(dtype)
    advance(whole, make(whole), range(6))
    for stop in range(6):
        first = parameters(dtype)
        optimizer = make(first)
        advance(first, optimizer, range(stop))
        second = [nn.Parameter(p.detach().clone()) for p in first]
        resumed = make(second)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        advance(second, resumed, range(stop, 6))
        assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_states_of_the_package_adamp_load():
    params = parameters()
    adam = {
        i: {"step": 7, "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
        for i, p in enumerate(params)
    }
    group = {
        "lr": 0.5,
        "betas": (0.8, 0.9),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "delta": 0.1,
        "wd_ratio": 0.1,
        "nesterov": False,
        "params": list(range(len(params))),
    }
    optimizer = AdamP(params)
    optimizer.load_state_dict({"state": adam, "param_groups": [group]})
    assert optimizer.param_groups[0]["lr"] == 0.5
    state = optimizer.state[params[0]]
    assert (float(state["step"]), float(state["unseen"])) == (7.0, 0.0)
    assert torch.equal(state["exp_avg"], adam[0]["exp_avg"])
    advance(params, optimizer, range(2))
    assert float(state["step"]) == 9.0

    sgd = {i: {"momentum": torch.randn(p.shape)} for i, p in enumerate(params)}
    del group["betas"]
    group |= {"momentum": 0.9, "dampening": 0}
    other = SGDP(params, lr=0.1)
    other.load_state_dict({"state": sgd, "param_groups": [group]})
    assert torch.equal(other.state[params[1]]["momentum"], sgd[1]["momentum"])
    assert other.param_groups[0]["project_buffer"] is False


def test_states_of_other_optimizers_are_refused(make):
    params = parameters()
    optimizer = make(params)
    foreign = torch.optim.AdamW(params)
    advance(params, foreign, range(1))
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    wrong = SGDP(params, 0.1) if isinstance(optimizer, AdamP) else AdamP(params)
    advance(params, wrong, range(1))
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(wrong.state_dict())


def test_copies_work(make):
    params = parameters()
    optimizer = make(params)
    advance(params, optimizer, range(2))
    twins, twin = copy.deepcopy((params, optimizer))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            advance(params, optimizer, range(2, 5)), advance(twins, twin, range(2, 5)), strict=True
        )
    )


# -- schedules, scaling, closures, input -----------------------------------------------------


def test_schedulers_and_closures(make):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=40, cycle_momentum=False
    )
    x = torch.randn(32, 4)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(40):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.5 * losses[0]


def test_grad_scaler_leaves_out_overflowing_steps(make):
    model = nn.Linear(4, 3)
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if bad:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) is bad


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (AdamP, {"lr": -1.0}, "lr"),
        (AdamP, {"betas": (1.0, 0.9)}, "betas"),
        (AdamP, {"betas": 0.9}, "betas"),
        (AdamP, {"eps": math.nan}, "eps"),
        (AdamP, {"delta": -0.1}, "delta"),
        (AdamP, {"wd_ratio": -1.0}, "wd_ratio"),
        (AdamP, {"nesterov": "yes"}, "nesterov"),
        (AdamP, {"channel_dim": 2}, "channel_dim"),
        (AdamP, {"nonfinite": "hope"}, "nonfinite"),
        (SGDP, {"lr": 0.1, "momentum": 1.0}, "momentum"),
        (SGDP, {"lr": 0.1, "nesterov": True}, "momentum"),
        (SGDP, {"lr": 0.1, "weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_invalid_arguments_raise(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind([nn.Parameter(torch.ones(3, 3))], **options)


def test_sgdp_needs_a_rate():
    with pytest.raises(TypeError, match="lr"):
        SGDP([nn.Parameter(torch.ones(3, 3))])


def test_sparse_and_complex_are_refused(make):
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = make(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    with pytest.raises(InputError, match="complex"):
        make([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def test_a_parameter_in_two_groups_is_refused(make):
    W = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="more than one"):
        make([{"params": [W]}, {"params": [W]}])


def test_state_bytes(make):
    W = nn.Parameter(torch.ones(30, 20))
    optimizer = make([W])
    W.grad = torch.ones_like(W)
    optimizer.step()
    moments = 2 if isinstance(optimizer, AdamP) else 1
    assert state_bytes(optimizer) == moments * 4 * 600 + 8
