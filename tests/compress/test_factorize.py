"""Plans, factorisation, the layer, and rank rules."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullrank.compress import (
    Budget,
    CalibrationStats,
    Energy,
    Fixed,
    FractionOfBreakEven,
    LowRankLinear,
    ParamRatio,
    PerKind,
    RankPlan,
    Value,
    allocate,
    factorize,
    layer_spectra,
    load,
    make_plan,
    report,
    save,
)
from fullrank.compress.allocation import loss_curve
from fullrank.core.errors import InputError, PlanError, StoreError
from fullrank.core.plan import PlanEntry, break_even


def mlp(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32, bias=bias), nn.ReLU(), nn.Linear(32, 20, bias=bias)).to(
        dtype
    )


def data(n=400, width=20, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n // 4, width, generator=g).to(dtype) + 0.5 for _ in range(4)]


# -- the layer ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    draw=st.data(),
)
def test_layer_is_the_merged_layer(m, n, bias, dtype, draw):
    r = draw.draw(st.integers(1, min(m, n)))
    layer = LowRankLinear(n, m, r, bias, dtype=dtype)
    x = torch.randn(2, n, 3, dtype=torch.float64).to(dtype).transpose(1, 2)  # not contiguous
    dense = layer.to_dense()
    assert (dense.bias is not None) == bias
    assert layer.weight.shape == dense.weight.shape == (m, n)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x), dense(x), rtol=tolerance, atol=tolerance)
    kept = draw.draw(st.integers(1, r))
    wanted = layer.second[:, :kept] @ layer.first[:kept]
    layer.first.requires_grad_(False)
    layer.truncate(kept)
    assert layer.rank == kept
    assert not layer.first.requires_grad
    assert layer.second.requires_grad
    torch.testing.assert_close(layer.merged_weight(), wanted)


def test_fresh_product_has_the_variance_of_a_dense_layer():
    torch.manual_seed(0)
    found = LowRankLinear(300, 200, 64).merged_weight().var().item()
    assert found == pytest.approx(nn.Linear(300, 200).weight.var().item(), rel=0.05)


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_layer_refuses_an_impossible_rank(rank):
    with pytest.raises(InputError, match=r"must lie in \[1, 8\]"):
        LowRankLinear(8, 16, rank)
    with pytest.raises(InputError, match="cannot truncate"):
        LowRankLinear(8, 16, 4).truncate(rank)


# -- rules and budgets -------------------------------------------------------------------------


def test_rules():
    s = np.array([4.0, 2.0, 1.0, 0.5])
    assert Fixed(3)(s, 4, 9) == 3
    assert Fixed(5)(s, 4, 9) is None
    assert FractionOfBreakEven(0.5)(s, 768, 768) == 192
    assert FractionOfBreakEven(0.01)(s, 8, 8) is None
    assert ParamRatio(1.5)(s, 768, 768) == 256
    assert ParamRatio(100)(s, 8, 8) is None
    assert [Energy(t)(s, 4, 9) for t in (0.7, 0.95, 1.0)] == [1, 3, 4]
    assert Energy(0.5)(np.zeros(3), 3, 3) is None
    assert Value(1.0)(s, 4, 9) == 3
    assert Value(9.0)(s, 4, 9) is None
    for bad in (
        lambda: Fixed(0),
        lambda: FractionOfBreakEven(0),
        lambda: ParamRatio(0.5),
        lambda: Energy(1.1),
        lambda: Value(-1),
    ):
        with pytest.raises(InputError):
            bad()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 80), st.integers(2, 80)), min_size=1, max_size=5),
    keeps=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
    seed=st.integers(0, 999),
)
def test_budgets_are_kept_and_nested(shapes, keeps, seed):
    rng = np.random.default_rng(seed)
    curves = {
        str(i): loss_curve(np.sort(rng.exponential(size=min(s)))[::-1], s)
        for i, s in enumerate(shapes)
    }
    dense = sum(m * n for m, n in shapes)
    ranks = {}
    for keep in sorted(keeps):
        try:
            ranks = allocate(curves, keep)
        except InputError:
            assert sum(c.steps[0].size for c in curves.values()) > keep * dense
            return
        sizes = [
            m * n if r is None else r * (m + n)
            for (m, n), r in zip(shapes, ranks.values(), strict=True)
        ]
        assert sum(sizes) <= keep * dense
        assert all(
            r is None or r <= break_even(*s) for r, s in zip(ranks.values(), shapes, strict=True)
        )
    small = allocate(curves, min(keeps))
    for name, rank in allocate(curves, max(keeps)).items():
        assert rank is None or (small[name] is not None and small[name] <= rank)


def test_budget_is_spent_where_it_does_the_most():
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.exponential(size=16))[::-1] * s for s in (1, 5, 0.2)]
    curves = {str(i): loss_curve(x, (16, 16), grid=1) for i, x in enumerate(losses)}
    found = allocate(curves, 0.5)

    def loss(ranks):
        return sum(x[r:].sum() if r is not None else 0 for x, r in zip(losses, ranks, strict=True))

    budget = sum(256 if r is None else 32 * r for r in found.values())
    options = [*range(1, 8), None]
    best = min(
        loss((a, b, c))
        for a in options
        for b in options
        for c in options
        if sum(256 if r is None else 32 * r for r in (a, b, c)) <= budget
    )
    assert loss(found.values()) == pytest.approx(best)


# -- plans ----------------------------------------------------------------------------------


def test_plan_by_rule_pattern_and_statistics():
    model = mlp()
    stats = CalibrationStats({"0": model[0], "2": model[2]}).observe(model, data(), progress=False)
    by_weight = make_plan(model, FractionOfBreakEven(0.5))
    assert {n: e.rank for n, e in by_weight.items()} == {"0": 6, "2": 6}
    assert by_weight.source == "weight"
    by_output = make_plan(model, Energy(0.9), include="0", stats=stats)
    assert list(by_output) == ["0"]
    assert (by_output.source, by_output["0"].method) == ("activation", "output_pca")
    per_kind = make_plan(model, PerKind({"0": 3}))
    assert (per_kind["0"].rank, per_kind["2"].rank) == (3, None)
    too_much = make_plan(model, Fixed(19))
    assert too_much["0"].rank is None
    assert "saves nothing" in too_much["0"].reason
    spectra = layer_spectra(model)
    assert make_plan(model, Energy(0.9), spectra=spectra) == make_plan(model, Energy(0.9))
    assert make_plan(model, Budget(0.5)).savings().kept <= 0.5
    with pytest.raises(InputError, match="named like"):
        make_plan(model, Fixed(2), include="encoder.*")
    with pytest.raises(InputError, match="named like"):
        make_plan(model, PerKind({"query": 2}))
    with pytest.raises(InputError, match=r"must lie in \[1, 20\]"):
        make_plan(model, lambda s, m, n: 21)
    with pytest.raises(InputError, match="no linear layer"):
        make_plan(nn.Sequential(nn.ReLU()), Fixed(2))


# -- factorize ----------------------------------------------------------------------------------


def plan_for(model, rank, method="svd"):
    return make_plan(model, Fixed(rank), method=method, spectra=layer_spectra(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_pca_has_the_least_error_and_gains_a_bias(dtype, bias):
    model = mlp(bias, dtype)
    model[0].weight.requires_grad_(False)
    original, batches = copy.deepcopy(model), data(dtype=dtype)
    plan = plan_for(model, 4, "output_pca")
    assert factorize(model, plan, batches, progress=False) is model
    assert isinstance(model[0], LowRankLinear)
    assert model[0].bias is not None
    assert model[0].first.dtype == dtype
    assert not model[0].first.requires_grad
    assert model[2].first.requires_grad
    svd = factorize(copy.deepcopy(original), plan_for(original, 4))
    assert (svd[0].bias is None) == (not bias)
    x = torch.cat(batches)
    y = original[0](x)
    error = (model[0](x) - y).double().square().sum()
    assert error < (svd[0](x) - y).double().square().sum()
    relative = error / (y.double() - y.double().mean(0)).square().sum()
    assert float(relative) == pytest.approx(
        model[0].error, rel=0.05 if dtype != torch.float64 else 1e-6
    )


def test_nothing_changes_when_something_is_wrong():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(20, 33))
    pca = plan_for(model, 4, "output_pca")
    with pytest.raises(PlanError, match="fingerprint"):
        factorize(other, pca, data())
    with pytest.raises(PlanError, match="no module 'fc'"):
        factorize(model, RankPlan({"fc": PlanEntry((4, 4), 1)}))
    with pytest.raises(PlanError, match="the plan is for"):
        factorize(model, RankPlan({"0": PlanEntry((20, 32), 2)}))
    with pytest.raises(PlanError, match="ranks are for 'optimizer'"):
        factorize(model, RankPlan({"0": PlanEntry((32, 20), 2)}, purpose="optimizer"))
    with pytest.raises(InputError, match="need calibration data"):
        factorize(model, pca)
    with pytest.raises(InputError, match="empty"):
        factorize(model, pca, [])
    with pytest.raises(InputError, match="NaN"):
        factorize(model, pca, [torch.full((9, 20), float("nan"))])
    with pytest.raises(InputError, match="never varies"):
        factorize(model, pca, [torch.ones(500, 20)])
    with pytest.raises(InputError, match="know nothing of '0'"):
        factorize(model, pca, CalibrationStats({}))
    model[2].weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"2: .*NaN"):
        factorize(model, pca, data())
    model[2].weight.data.copy_(before["2.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    factorize(model, plan_for(model, 4))
    with pytest.raises(PlanError, match="factorised already"):
        factorize(model, RankPlan({"0": PlanEntry((32, 20), 2)}))


def test_few_samples_are_warned_of():
    model = mlp()
    with pytest.warns(UserWarning, match="2 layers saw few calibration samples"):
        factorize(model, plan_for(model, 4, "output_pca"), data(40), progress=False)


def test_a_layer_never_grows():
    model = mlp()
    plan = RankPlan({"0": PlanEntry((32, 20), 20), "2": PlanEntry((20, 32), 2)})
    factorize(model, plan)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[2], LowRankLinear)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.a = self.b = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.embed(x))))


def test_tied_modules_stay_tied_and_tied_weights_stay_dense(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    plan = make_plan(model, Fixed(3))
    assert list(plan) == ["a"]
    factorize(model, plan)
    assert model.a is model.b
    assert isinstance(model.a, LowRankLinear)
    assert model.head.weight is model.embed.weight
    assert len(report(model).rows) == 1
    ids = torch.arange(30)
    again = load(save(model, tmp_path / "tied"), into=Tied())
    assert again.a is again.b
    assert torch.equal(again(ids), model(ids))


def test_layers_that_share_a_bias_stay_dense():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    model[1].bias = model[0].bias
    assert list(make_plan(model, Fixed(3))) == ["2"]
    factorize(model, RankPlan({str(i): PlanEntry((16, 16), 3) for i in range(3)}))
    assert [type(layer).__name__ for layer in model] == ["Linear", "Linear", "LowRankLinear"]
    assert model[0].bias is model[1].bias


class Viewed(Tied):
    """Buffers that are parts of one another."""

    def __init__(self):
        super().__init__()
        whole = torch.arange(6.0)
        for name, part in (("part", whole[2:]), ("whole", whole), ("other", whole[:3])):
            self.register_buffer(name, part)


def test_tied_and_overlapping_tensors_load_also_onto_the_meta_device(tmp_path):
    torch.manual_seed(0)
    model = Viewed().requires_grad_(False)
    path = save(factorize(model, make_plan(model, Fixed(3))), tmp_path / "plain")
    ids = torch.arange(30)
    for device in ("cpu", "meta"):
        with torch.device(device):
            into = Viewed().double()
        again = load(path, into=into)
        assert again.a is again.b
        assert again.head.weight is again.embed.weight
        assert again.head.weight.dtype == torch.float64
        assert again.head.weight.requires_grad
        torch.testing.assert_close(again(ids).float(), model(ids))
        assert [again.part.tolist(), again.other.tolist()] == [[2, 3, 4, 5], [0, 1, 2]]


def test_numbers_that_no_one_has_are_named(tmp_path):
    path = save(factorize(mlp(), plan_for(mlp(), 4)), tmp_path / "plain")
    with torch.device("meta"):
        into = mlp()
        into[1].register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(StoreError, match=r"no numbers for 1\.table"):
        load(path, into=into)


def test_shapes_only_then_load(tmp_path):
    model = mlp()
    plan = plan_for(model, 4)
    shells = factorize(mlp(), plan, init=False)
    full = factorize(model, plan)
    shells.load_state_dict(full.state_dict())
    x = data()[0]
    assert torch.equal(shells(x), full(x))
    path = save(full, tmp_path / "plain")
    assert torch.equal(load(path, into=mlp())(x), full(x))
    with pytest.raises(InputError, match="into="):
        load(path)
    with pytest.raises(StoreError, match="has not"):
        load(path, into=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(StoreError, match="exists already"):
        save(full, path)
    with pytest.raises(StoreError, match="holds no model"):
        load(tmp_path)
    (path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(StoreError, match="cannot be read"):
        load(path, into=mlp())


def test_sequential_sees_the_replaced_layers():
    model = mlp(dtype=torch.float64)
    batches = data(dtype=torch.float64)
    plan = plan_for(model, 2, "output_pca")
    one_pass = factorize(copy.deepcopy(model), plan, batches, progress=False)
    in_turn = factorize(copy.deepcopy(model), plan, batches, sequential=True, progress=False)
    assert torch.equal(one_pass[0].first, in_turn[0].first)
    assert not torch.allclose(one_pass[2].merged_weight(), in_turn[2].merged_weight())
    stats = CalibrationStats({"0": model[0], "2": model[2]})
    with pytest.raises(InputError, match="needs data"):
        factorize(model, plan, stats, sequential=True)


def test_special_linears_are_left_alone():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(InputError, match="no linear layer"):
        make_plan(attention, Fixed(2))
