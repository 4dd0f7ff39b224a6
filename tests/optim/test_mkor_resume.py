"""MKOR and MKOR-H: stopping anywhere and continuing is bit-equal; the switch; foreign states."""

import copy
import functools

import pytest
import torch
from stepping import through_a_file
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import mkor_factors, state_bytes
from fullrank.optim.adamp import SGDP
from fullrank.optim.mkor import MKOR
from fullrank.optim.mkor_hybrid import MKORH, KneePoint

INNER = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "sgdp": functools.partial(SGDP, lr=0.05, momentum=0.9),
}
CASES = {
    "matrix": {},
    "columns": {},
    "ema": {"rule": "ema", "threshold": 1.2},
    "half": {"factor_dtype": torch.bfloat16},
    "half-columns": {"factor_dtype": torch.float16},
}


def build(inner, kind=MKOR, dtype=torch.float32, **options):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False)).to(dtype)
    return model, kind(model, INNER[inner], inv_freq=3, **options)


def advance(model, optimizer, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 12, generator=generator).to(model[0].weight.dtype)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :6]).square().mean()
        loss.backward()
        if isinstance(optimizer, MKORH):
            optimizer.step(loss=loss)
        else:
            optimizer.step()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("case", CASES)
def test_continuing_is_bit_equal_at_every_step(case, inner, dtype, monkeypatch):
    if "columns" in case:
        monkeypatch.setattr(mkor_factors, "_SMALL", 1)
    whole, optimizer = build(inner, dtype=dtype, **CASES[case])
    advance(whole, optimizer, range(8))
    every = inner == "sgd" and dtype == torch.float32
    for stop in range(8) if every else (3, 5):  # at a refresh, between two
        first, before = build(inner, dtype=dtype, **CASES[case])
        advance(first, before, range(stop))
        second, after = build(inner, dtype=dtype, **CASES[case])
        second.load_state_dict(through_a_file(first.state_dict()))
        after.load_state_dict(through_a_file(before.state_dict()))
        advance(second, after, range(stop, 8))
        assert equal(whole, second), stop
        for layer, twin in zip(optimizer.layers, after.layers, strict=True):
            assert layer.state.keys() == twin.state.keys()
            for key, value in layer.state.items():
                assert value.dtype == twin.state[key].dtype
                assert torch.equal(value, twin.state[key])


def test_columns_overwritten_in_turn_resume(monkeypatch):
    monkeypatch.setattr(mkor_factors, "_SMALL", 1)
    options = {"blend": 0.01}  # so few columns count that they are overwritten at once
    whole, optimizer = build("sgd", **options)
    optimizer.inv_freq = 1
    advance(whole, optimizer, range(16))
    first, before = build("sgd", **options)
    before.inv_freq = 1
    advance(first, before, range(9))
    assert isinstance(before.layers[0].left.form, mkor_factors.Columns)
    assert before.layers[0].left.form.next != before.layers[0].left.form.count
    second, after = build("sgd", **options)
    after.inv_freq = 1
    second.load_state_dict(first.state_dict())
    after.load_state_dict(through_a_file(before.state_dict()))
    advance(second, after, range(9, 16))
    assert equal(whole, second)


def test_loading_copies_and_keeps_schedules_attached():
    model, optimizer = build("adamw")
    advance(model, optimizer, range(5))
    state = optimizer.state_dict()
    twin, other = build("adamw")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    saved = copy.deepcopy(state)
    advance(twin, other, range(5, 9))
    assert torch.equal(
        saved["mkor"]["layers"]["0"]["left_inverse"], state["mkor"]["layers"]["0"]["left_inverse"]
    )
    assert other.param_groups is other.inner.param_groups
    assert other.state is other.inner.state


def test_foreign_states_are_refused_and_change_nothing():
    model, optimizer = build("sgd")
    advance(model, optimizer, range(5))
    before = copy.deepcopy(optimizer.state_dict())

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(inner.state_dict())
    with pytest.raises(InputError, match="inner optimizer AdamW"):
        optimizer.load_state_dict(build("adamw")[1].state_dict())
    with pytest.raises(InputError, match="other layers"):
        optimizer.load_state_dict(build("sgd", exclude="2")[1].state_dict())
    wider = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 6, bias=False))
    foreign = MKOR(wider, INNER["sgd"], inv_freq=3)
    advance(wider, foreign, range(2))
    with pytest.raises(InputError, match="layer '0', left side"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(InputError, match="MKOR-H"):
        build("sgd", MKORH)[1].load_state_dict(optimizer.state_dict())

    after = optimizer.state_dict()
    assert after["mkor"]["steps"] == 5
    for name, layer in before["mkor"]["layers"].items():
        for key, value in layer.items():
            assert torch.equal(value, after["mkor"]["layers"][name][key])
    advance(model, optimizer, range(5, 7))


# -- MKOR-H ----------------------------------------------------------------------------------


def test_knee_point():
    knee = KneePoint(beta=0.1, patience=3)
    falling = [2.0**-t for t in range(4)]
    assert not any(knee.observe(loss) for loss in falling)
    assert not knee.observe(float("nan"))
    found = [knee.observe(falling[-1]) for _ in range(200)]
    first = found.index(True)
    # Afterwards the same by the formula.
    losses = falling + [falling[-1]] * (first + 1)
    rate, below = losses[0] - losses[1], 0
    for t in range(1, len(losses)):
        if t > 1:
            rate = 0.9 * rate + 0.1 * (losses[t - 1] - losses[t])
        below = below + 1 if rate < 0.1 * (losses[0] - losses[t]) / t else 0
        assert (below >= 3) is (t == len(losses) - 1)


def test_a_steady_fall_never_switches():
    knee = KneePoint(patience=1)
    assert not any(knee.observe(100.0 - t) for t in range(100))


def test_after_the_switch_only_the_inner_optimizer_is_left():
    model, optimizer = build("sgd", MKORH)
    plain, second_order = build("sgd")
    advance(model, optimizer, range(5))
    advance(plain, second_order, range(5))
    assert equal(model, plain)
    assert optimizer.factor_bytes() > 0
    assert state_bytes(optimizer) == state_bytes(optimizer.inner) + optimizer.factor_bytes()
    optimizer.switch()
    assert optimizer.switched_at == 5
    assert optimizer.factor_bytes() == 0
    assert not any(m._forward_hooks for m in model.modules())
    advance(model, optimizer, range(5, 9))
    advance(plain, second_order.inner, range(5, 9))
    assert equal(model, plain)


def test_the_switch_comes_once_and_resumes():
    whole, optimizer = build("sgd", MKORH, patience=2, switch_beta=5.0)
    advance(whole, optimizer, range(12))
    at = optimizer.switched_at
    assert at is not None
    assert 2 <= at < 12
    for stop in (at - 1, at, at + 2):
        first, before = build("sgd", MKORH, patience=2, switch_beta=5.0)
        advance(first, before, range(stop))
        second, after = build("sgd", MKORH, patience=2, switch_beta=5.0)
        second.load_state_dict(first.state_dict())
        after.load_state_dict(through_a_file(before.state_dict()))
        advance(second, after, range(stop, 12))
        assert after.switched_at == at
        assert equal(whole, second)


def test_back_to_second_order_starts_from_the_identity():
    model, optimizer = build("sgd", MKORH)
    advance(model, optimizer, range(5))
    optimizer.switch()
    optimizer.switch(second_order=True)
    assert torch.equal(optimizer.factors("0")[0], torch.eye(20))
    advance(model, optimizer, range(5, 12))
    assert optimizer.switched_at is None
    assert not torch.equal(optimizer.factors("0")[0], torch.eye(20))


def test_closures_are_observed_and_losses_not_twice():
    model, optimizer = build("sgd", MKORH)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 12)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.knee.count == 1
    with pytest.raises(InputError, match="closure"):
        optimizer.step(closure, loss=1.0)
    with pytest.raises(InputError, match="patience"):
        build("sgd", MKORH, patience=0)
    with pytest.raises(InputError, match="switch_beta"):
        build("sgd", MKORH, switch_beta=-1.0)
