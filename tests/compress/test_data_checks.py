"""Calibration data that says nothing of a layer, or little."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fullrank.compress import (
    CalibrationStats,
    Fixed,
    LoRDConfig,
    LowRankLinear,
    PlanFamily,
    factorisable,
    factorize,
    lord_compress,
    make_plan,
)
from fullrank.core.errors import InputError

DATA = [torch.randn(400, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def net(dead=1):
    """Layers side by side, one of whose weights is zero."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    nn.init.zeros_(model[dead].weight)
    return Sum(model)


class Sum(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def by_outputs(model):
    return make_plan(model, Fixed(4)).map(lambda _, entry: replace(entry, method="output_pca"))


def kinds(model):
    return [type(layer) for layer in model.layers]


HALF = [LowRankLinear, nn.Linear, LowRankLinear]


def test_a_dead_layer_stays_dense_and_is_named():
    for sequential in (False, True):
        config = LoRDConfig(ranks={"*": 4}, sequential=sequential)
        with pytest.warns(UserWarning, match=r"1 layers stay dense, e\.g\. layers\.1: what flows"):
            small, _ = lord_compress(net(), DATA, config, progress=False)
        assert kinds(small) == HALF
        model = net()
        with pytest.warns(UserWarning, match=r"layers\.1: what flows"):
            factorize(model, by_outputs(model), DATA, sequential=sequential, progress=False)
        assert kinds(model) == HALF
    model = net()
    stats = CalibrationStats(factorisable(model)).observe(model, DATA, progress=False)
    with pytest.warns(UserWarning, match="stay dense"):
        plan = make_plan(model, Fixed(4), stats=stats)
    assert "never varies" in plan["layers.1"].reason


@pytest.mark.parametrize("method", ["output_pca", "gauss_newton"])
def test_families_leave_dead_layers_dense(method):
    model = nn.Sequential(nn.Linear(16, 16), net())
    stats = CalibrationStats(factorisable(model), gradients=True)
    stats.observe(model, DATA, progress=False)
    with pytest.warns(UserWarning, match="stay dense"):
        family = PlanFamily(model, stats, method=method, grid=1)
    small = family.build(family.plan(0.5))
    assert kinds(small[1]) == HALF
    assert small(DATA[0]).isfinite().all()


def test_a_layer_that_nothing_reacts_to_stays_dense():
    model = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 16)])
    nn.init.zeros_(model[0][1].weight)
    model = Sum(model)
    stats = CalibrationStats(factorisable(model), gradients=True)
    stats.observe(model, DATA, progress=False)
    with pytest.warns(UserWarning, match=r"2 layers .* does not react"):
        family = PlanFamily(model, stats, grid=1)
    assert list(family.plan(0.5)) == ["layers.1"]


def test_where_nothing_varies_anywhere_the_layer_is_named():
    constant = [torch.ones(400, 16)]
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = by_outputs(model)
    for sequential in (False, True):
        with pytest.raises(InputError, match=r"layers\.0: what flows"):
            factorize(model, plan, constant, sequential=sequential, progress=False)
    with pytest.raises(InputError, match=r"layers\.0: what flows"):
        lord_compress(model, constant, LoRDConfig(budget=0.5), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_on_the_way_leaves_the_whole_model_dense(monkeypatch):
    from fullrank.compress import factorization

    model, built = net(), []

    def build(*arguments):
        if built:
            raise InputError("no more")
        built.append(plain(*arguments))
        return built[0]

    plain = factorization.build_layer
    monkeypatch.setattr(factorization, "build_layer", build)
    with pytest.raises(InputError, match=r"layers\.2: no more"):
        factorize(model, by_outputs(model), DATA, sequential=True, progress=False)
    assert kinds(model) == [nn.Linear] * 3


def test_few_samples_are_said_whatever_the_way():
    few = [torch.randn(20, 16)]

    def family():
        model = nn.Sequential(nn.Linear(16, 16))
        stats = CalibrationStats(factorisable(model)).observe(model, few, progress=False)
        PlanFamily(model, stats, method="output_pca")

    def lord(sequential):
        config = LoRDConfig(ranks={"*": 4}, sequential=sequential)
        lord_compress(nn.Sequential(nn.Linear(16, 16)), few, config, progress=False)

    for way in (family, lambda: lord(False), lambda: lord(True)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            way()
        assert ["20 for 16 dimensions" in str(w.message) for w in seen] == [True]


def test_few_samples_of_a_layer_without_use_are_not_said():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pooler = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.body(x)
            self.pooler(h[:2])
            return h

    model = Pooled()
    stats = CalibrationStats(factorisable(model), gradients=True)
    stats.observe(model, [torch.randn(200, 16)], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlanFamily(model, stats, method="output_pca")
