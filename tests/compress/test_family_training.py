"""TRP and Maestro from a finished model: one training, every size, resume, bad input."""

import copy
import itertools

import pytest
import torch
from torch import nn

from fullrank.compress import FloorError, LowRankLinear, TrainedFamily, shrink
from fullrank.core.errors import InputError


def network(seed=0, width=24):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 5)
    )


def batches(count=20):
    torch.manual_seed(1)
    return [torch.randn(16, 12) for _ in range(count)]


def family(method, model=None, **options):
    return TrainedFamily(
        network() if model is None else model, method, batches(), **{"steps": 25, **options}
    )


@pytest.fixture(params=["trp", "maestro"])
def method(request):
    return request.param


def test_one_training_gives_nested_sizes_and_leaves_the_model_alone(method):
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    found = family(method, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    ranks = []
    for keep in (0.9, 0.6, 0.3):
        plan = found.plan(keep)
        assert found.smallest <= plan.savings().kept <= keep
        small = found.build(plan)
        assert small.training
        layers = {n: m for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
        assert {n: m.rank for n, m in layers.items()} == {
            n: e.rank for n, e in plan.items() if e.rank is not None
        }
        ranks.append({n: e.rank or min(e.matrix_shape) for n, e in plan.items()})
    for larger, smaller in itertools.pairwise(ranks):
        assert all(smaller[n] <= larger[n] for n in larger)


def test_a_size_comes_out_the_same_whatever_was_built_before(method):
    found = family(method)
    plan = found.plan(0.5)
    first = found.build(plan)
    found.build(found.plan(0.9))
    x = batches()[0]
    assert torch.equal(first(x), found.build(plan)(x))


@pytest.mark.parametrize("stop", [1, 13, 20, 25])
def test_an_interrupted_training_goes_on_bit_by_bit(method, stop, tmp_path, monkeypatch):
    from fullrank.compress import distill_checkpoint

    whole = family(method)
    monkeypatch.setattr(distill_checkpoint, "_EVERY", 0.0)
    file = tmp_path / "training.safetensors"
    taken = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        if len(taken) == stop:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    if stop < 25:
        with pytest.raises(KeyboardInterrupt):
            family(method, checkpoint=file)
    else:
        family(method, checkpoint=file)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    again = family(method, checkpoint=file)
    plan = again.plan(0.5)
    assert plan.to_json() == whole.plan(0.5).to_json()
    x = batches()[0]
    assert torch.equal(again.build(plan)(x), whole.build(plan)(x))


def test_a_finished_training_is_not_made_again(method, tmp_path, monkeypatch):
    file = tmp_path / "training.safetensors"
    family(method, checkpoint=file)

    def never(*_, **__):
        raise AssertionError("it trains again")

    monkeypatch.setattr(torch.optim.AdamW, "step", never)
    family(method, checkpoint=file)
    with pytest.raises(AssertionError):
        family(method, checkpoint=file, seed=1)
    with pytest.raises(AssertionError):
        family(method, checkpoint=file, include=["0", "2"])
    other = [batch + 1 for batch in batches()]
    with pytest.raises(AssertionError):
        TrainedFamily(network(), method, other, steps=25, checkpoint=file)


def test_trp_lowers_the_rank_that_an_energy_takes():
    model = network(width=48)
    trained = family("trp", model, steps=60, lr=3e-3)
    plain = torch.linalg.svdvals(model[2].weight.detach()).square()
    cut = torch.linalg.svdvals(trained.build(trained.plan(1.0))[2].weight.detach()).square()
    assert int((cut.cumsum(0) < 0.97 * cut.sum()).sum()) <= int(
        (plain.cumsum(0) < 0.97 * plain.sum()).sum()
    )
    assert int((cut > 1e-8 * cut[0]).sum()) < 48


def test_the_search_takes_a_family(method):
    model, x = network(), batches()[0]
    wanted = model(x).detach()

    def closeness(candidate):
        with torch.no_grad():
            return float(1 / (1 + (candidate(x) - wanted).square().mean()))

    found = shrink(model, closeness, 0.9, method=family(method), recover=False, progress=False)
    assert found.plan.savings().kept < 1
    assert closeness(found.model) == pytest.approx(found.floor_test.ratio, rel=1e-5)
    with pytest.raises(FloorError):
        shrink(
            model, closeness, 0.999999, method=family(method), recover=False, progress=False,
            candidates=[0.2],
        )  # fmt: skip


def test_bad_input():
    with pytest.raises(InputError, match="it is one of trp, maestro"):
        family("qr")
    with pytest.raises(InputError, match="at least two batches"):
        TrainedFamily(network(), "trp", [torch.randn(4, 12)])
    with pytest.raises(InputError, match="steps=0"):
        family("maestro", steps=0)
    found = family("trp", steps=2)
    for keep in (0.0, 1.5):
        with pytest.raises(InputError, match="must lie in"):
            found.plan(keep)
    with pytest.raises(InputError, match="at least"):
        found.plan(1e-4)
