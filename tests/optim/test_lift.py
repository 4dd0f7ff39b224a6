"""LIFT: the equations, layouts, bad input."""

import math

import pytest
import torch
from stepping import random_grads
from torch import nn

from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.optim import LIFT, param_groups
from fullrank.optim.mask import principal_mask


def by_the_book(W, grads, rank, R, interval, lr, wd, betas=(0.9, 0.95), eps=1e-6, mode="code"):
    """The method's steps on dense arrays, in float64."""
    W = W.double().clone()
    mask = principal_mask(W, rank, R).to(W)
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t, G in enumerate(grads, 1):
        if t % interval == 0:
            mask = principal_mask(W, rank, R).to(W)
            M, V = M * mask, V * mask
        G = G.double() * mask
        M = betas[0] * M + (1 - betas[0]) * G
        V = betas[1] * V + (1 - betas[1]) * G * G
        first, root = 1 - betas[0] ** t, math.sqrt(1 - betas[1] ** t)
        if mode == "code":
            W -= lr * root / first * M / (V.sqrt() + eps)
        else:
            W -= lr * M / first / (V.sqrt() / root + eps)
        W -= mask * lr * wd * W
    return W


@pytest.mark.parametrize("eps_mode", ["uncorrected", "corrected"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (7, 30), (1, 9)])
@pytest.mark.parametrize("interval", [1, 4])
def test_equals_the_equations(shape, interval, eps_mode):
    W = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    start, grads = W.detach().clone(), [G for (G,) in random_grads([W], 11)]
    R = min(3, *shape)
    options = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}
    optimizer = LIFT(
        [W], rank=1, lra_rank=R, update_interval=interval, eps_mode=eps_mode, **options
    )
    for G in grads:
        W.grad = G
        optimizer.step()
    mode = "code" if eps_mode == "uncorrected" else "paper"
    expected = by_the_book(start, grads, 1, R, interval, 0.02, 0.1, eps=1e-3, mode=mode)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-11, atol=1e-12)


def test_other_entries_are_bit_identical_and_gradients_untouched():
    W = nn.Parameter(torch.randn(20, 16))
    optimizer = LIFT([W], rank=1, lra_rank=4, update_interval=3, lr=0.1, weight_decay=0.5)
    for (G,) in random_grads([W], 8):
        before, W.grad = W.detach().clone(), G.float()
        grad = W.grad.clone()
        optimizer.step()
        ((_, mask),) = optimizer.masks()
        assert mask.sum() == 36
        assert torch.equal(W[~mask], before[~mask])
        assert (W[mask] != before[mask]).all()
        assert torch.equal(W.grad, grad)


def test_a_whole_budget_is_adamw():
    W = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    twin = nn.Parameter(W.detach().clone())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = LIFT([W], rank=5, lra_rank=2, update_interval=2, eps_mode="corrected", **options)
    adamw = torch.optim.AdamW([twin], weight_decay=0.0, **options)
    for (G,) in random_grads([W], 7):
        W.grad, twin.grad = G, G
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(W, twin, rtol=1e-12, atol=1e-14)


def test_delta_has_more_than_the_rank_of_a_lora():
    W = nn.Parameter(torch.randn(24, 24))
    start = W.detach().clone()
    optimizer = LIFT([W], rank=1, lra_rank=4, lr=0.01)
    W.grad = torch.randn(24, 24)
    optimizer.step()
    assert torch.linalg.matrix_rank(W.detach() - start) > 5


@pytest.mark.parametrize("svd", ["full", "randomized"])
def test_layout_of_weights_and_gradients_does_not_matter(svd):
    W = nn.Parameter(torch.randn(20, 16))
    turned = nn.Parameter(W.detach().T.contiguous().T)
    options = {"rank": 1, "lra_rank": 4, "update_interval": 2, "lr": 0.01, "svd": svd}
    optimizers = [LIFT([each], **options) for each in (W, turned)]
    for (G,) in random_grads([W], 5):
        W.grad, turned.grad = G.float(), G.float().T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(W, turned)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "options", "says"),
    [
        ([torch.zeros(8, 6)], {"rank": 0}, "rank=0"),
        ([torch.zeros(8, 6)], {"rank": -2}, "rank=-2"),
        ([torch.zeros(8, 6)], {"rank": 1.5}, "rank=1.5"),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 7}, "lra_rank=7.*6 at most"),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 0}, "lra_rank=0"),
        ([torch.zeros(8)], {"rank": 1, "lra_rank": 1}, "needs a matrix"),
        ([torch.zeros(8, 3, 2, 2)], {"rank": 1, "lra_rank": 1}, "needs a matrix"),
        ([torch.zeros(8, 6, dtype=torch.uint8)], {"rank": 1, "lra_rank": 1}, "uint8"),
        ([torch.zeros(8, 6, dtype=torch.cfloat)], {"rank": 1, "lra_rank": 1}, "complex"),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 1, "svd": "fast"}, "svd="),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 1, "update_interval": 0}, "interval=0"),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 1, "lr": float("nan")}, "lr"),
        ([torch.zeros(8, 6)], {"rank": 1, "lra_rank": 1, "eps_mode": "x"}, "eps_mode"),
        ([{"params": [torch.zeros(8, 6)], "rank": [1, 2]}], {"lra_rank": 1}, "lists 2 ranks"),
        ([{"params": [torch.zeros(8, 6)], "rank": 1, "lra_rank": [1, 2]}], {}, "2 lra_ranks"),
        ([{"params": [torch.zeros(8, 6)], "rank": -1}], {"lra_rank": 1}, "rank=-1"),
    ],
)
def test_bad_input(params, options, says):
    with pytest.raises(InputError, match=says):
        LIFT(params, **options)


def test_a_weight_with_nans_is_named():
    W = nn.Parameter(torch.full((8, 6), float("nan")))
    optimizer = LIFT([("layer.weight", W)], rank=1, lra_rank=1)
    W.grad = torch.ones_like(W)
    with pytest.raises(InputError, match=r"layer\.weight.*NaN"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    W = nn.Parameter(torch.randn(8, 6))
    optimizer = LIFT([W], rank=1, lra_rank=1)
    W.grad = torch.ones_like(W).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()


def test_groups_without_a_rank_are_announced():
    with pytest.warns(UserWarning, match="no param group has a rank"):
        LIFT([{"params": [nn.Parameter(torch.randn(8, 6))]}])


def test_defaults_are_the_papers():
    group = LIFT([nn.Parameter(torch.randn(300, 200))]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.95), 1e-6)
    assert (group["rank"], group["lra_rank"], group["update_interval"]) == (128, 128, 400)
    assert (group["weight_decay"], group["svd"], group["eps_mode"]) == (0.0, "full", "uncorrected")


def test_a_plan_of_ranks_fits_one_group():
    weights = [nn.Parameter(torch.randn(20, 16)) for _ in range(3)]
    group = {"params": weights, "rank": [1, None, 2], "lra_rank": [2, None, 4]}
    optimizer = LIFT([group])
    for W in weights:
        W.grad = torch.ones_like(W)
    optimizer.step()
    assert [mask.sum() for _, mask in optimizer.masks()] == [36, 72]


def model_with_a_narrow_layer():
    return nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_named_parameters_of_a_model():
    model = model_with_a_narrow_layer()
    with pytest.warns(UserWarning, match=r"4 parameters are no matrices.*\(8,\)"):
        optimizer = LIFT(model.named_parameters(), rank=1, lra_rank=4)
    assert optimizer.param_groups[0]["rank"] == [1, None, None, None, 1, None]
    model(torch.randn(5, 16)).square().sum().backward()
    optimizer.step()
    assert [int(mask.sum()) for _, mask in optimizer.masks()] == [24, 10]


def test_a_plan_says_both_ranks():
    model = model_with_a_narrow_layer()
    entries = {
        "0": PlanEntry((8, 16), 2, options={"lra_rank": 3}),
        "2": PlanEntry((2, 8), 1),
    }
    plan = RankPlan(entries, purpose="optimizer")
    optimizer = LIFT(model.named_parameters(), plan=plan)
    groups = param_groups(model, LIFT, plan=plan, verbose=False)
    for each in (optimizer, LIFT(groups)):
        masks = [each._mask(model[i].weight, each.param_groups[0]) for i in (0, 2)]
        assert [(mask.rank, mask.lra_rank) for mask in masks] == [(2, 3), (1, 2)]
    with pytest.raises(InputError, match=r"either rank=.*or plan="):
        LIFT(model.named_parameters(), rank=2, plan=plan)


def test_the_usual_filter_is_cut_for_narrow_weights():
    model = model_with_a_narrow_layer()
    groups = param_groups(model, LIFT, rank=1, verbose=False)
    optimizer = LIFT(groups)
    masks = [optimizer._mask(model[i].weight, optimizer.param_groups[0]) for i in (0, 2)]
    assert [mask.lra_rank for mask in masks] == [8, 2]
    assert groups.memory().rows
