"""MKOR and gradients of every kind: bad, zero, scaled, in half precision; inner optimizers."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim.adamp import AdamP
from fullrank.optim.mkor import MKOR

SGD = functools.partial(torch.optim.SGD, lr=0.05)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 6), nn.Flatten(1), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5, bias=False)
    ).to(dtype)


def batch(t):
    return torch.randint(0, 7, (8, 2), generator=torch.Generator().manual_seed(t))


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids), ids[:, 0] % 5)


def train(model, optimizer, steps):
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        optimizer.step()


def unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device", [False, True])
def test_bad_steps_are_skipped(bad, fused, device, request):
    if device:
        request.getfixturevalue("on_device")
    model = net(dtype=torch.float32)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    optimizer = MKOR(model, inner, inv_freq=1)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(inner.state_dict()["state"])
    factors = [f.clone() for f in optimizer.factors("2")]
    optimizer.zero_grad()
    loss_of(model, batch(3)).backward()
    model[4].weight.grad[0, 0] = bad
    optimizer.step()
    unchanged(model, before)
    for i, saved in state.items():
        assert torch.equal(saved["exp_avg"], inner.state_dict()["state"][i]["exp_avg"])
    for one, other in zip(factors, optimizer.factors("2"), strict=True):
        torch.testing.assert_close(one, other)
    train(model, optimizer, range(4, 6))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.steps == 6


def test_statistics_that_are_not_finite_do_not_reach_the_factors():
    model = nn.Linear(3, 2)
    optimizer = MKOR(model, SGD, inv_freq=1, nonfinite="ignore")
    x = torch.randn(4, 3)
    for t in range(3):
        optimizer.zero_grad()
        model(x if t < 2 else x * math.nan).sum().backward()
        optimizer.step()
    assert all(torch.isfinite(factor).all() for factor in optimizer.factors(""))


def test_raise_names_the_parameter_and_changes_nothing():
    model = net()
    optimizer = MKOR(model, SGD, nonfinite="raise")
    loss_of(model, batch(0)).backward()
    model[2].bias.grad[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'2\.bias'"):
        optimizer.step()
    unchanged(model, before)


def test_parameters_that_are_not_the_models_have_a_name_too():
    model, other = net(), torch.nn.Embedding(4, 3, sparse=True)
    groups = [{"params": model.parameters()}, {"params": other.parameters()}]
    optimizer = MKOR(model, torch.optim.SGD(groups, lr=0.1))
    other(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"parameter 0 of group 1 .*sparse"):
        optimizer.step()


def test_zero_gradients_stay_zero():
    model = net()
    optimizer = MKOR(model, SGD, inv_freq=1)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    unchanged(model, before)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_weights_follow_float32(dtype, factor_dtype):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    full = copy.deepcopy(half).float()
    options = {"inv_freq": 1, "factor_dtype": factor_dtype}
    optimizers = [MKOR(m, SGD, **options) for m in (half, full)]
    for t in range(4):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        for model, optimizer in zip((half, full), optimizers, strict=True):
            optimizer.zero_grad()
            model(x.to(model[0].weight.dtype)).float().square().mean().backward()
            optimizer.step()
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert (a.float() - b).norm() < 0.03 * b.norm() + 1e-3


def test_grad_scaler_and_its_scale():
    plain, scaled = net(dtype=torch.float32), net(dtype=torch.float32)
    one = MKOR(plain, SGD, inv_freq=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    other = MKOR(scaled, SGD, inv_freq=1, grad_scale=scaler.get_scale)
    for t in range(4):
        train(plain, one, [t])
        if t == 2:  # an overflow in between: no step, no trace
            other.zero_grad()
            (scaler.scale(loss_of(scaled, batch(9))) * math.inf).backward()
            scaler.step(other)
            scaler.update()
        other.zero_grad()
        scaler.scale(loss_of(scaled, batch(t))).backward()
        scaler.unscale_(other)
        scaler.step(other)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=1e-4, atol=1e-6)


def test_autocast():
    model = net(dtype=torch.float32)
    optimizer = MKOR(model, SGD, inv_freq=1)
    for t in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(t))
        loss.backward()
        optimizer.step()
    assert optimizer.factors("2")[0].dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("inner", [None, SGD, torch.optim.AdamW, AdamP])
def test_inner_optimizers_schedules_and_closures(inner):
    model = net(dtype=torch.float32)
    optimizer = MKOR(model, inner, inv_freq=2)
    assert optimizer.param_groups is optimizer.inner.param_groups
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 10)
    rate = optimizer.param_groups[0]["lr"]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0]
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(rate / 2)
