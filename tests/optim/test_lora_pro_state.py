"""LoRAPro: dtypes, state and its bytes, resume, skips."""

import copy

import pytest
import torch
from lora_cases import FORMS, LoraLinear, Model, build, train
from stepping import through_a_file
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import memory_table, state_bytes
from fullrank.optim.lora_pro import LoRAPro


def test_half_precision_warns_and_follows_float32():
    with pytest.warns(UserWarning, match="keep the factors in float32"):
        half, optimizer = build("efficient", torch.bfloat16)
    full, other = build("efficient")
    full.load_state_dict(half.state_dict())
    train(half, optimizer, range(4))
    train(full, other, range(4))
    A = half.one.lora_A["default"].weight
    assert A.dtype == torch.bfloat16
    assert optimizer.state[A]["exp_avg"].dtype == torch.float32
    assert (A - full.one.lora_A["default"].weight).norm() < 0.1 * A.norm()


def test_bf16_moments_stay_close():
    narrow, optimizer = build("bf16 moments")
    wide, other = build("full")
    train(narrow, optimizer, range(5))
    train(wide, other, range(5))
    A = narrow.one.lora_A["default"].weight
    assert optimizer.state[A]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[A]["exp_avg"].any()
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert (a - b).norm() < 0.05 * b.norm() + 1e-3


def test_state_bytes_follow_the_formula():
    scalars = 8
    for form, per_pair in (
        ("full", lambda m, n, r: 2 * m * n * 4),
        ("bf16 moments", lambda m, n, r: 2 * m * n * 2),
        ("efficient", lambda m, n, r: 2 * r * (m + n) * 4),
        ("sgd", lambda m, n, r: 0),
    ):
        model, optimizer = build(form)
        others = list(model.norm.parameters())
        moments = {"sgd": 0, "bf16 moments": 4}.get(form, 8)
        expected = sum(moments * p.numel() + scalars for p in others)
        expected += sum(per_pair(*p.shape) + 2 * scalars for p in optimizer.pairs)
        table = memory_table(optimizer)
        assert dict(zip(table.columns, table.rows[-1], strict=True))["optimizer state"] == expected
        train(model, optimizer, range(1))
        assert state_bytes(optimizer) == expected


def test_large_moments_are_announced():
    with torch.device("meta"):
        A, B = nn.Parameter(torch.zeros(2, 20_000)), nn.Parameter(torch.zeros(20_000, 2))
    with pytest.warns(UserWarning, match=r"will take 2\.98 GiB"):
        LoRAPro([(A, B, 1.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_continuing_is_bit_equal_at_every_step(form, dtype):
    whole, optimizer = build(form, dtype, weight_decay=0.01)
    train(whole, optimizer, range(6), nan_at=3)
    for stop in range(6):
        first, one = build(form, dtype, weight_decay=0.01)
        train(first, one, range(stop), nan_at=3)
        second, two = build(form, dtype, weight_decay=0.01)
        second.load_state_dict(through_a_file(first.state_dict()))
        two.load_state_dict(through_a_file(one.state_dict()))
        train(second, two, range(stop, 6), nan_at=3)
        for a, b in zip(whole.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), stop
            for name, value in optimizer.state.get(a, {}).items():
                assert value.dtype == two.state[b][name].dtype
                assert torch.equal(value, two.state[b][name])


def test_copies_of_model_and_optimizer_work():
    model, optimizer = build()
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_others_are_refused():
    model, optimizer = build()
    train(model, optimizer, range(2))
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    foreign = torch.optim.AdamW(groups, lr=0.1)
    foreign.step()
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    wider = Model()
    wider.two = LoraLinear(7, 12, 5)
    with pytest.raises(InputError, match="shape"):
        LoRAPro(wider, mode="efficient").load_state_dict(build_and_train_efficient())
    train(model, optimizer, range(2, 3))


def build_and_train_efficient():
    model, optimizer = build("efficient")
    train(model, optimizer, range(1))
    return optimizer.state_dict()


def test_the_saved_mode_wins_as_for_every_group_key():
    model, optimizer = build("efficient")
    train(model, optimizer, range(2))
    twin, other = build("full")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["mode"] == "efficient"
    train(twin, other, range(1))


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_leaves_everything_as_it_was(form, on_device_or_not):
    model, optimizer = build(form, weight_decay=0.1)
    train(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    train(model, optimizer, [2], nan_at=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if name not in ("step", "unseen"):
                assert torch.equal(value, before[1][i][name])
        assert (state["step"], state["unseen"]) == (3, 1)
    train(model, optimizer, range(3, 5))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_the_device_path_takes_the_same_steps(form, monkeypatch):
    from fullrank.optim import foundation, gradients

    host, optimizer = build(form, torch.float64, weight_decay=0.1)
    train(host, optimizer, range(5), nan_at=2)
    for module in (foundation, gradients):
        monkeypatch.setattr(module, "host_decides", lambda device: False)
    device, other = build(form, torch.float64, weight_decay=0.1)
    train(device, other, range(5), nan_at=2)
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-14 if form == "sgd" else 1e-7)


def test_a_nan_raises_on_request_and_names_the_parameter():
    model, optimizer = build(nonfinite="raise")
    train(model, optimizer, range(1))
    with pytest.raises(InputError, match=r"one\.lora_B"):
        train(model, optimizer, [1], nan_at=1)
