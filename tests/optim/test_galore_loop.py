"""GaLore as part of a training loop: losses, closures, groups, missing gradients."""

import copy

import pytest
import torch
from stepping import parameter, random_grads, run
from torch import nn

from fullrank.optim import GaLoreAdamW


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh": "subspace", "moments": "rotate"},
        {"state_bits": 8, "min_8bit_size": 1},
        {"moments": "reset"},
    ],
)
def test_training_lowers_the_loss(options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    data = torch.randn(256, 16)
    target = data @ torch.randn(16, 16) / 4
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "rank": 8, "update_proj_gap": 10, **options}, {"params": biases}]
    optimizer = GaLoreAdamW(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    losses = []
    for _ in range(60):
        loss = (model(data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_closure_and_its_loss():
    W = parameter(4, 6)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    optimizer = GaLoreAdamW([W], rank=2)
    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first


def test_parameters_without_gradient_are_left_alone():
    params = [parameter(6, 8), parameter(6, 8)]
    optimizer = GaLoreAdamW(params, rank=2)
    assert optimizer.step() is None
    run(optimizer, params, [[torch.randn(6, 8), None]])
    assert list(optimizer.state) == [params[0]]
    # Each counts its own steps.
    run(optimizer, params, [[torch.randn(6, 8), torch.randn(6, 8)]])
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0, 1.0]


def test_one_rank_for_each_parameter_of_a_group():
    params = [parameter(8, 12), parameter(12, 8), parameter(9, 9)]
    optimizer = GaLoreAdamW([{"params": params, "rank": [2, 5, None]}])
    run(optimizer, params, random_grads(params, 2))
    shapes = [tuple(optimizer.state[p]["exp_avg"].shape) for p in params]
    assert shapes == [(2, 12), (12, 5), (9, 9)]


def test_add_param_group_after_some_steps():
    first, second = parameter(6, 8), parameter(8, 6)
    optimizer = GaLoreAdamW([first], rank=2)
    run(optimizer, [first], random_grads([first], 2))
    group = {"params": [second], "rank": 3, "lr": 0.5}
    optimizer.add_param_group(group)
    assert list(group) == ["params", "rank", "lr"]
    run(optimizer, [first, second], random_grads([first, second], 2))
    assert optimizer.state[second]["exp_avg"].shape == (8, 3)
    assert optimizer.state[first]["step"] == 4


def test_official_groups_work_unchanged():
    W, b = parameter(8, 6), parameter(6)
    galore = {"rank": 2, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": [b]}, {"params": [W], **galore}], lr=0.01, weight_decay=0.1)
    run(optimizer, [W, b], random_grads([W, b], 2))
    assert "basis_right" in optimizer.state[W]
    assert "basis_right" not in optimizer.state[b]


def test_empty_parameters_and_a_cleared_state():
    params = [nn.Parameter(torch.empty(0, 5)), parameter(6, 8), nn.Parameter(torch.tensor(1.0))]
    groups = [{"params": params[:2], "rank": 2}, {"params": params[2:]}]
    optimizer = GaLoreAdamW(groups)
    grads = random_grads(params, 4)
    run(optimizer, params, grads[:2])
    optimizer.state.clear()
    twins = copy.deepcopy(params)
    fresh = GaLoreAdamW([{"params": twins[:2], "rank": 2}, {"params": twins[2:]}])
    run(optimizer, params, grads[2:])
    run(fresh, twins, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_weights_keep_their_storage():
    params = [parameter(6, 8), parameter(4)]
    pointers = [p.data_ptr() for p in params]
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 2}, {"params": params[1:]}])
    run(optimizer, params, random_grads(params, 3))
    assert [p.data_ptr() for p in params] == pointers
