"""Maestro finds the SVD of a linear map, and a heavier lasso leaves fewer ranks."""

import torch
from torch import nn

from fullrank.compress.maestro import Maestro


def test_prefixes_of_a_linear_map_become_its_best_approximations():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    target = target @ torch.randn(3, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False)).double()
    maestro = Maestro(model, lam=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    whitened = torch.eye(6, dtype=torch.float64)
    for _ in range(3000):
        with maestro.sample():
            loss = (model(whitened) - target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = torch.linalg.svdvals(target)
    importance = maestro.layers["0"].importance(hierarchical=False)
    torch.testing.assert_close(importance[:3], values[:3], rtol=0.02, atol=0)
    assert (importance[3:] < 0.08).all()
    for rank in (1, 2):
        maestro.set_ranks({"0": rank})
        error = (maestro.layers["0"].merged_weight() - target).norm()
        assert error < 1.006 * values[rank:].square().sum().sqrt()


def test_a_larger_lasso_leaves_fewer_ranks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    left = []
    for lam in (0.0, 1e-3, 1e-2, 1e-1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        maestro = Maestro(model, lam=lam, eps=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(200):
            part = slice(32 * (step % 8), 32 * (step % 8) + 32)
            with maestro.sample():
                loss = nn.functional.cross_entropy(model(x[part]), y[part]) + maestro.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        maestro.shrink()
        left.append(sum(layer.full_rank for layer in maestro.layers.values()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]
