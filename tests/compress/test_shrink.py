"""The search for the smallest plan that holds a floor, recovery, and what is said on failure."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import (
    CalibrationStats,
    Distillation,
    FloorError,
    FractionOfBreakEven,
    ParamRatio,
    PlanFamily,
    SearchRecord,
    factorize,
    make_plan,
    shrink,
)
from fullrank.compress.planning_share import family_for
from fullrank.core.errors import InputError, StoreError


def model_and_data(seed=0):
    """Weights of falling spectra, so that there is something to shrink."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Linear(32, 8))
    with torch.no_grad():
        for layer in (model[0], model[2], model[3]):
            U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U @ torch.diag(S * 0.75 ** torch.arange(len(S))) @ V)
    return model, [torch.randn(100, 32) for _ in range(8)]


@pytest.fixture
def setup():
    model, data = model_and_data()
    x = torch.cat(data)[:200]
    with torch.no_grad():
        wanted = model(x)

    def metric(candidate):
        with torch.no_grad():
            error = (candidate(x) - wanted).square().sum(1) / wanted.square().sum(1).mean()
        return (1 / (1 + error)).numpy()

    return model, data, metric


@pytest.fixture(autouse=True)
def simple_floor_test(monkeypatch):
    """The search is tested here, the bootstrap where it lives: a normal interval will do."""

    def floor_test(candidate, reference, floor, *, clusters=None, confidence=0.95):
        ratio = candidate.mean() / reference.mean()
        spread = (candidate - ratio * reference).std() / len(candidate) ** 0.5
        lower = ratio - 1.645 * spread / reference.mean()
        return SimpleNamespace(ratio=ratio, lower=lower, holds=bool(lower >= floor))

    monkeypatch.setattr("fullrank.evaluate.floor_test", floor_test, raising=False)


def test_the_chosen_plan_is_the_smallest_that_holds(setup):
    model, data, metric = setup
    before = copy.deepcopy(model.state_dict())
    found = shrink(model, metric, 0.95, calibration=data, recover=False, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.floor_test.holds
    holding = [c for c in found.curve if c.holds]
    assert found.plan == min(holding, key=lambda c: c.kept).plan
    assert found.plan.savings().kept < 0.7
    assert metric(found.model).mean() == pytest.approx(holding[0].value)
    assert [c.kept for c in found.curve] == sorted(c.kept for c in found.curve)
    first = found.curve[0]
    assert first.parameters == first.linear_parameters + 64 + 32 + 8
    assert len(found.table().rows) == len(found.curve)


def test_candidates_are_all_measured_and_nested(setup):
    model, data, metric = setup
    shares = (0.8, 0.5, 0.6)
    found = shrink(
        model, metric, 0.5, calibration=data, candidates=shares, recover=False, progress=False
    )
    assert len(found.curve) == 3
    small, middle, large = (c.plan for c in found.curve)
    for a, b in ((small, middle), (middle, large)):
        for name in a:
            assert b[name].rank is None or a[name].rank <= b[name].rank
    values = [c.value for c in found.curve]
    assert values == sorted(values)


def test_sensitivity_beats_uniform_and_gauss_newton_beats_output_pca(setup):
    model, data, metric = setup
    layers = {n: m for n, m in model.named_children() if isinstance(m, nn.Linear)}
    stats = CalibrationStats(layers, gradients=True).observe(model, data, progress=False)

    def value(keep, **how):
        family = PlanFamily(model, stats, **how)
        return metric(family.build(family.plan(keep))).mean()

    for keep in (0.6, 0.4):
        uniform = value(keep, method="output_pca", allocation="uniform")
        assert value(keep) > uniform
        assert value(keep, allocation="uniform") >= uniform - 1e-3


def test_recovery_helps_and_is_dropped_when_it_does_not(setup):
    model, data, metric = setup
    layers = {n: m for n, m in model.named_children() if isinstance(m, nn.Linear)}
    stats = CalibrationStats(layers, gradients=True).observe(model, data, progress=False)
    family = PlanFamily(model, stats)
    plan = family.plan(0.3)
    student = family.build(plan)
    one_shot = metric(student).mean()
    recover = Distillation(model, data, steps=100, lr=3e-3)
    recover(student)
    assert recover.after < recover.before
    assert metric(student).mean() > one_shot
    assert all(p.grad is None for p in (*student.parameters(), *model.parameters()))
    again = family.build(plan)
    Distillation(model, data, steps=100, lr=3e-3)(again)
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True)
    )
    bad, kept = Distillation(model, data, steps=20, lr=50.0), copy.deepcopy(student)
    bad(student)
    assert bad.after == bad.before
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), kept.parameters(), strict=True)
    )


def test_own_recovery_is_called_with_each_candidate(setup):
    model, data, metric = setup
    seen = []
    shrink(
        model, metric, 0.5, calibration=data, candidates=[0.6, 0.5], recover=seen.append,
        progress=False,
    )  # fmt: skip
    assert len(seen) == 2
    assert all(m is not model for m in seen)


def test_floors_absolute_and_of_a_single_number(setup):
    model, data, metric = setup

    def mean(candidate):
        return float(metric(candidate).mean())

    single = shrink(model, mean, 0.9, calibration=data, recover=False, progress=False)
    assert single.floor_test.lower == single.floor_test.ratio >= 0.9

    def third(candidate):
        return metric(candidate) / 3

    absolute = shrink(
        model, third, 0.3, calibration=data, relative=False, recover=False, progress=False
    )
    assert absolute.reference == pytest.approx(1 / 3)
    assert third(absolute.model).mean() >= 0.3


def test_an_unreachable_floor_says_the_best_found(setup):
    model, data, metric = setup
    with pytest.raises(FloorError, match=r"best of 2 keeps .*lower end") as caught:
        shrink(
            model, metric, 1.0, calibration=data, candidates=[0.3, 0.2], recover=False,
            progress=False,
        )  # fmt: skip
    assert caught.value.best is caught.value.curve[-1]
    assert len(caught.value.curve) == 2


def test_time_is_kept(setup):
    model, data, metric = setup
    found = shrink(
        model, metric, 0.5, calibration=data, recover=False, seconds=1e-6, progress=False
    )
    assert len(found.curve) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"floor": 1.2}, "floor 1.2"),
        ({"floor": 0}, "floor 0"),
        ({"calibration": []}, "empty"),
        ({"calibration": [torch.full((9, 32), float("nan"))]}, "NaN"),
        ({"candidates": []}, "candidates"),
        ({"candidates": [1.4]}, "candidates"),
        ({"candidates": [0.01]}, "cannot be made smaller"),
        ({"candidates": [0.5, 0.01], "metric": None}, r"cannot be made smaller than 1\d\.\d%"),
        ({"start": 0.1}, "lowest"),
        ({"include": "encoder.*"}, "named like"),
        ({"clusters": ["a"]}, "1 clusters for 200"),
        ({"allocation": "even"}, "allocation"),
        ({"metric": lambda m: [float("nan")]}, "NaN"),
        ({"metric": lambda m: 0.0}, "must be positive"),
        ({"metric": lambda m: np.zeros((2, 2))}, "one number a query"),
        ({"calibration": CalibrationStats({}), "recover": None}, "needs calibration data"),
    ],
)
def test_bad_input_is_named(setup, wrong, message):
    model, data, metric = setup
    arguments = {"metric": metric, "floor": 0.9, "calibration": data, "recover": False} | wrong
    with pytest.raises(InputError, match=message):
        shrink(model, progress=False, **arguments)


def test_a_metric_that_changes_its_length_is_named(setup):
    model, data, metric = setup
    with pytest.raises(InputError, match="7 values, and 200"):
        shrink(
            model, lambda m: metric(m)[: 200 if m is model else 7], 0.9, calibration=data,
            recover=False, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["greenformers", "welore", "pela"])
def test_methods_that_need_no_data_are_searched(setup, method):
    model, _, metric = setup
    found = shrink(model, metric, 0.5, method=method, recover=False, progress=False)
    assert found.floor_test.holds
    assert found.plan.savings().kept == min(c.kept for c in found.curve if c.holds) < 1
    assert metric(found.model).mean() == pytest.approx(found.curve[0].value)
    with pytest.raises(InputError, match="recover=False"):
        shrink(model, metric, 0.5, method=method, progress=False)


@pytest.mark.parametrize("method", ["greenformers", "pela", "pca"])
@pytest.mark.parametrize("sizes", [(64, 48, 48, 4), (17, 5, 31, 1), (16, 16, 16, 16)])
def test_what_stays_dense_counts(method, sizes):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))
    x = torch.randn(200, sizes[0])
    stats = CalibrationStats(dict(model.named_children())).observe(model, [x], progress=False)
    family = family_for(model, method, stats)
    for keep in (family.smallest, *np.linspace(0.05, 1, 20)):
        if keep < family.smallest:
            with pytest.raises(InputError, match=f"keeps at least {family.smallest:.1%}"):
                family.plan(keep)
        else:
            assert family.plan(keep).savings().kept <= keep
    # Where the same share for every layer does it, that is the plan.
    rule = FractionOfBreakEven(0.8) if method == "greenformers" else ParamRatio(1 / 0.8)
    simple = make_plan(model, rule)
    if method != "pela" and simple.savings().kept <= 0.8:
        wanted = [entry.rank for entry in simple.values()]
        assert [entry.rank for entry in family.plan(0.8).values()] == wanted


def test_pela_recovers_by_its_own_loss_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    # Few directions carry the data: there is something that the weights' SVD does not know.
    data = [torch.randn(64, 6) @ torch.randn(6, 32) for _ in range(8)]
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]

    def metric(candidate):
        with torch.no_grad():
            error = (candidate(data[0]) - model(data[0])).square().mean(1)
        return (1 / (1 + error)).numpy()

    how = {"method": "pela", "candidates": [0.5], "progress": False}
    found = shrink(model, metric, 0.01, calibration=data, **how)
    plain = shrink(model, metric, 0.01, recover=False, **how)
    assert found.plan == plain.plan
    assert found.curve[0].value > plain.curve[0].value
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_loss_has_a_ceiling(setup):
    model, data, metric = setup

    def loss(candidate):
        return 1 / metric(candidate)

    how = {"calibration": data, "recover": False, "progress": False, "lower_is_better": True}
    found = shrink(model, loss, 1.05, **how)
    assert loss(found.model).mean() <= 1.05
    assert found.floor_test.lower >= 1 / 1.05
    for candidate in found.curve:
        assert candidate.ratio == pytest.approx(found.reference / candidate.value)
    absolute = shrink(model, loss, 1.05, relative=False, **how)
    assert absolute.plan == found.plan
    single = shrink(model, lambda m: float(loss(m).mean()), 1.05, **how)
    assert single.floor_test.lower == pytest.approx(1 / loss(single.model).mean())
    with pytest.raises(FloorError, match=r"ceiling of 1.*upper end .* Raise the ceiling"):
        shrink(model, loss, 1.0, candidates=[0.2], **how)
    with pytest.raises(InputError, match="at least 1"):
        shrink(model, loss, 0.9, **how)


def test_a_recorded_search_measures_nothing_twice(setup, tmp_path):
    model, data, metric = setup
    calls = []

    def counted(candidate):
        calls.append(candidate)
        return metric(candidate)

    def search(floor=0.9999, identity="a"):
        record = SearchRecord(tmp_path / "work", {"what": identity})
        return shrink(
            model, counted, floor, calibration=data, recover=False, progress=False, record=record
        )

    first = search()
    measured = len(calls)
    again = search()
    assert len(calls) == measured
    assert again.curve == first.curve
    for one, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(one, other)
    # Another floor begins with what is known, and may go elsewhere from there.
    lower = search(0.9)
    assert len(calls) - measured < len(lower.curve)
    assert lower.plan.savings().kept < first.plan.savings().kept
    with pytest.raises(InputError, match="another what"):
        search(identity="b")
    (tmp_path / "work" / "search.json").write_text("{")
    with pytest.raises(StoreError, match="remove"):
        search()


def test_a_chosen_model_whose_weights_are_gone_is_made_again(setup, tmp_path):
    model, data, metric = setup

    def search():
        record = SearchRecord(tmp_path, {})
        return shrink(
            model, metric, 0.9, calibration=data, progress=False, record=record,
            recover=Distillation(model, data, steps=5),
        )  # fmt: skip

    first = search()
    (tmp_path / "chosen.safetensors").unlink()
    again = search()
    for one, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_interrupted_recovery_ends_the_same(setup, tmp_path, monkeypatch):
    model, data, _ = setup
    monkeypatch.setattr("fullrank.compress.distill_checkpoint._EVERY", 0.0)
    plan = make_plan(model, FractionOfBreakEven(0.3))
    whole, parts = (factorize(copy.deepcopy(model), plan, progress=False) for _ in range(2))
    Distillation(model, data, steps=12, lr=1e-3)(whole)
    file = tmp_path / "recovery.safetensors"
    recover = Distillation(model, data, steps=12, lr=1e-3, checkpoint=file)
    plain, calls = recover._loss, []

    def interrupted(student, index):
        calls.append(index)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return plain(student, index)

    start = copy.deepcopy(parts)
    recover._loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        recover(parts)
    assert file.is_file()
    after = Distillation(model, data, steps=12, lr=1e-3, checkpoint=file)
    counted, steps = after._loss, []
    after._loss = lambda student, index: (steps.append(index), counted(student, index))[1]
    after(start)
    assert len(steps) < 12
    assert not file.exists()
    for one, other in zip(start.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    # Another recovery's checkpoint is not taken for this one's.
    recover._loss = interrupted
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        recover(factorize(copy.deepcopy(model), plan, progress=False))
    other = factorize(copy.deepcopy(model), make_plan(model, FractionOfBreakEven(0.5)))
    fresh = copy.deepcopy(other)
    Distillation(model, data, steps=12, lr=1e-3, checkpoint=file)(other)
    Distillation(model, data, steps=12, lr=1e-3)(fresh)
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), fresh.parameters(), strict=True)
    )
