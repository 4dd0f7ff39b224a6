"""Stochastic rounding: neighbours only, right on average, and what it is for."""

import pytest
import torch
from torch import nn

from fullrank.optim import FrugalAdamW, GaLoreAdamW
from fullrank.optim.rounding import stochastic_round_


def rounded(values, seed=0):
    target = torch.empty_like(values, dtype=torch.bfloat16)
    return stochastic_round_(target, values, torch.Generator().manual_seed(seed))


def test_goes_to_one_of_the_two_neighbours():
    values = torch.cat([torch.randn(5000) * 10.0**e for e in (-30, -3, 0, 3, 30)])
    got = rounded(values).float()
    # Cutting the lower half off goes towards zero; the other neighbour is one step away from it.
    low = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    high = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((got == low) | (got == high)).all())
    assert bool((got == low).any())
    assert bool((got == high).any())


def test_what_bfloat16_holds_stays():
    values = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded(values).float(), values)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    got = rounded(special)
    assert torch.equal(got[:4].float(), special[:4])
    assert torch.isnan(got[4])


def test_is_right_on_average():
    values = torch.linspace(-3, 3, 50)
    mean = torch.stack([rounded(values, seed).float() for seed in range(2000)]).mean(0)
    assert (mean - values).abs().max() < 2e-3


def test_targets_of_any_strides():
    values = torch.randn(6, 8)
    target = torch.empty(8, 6, dtype=torch.bfloat16).t()
    stochastic_round_(target, values.t().contiguous().t(), torch.Generator().manual_seed(0))
    assert torch.equal(target, rounded(values))


@pytest.mark.parametrize("projected", [True, False])
def test_small_steps_are_not_lost(projected):
    def moved(**options):
        W = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        group = {"params": [W], "rank": 8 if projected else None}
        optimizer = GaLoreAdamW([group], lr=1e-4, scale=1.0, **options)
        torch.manual_seed(0)
        G = torch.outer(torch.randn(64), torch.randn(64)).bfloat16()
        for _ in range(20):
            W.grad = G
            optimizer.step()
        return (W.detach().float() - 1.0).abs().mean()

    assert moved() == 0.0
    assert moved(stochastic_rounding=True) > 1e-3 * (0.3 if projected else 1.0)


def test_sign_steps_are_not_lost():
    W = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = FrugalAdamW(
        [{"params": [W], "is_proj_params": True}], lr=1e-3, density=0.0, stochastic_rounding=True
    )
    for _ in range(10):
        W.grad = torch.ones(32, 32, dtype=torch.bfloat16)
        optimizer.step()
    assert abs(W.detach().float().mean() - 0.99) < 1e-3
