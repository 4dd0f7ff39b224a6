"""Layers whose factors are slower than the layer itself are left alone, as measured."""

import copy
import random

import pytest
import torch
from torch import nn

from fullrank.compress import (
    CalibrationStats,
    Fixed,
    LowRankLinear,
    PlanFamily,
    RankPlan,
    factorize,
    faster_only,
    make_plan,
    measured_speed,
)
from fullrank.compress.layers_conv import LowRankConv
from fullrank.core.errors import InputError, PlanError


@pytest.fixture
def clock(monkeypatch):
    """A machine on which layers of fewer than 200 numbers are slower once factorised."""
    calls = []

    def seconds(layer, x, count):
        calls.append((layer, tuple(x.shape)))
        assert layer(x).shape[0] == x.shape[0]
        small = layer.weight.numel() < 200
        return 1.0 + (1 if small else -1) * 0.5 * isinstance(layer, LowRankLinear | LowRankConv)

    monkeypatch.setattr(measured_speed, "_clock", seconds)
    monkeypatch.setattr(measured_speed, "_measured", {})
    return calls


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3),
        nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.Linear(12, 12),
    )


def example(n=4):
    return torch.randn(n, 2, 6, 6)


def test_slower_layers_stay_dense_and_say_so(clock):
    model = net().train()
    plan = make_plan(model, Fixed(2))
    found = faster_only(model, plan, example())
    assert {n: e.rank for n, e in found.items()} == {"0": 2, "1": None, "4": 2, "5": None}
    assert found["5"].reason.endswith("left dense, 1e+03 ms dense, 1.5e+03 ms at rank 2 on 4 x 12")
    assert found["4"].options["seconds"] == {"dense": 1.0, "factorised": 0.5, "input": [4, 32]}
    assert found["5"].options["seconds"] == {"dense": 1.0, "factorised": 1.5, "input": [4, 12]}
    assert RankPlan.from_json(found.to_json()) == found
    assert found["1"].scheme == "channel"
    assert model.training
    assert found.fingerprint == plan.fingerprint
    assert type(model[0]) is nn.Conv2d


def test_a_size_is_timed_once(clock):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = make_plan(model, Fixed(3))
    faster_only(model, plan, torch.randn(5, 16))
    once = len(clock)
    assert len({id(layer) for layer, _ in clock}) == 2
    faster_only(copy.deepcopy(model), plan, torch.randn(5, 16))
    assert len(clock) == once
    faster_only(model, plan, torch.randn(6, 16))
    assert len(clock) == 2 * once


def test_a_busy_machine_decides_nothing(monkeypatch):
    """Time that other work adds, to most rounds of the factors even, and a hair's difference."""
    draw = random.Random(0)

    def seconds(layer, x, count):
        low_rank = isinstance(layer, LowRankLinear)
        busy = draw.random() < (0.7 if low_rank else 0.2)
        return (1.02 if low_rank and x.shape[0] == 3 else 1.0 - 0.5 * low_rank) + 9 * busy

    monkeypatch.setattr(measured_speed, "_clock", seconds)
    monkeypatch.setattr(measured_speed, "_measured", {})
    model = nn.Sequential(nn.Linear(16, 16))
    plan = make_plan(model, Fixed(2))
    for rows in (2, 3):
        assert faster_only(model, plan, torch.randn(rows, 16))["0"].rank == 2


def test_factorize_and_families_leave_them_alone(clock):
    model = net()
    small = factorize(copy.deepcopy(model), make_plan(model, Fixed(2)), faster_on=example())
    assert type(small[5]) is nn.Linear
    assert isinstance(small[4], LowRankLinear)
    targets = {"4": model[4], "5": model[5]}
    stats = CalibrationStats(targets).observe(model, [example(400)], progress=False)
    options = {"method": "output_pca", "allocation": "uniform"}
    family = PlanFamily(model, stats, faster_on=example(), **options)
    plan = family.plan(0.6)
    assert plan["4"].rank is not None
    assert plan["5"].rank is None
    assert PlanFamily(model, stats, **options).plan(0.6)["5"].rank is not None


def test_layers_out_of_reach_keep_their_entries(clock):
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    plan = make_plan(model, Fixed(2))
    found = faster_only(model, plan, torch.randn(3, 8))
    assert (found["used"].rank, found["idle"].rank) == (None, 2)
    with pytest.raises(InputError, match="reaches none"):
        faster_only(model, make_plan(model, Fixed(2), include="idle"), torch.randn(3, 8))
    with pytest.raises(PlanError, match="fingerprint"):
        faster_only(net(), plan, example())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clock_of_this_machine(dtype):
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    entry = make_plan(model, Fixed(4))["0"]
    found = measured_speed.layer_timing(model[0], entry, torch.randn(2, 3, 64, dtype=dtype))
    assert found.dense > 0
    assert found.factorised > 0
