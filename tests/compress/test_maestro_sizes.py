"""Maestro: sizes of the family, batch norm, pruning with an optimizer, resume, bad input."""

import copy

import pytest
import torch
from torch import nn

from fullrank.compress import load, save
from fullrank.compress.maestro import Maestro
from fullrank.core.errors import InputError


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 6)).to(dtype)


# -- sizes -----------------------------------------------------------------------------------


def test_one_training_gives_sizes_by_rank_budget_and_fraction():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    # The second layer matters in two directions only.
    model[2].weight.data = torch.outer(torch.ones(32), torch.randn(32)) + 1e-3 * torch.randn(32, 32)
    maestro = Maestro(model)
    x = torch.randn(3, 32)
    before = maestro.model(x)
    plan = maestro.set_ranks(budget=0.4)
    sizes = sum(e.dense_size if e.rank is None else e.size("factor") for e in plan.values())
    assert sizes <= 0.4 * 2 * 32 * 32
    assert plan["2"].rank < plan["0"].rank
    exported = maestro.export()
    torch.testing.assert_close(exported(x), maestro.model(x))
    assert maestro.set_ranks(fraction=0.3)["0"].rank == 10
    maestro.set_ranks({"0": 3})
    assert [layer.used_rank for layer in maestro.layers.values()] == [3, 32]
    maestro.set_ranks()
    assert torch.equal(maestro.model(x), before)
    # What was exported is not touched by what comes after.
    assert exported[0].rank == plan["0"].rank


def test_plan_is_one_for_the_dense_model():
    dense = mlp()
    maestro = Maestro(copy.deepcopy(dense))
    plan = maestro.set_ranks({"0": 2, "2": 3})
    assert set(plan.check(dense, "factor")) == {"0", "2"}
    assert "2 of 10 components" in plan["0"].reason


def test_exported_model_saves_and_loads(tmp_path):
    maestro = Maestro(mlp())
    maestro.set_ranks({"0": 2, "2": 2})
    exported = maestro.export()
    save(exported, tmp_path / "small")
    x = torch.randn(2, 10)
    assert torch.equal(load(tmp_path / "small", into=mlp())(x), exported(x))


def test_a_layer_shows_the_weight_it_runs_on_and_refuses_to_be_truncated():
    maestro = Maestro(mlp(torch.float64), hierarchical=False)
    layer = maestro.layers["0"]
    layer.keep(torch.arange(10) % 2 == 0)
    maestro.set_ranks({"0": 3})
    x = torch.randn(4, 10, dtype=torch.float64)
    wanted = layer(x)
    torch.testing.assert_close(x @ layer.merged_weight().T + layer.bias, wanted)
    torch.testing.assert_close(layer.to_dense()(x), wanted)
    with pytest.raises(InputError, match=r"use Maestro\.set_ranks"):
        layer.truncate(2)


# -- batch norm ------------------------------------------------------------------------------


def test_batch_norm_is_recalibrated_at_the_present_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    maestro = Maestro(model)
    maestro.set_ranks({"0": 2})
    data = [(torch.randn(16, 6), torch.zeros(16)) for _ in range(5)]
    model.train()
    norm = model[1]
    maestro.recalibrate_bn(data)
    outputs = torch.cat([model[0](x) for x, _ in data])
    torch.testing.assert_close(norm.running_mean, outputs.mean(0), rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())
    by_hand = norm.running_mean.clone()
    maestro.recalibrate_bn(data, forward=lambda m, batch: m(batch[0]))
    assert torch.equal(norm.running_mean, by_hand)
    # A DataLoader gives lists.
    maestro.recalibrate_bn([list(batch) for batch in data])
    assert torch.equal(norm.running_mean, by_hand)
    with pytest.raises(InputError, match="empty"):
        maestro.recalibrate_bn([])
    with pytest.raises(InputError, match="no batch"):
        maestro.recalibrate_bn(iter(()))


# -- pruning with an optimizer, resume -------------------------------------------------------


def train(maestro, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 10, generator=generator)
        y = torch.randint(6, (8,), generator=generator)
        with maestro.sample():
            loss = nn.functional.cross_entropy(maestro.model(x), y) + maestro.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            maestro.shrink()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}


def started(optimizer, **options):
    maestro = Maestro(mlp(), **{"lam": 0.02, "eps": 0.4, **options})
    return maestro, OPTIMIZERS[optimizer](maestro.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("hierarchical", [True, False])
def test_resume_at_any_step_is_bit_equal(optimizer, hierarchical, tmp_path):
    options = {"hierarchical": hierarchical, "eps": 0.4 if hierarchical else 0.1}
    whole, whole_optimizer = started(optimizer, **options)
    train(whole, whole_optimizer, 14)
    ranks = [layer.full_rank for layer in whole.layers.values()]
    assert ranks[0] < 10
    for at in (3, 4, 9):
        half, half_optimizer = started(optimizer, **options)
        train(half, half_optimizer, at)
        states = [half.model.state_dict(), half.state_dict(), half_optimizer.state_dict()]
        torch.save(states, tmp_path / "state.pt")
        model, own, inner = torch.load(tmp_path / "state.pt", weights_only=True)
        again, again_optimizer = started(optimizer, **options)
        # In either order.
        if at == 4:
            again.load_state_dict(own)
        again.model.load_state_dict(model)
        again_optimizer.load_state_dict(inner)
        again.load_state_dict(own)
        train(again, again_optimizer, 14 - at, start=at)
        for one, two in zip(
            whole.model.state_dict().values(), again.model.state_dict().values(), strict=True
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruning_cuts_the_optimizer_too(optimizer, tmp_path):
    maestro, made = started(optimizer)
    train(maestro, made, 8)
    layer = maestro.layers["0"]
    left = layer.full_rank
    assert 0 < left < 10
    x = torch.randn(2, 10)
    before = maestro.model(x)
    momentum = next(v for v in made.state[layer.first].values() if v.numel() > 1).clone()
    maestro.prune(made)
    assert layer.first.shape == (left, 10)
    torch.testing.assert_close(maestro.model(x), before)
    after = next(v for v in made.state[layer.first].values() if v.numel() > 1)
    assert torch.equal(after, momentum[:left])
    # Training goes on, and a pruned checkpoint loads into a fresh model.
    train(maestro, made, 2, start=8)
    fresh, fresh_optimizer = started(optimizer)
    fresh.model.load_state_dict(maestro.model.state_dict())
    fresh.load_state_dict(maestro.state_dict())
    fresh_optimizer.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(fresh.model(x), maestro.model(x))
    train(maestro, made, 3, start=10)
    train(fresh, fresh_optimizer, 3, start=10)
    assert torch.equal(fresh.model(x), maestro.model(x))


def test_an_optimizer_whose_state_cannot_be_cut_is_refused():
    maestro = Maestro(mlp(), eps=1.0)
    optimizer = torch.optim.Adafactor(maestro.model.parameters())
    train(maestro, optimizer, 4)
    shape = maestro.layers["0"].first.shape
    with pytest.raises(InputError, match="Adafactor keeps"):
        maestro.prune(optimizer)
    assert maestro.layers["0"].first.shape == shape


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1e-6}, "lam=-1e-06"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"include": "conv*"}, "named like 'conv"),
        ({"exclude": "9"}, "named like '9'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Maestro(mlp(), **arguments)


def test_bad_ranks_are_named_and_change_nothing():
    maestro = Maestro(mlp())
    for call, message in [
        (lambda: maestro.set_ranks({"5": 1}), "no factorised layer is named '5'"),
        (lambda: maestro.set_ranks({"0": 11}), r"rank 11; it must lie in \[0, 10\]"),
        (lambda: maestro.set_ranks({"0": -1}), "rank -1"),
        (lambda: maestro.set_ranks({"0": 1}, budget=0.5), "takes one of"),
        (lambda: maestro.set_ranks(budget=1.5), "1.5"),
        (lambda: maestro.set_ranks(fraction=0.0), "fraction 0.0"),
        (lambda: maestro.set_ranks(budget=0.01), "cannot be made smaller"),
        (lambda: maestro.sample("0").__enter__(), "rank None"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert all(layer.active_rank is None for layer in maestro.layers.values())
    other = Maestro(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="other layers"):
        maestro.load_state_dict(other.state_dict())


def test_a_broken_weight_is_named_before_anything_changes():
    model = mlp()
    model[2].weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="2: the weight holds NaN"):
        Maestro(model)
    assert type(model[0]) is nn.Linear


def test_the_models_own_state_has_the_ranks():
    def made():
        torch.manual_seed(0)
        return Maestro(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))

    maestro, x = made(), torch.randn(3, 16)
    maestro.set_ranks({"0": 2})
    state, wanted = maestro.model.state_dict(), maestro.model(x)
    again = made()
    again.model.load_state_dict(state)
    assert torch.equal(again.model(x), wanted)
    assert again.plan() == maestro.plan()
    again.set_ranks()
    assert again.layers["0"].used_rank == 16
    # States from before the ranks were in them load too.
    old = {name: value for name, value in state.items() if not name.endswith("active")}
    again.set_ranks({"0": 3})
    again.model.load_state_dict(old)
    assert again.layers["0"].used_rank == 3


def test_what_a_cut_loses_is_reported():
    torch.manual_seed(0)
    maestro = Maestro(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8)))
    whole = [layer.merged_weight().double() for layer in maestro.layers.values()]
    maestro.set_ranks({"0": 3, "2": 2})
    small = maestro.export()
    for layer, weight in zip((small[0], small[2]), whole, strict=True):
        lost = (weight - layer.merged_weight()).square().sum() / weight.square().sum()
        assert layer.error == pytest.approx(float(lost), rel=1e-4)
