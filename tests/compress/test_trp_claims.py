"""TRP: at the energy it was trained at, splitting costs a network nothing and leaves little."""

import pytest
import torch
from torch import nn

from fullrank.compress.layers_conv import LowRankConv2d
from fullrank.compress.trp import TRP
from fullrank.core.rank_rules import Energy

EPOCHS = 20


@pytest.fixture
def one_thread():
    """What training comes to depends on the order in which threads sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(x, y, truncating):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    trp = TRP(model, "spatial", energy=0.9, period=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(epoch)
        for index in torch.randperm(len(x), generator=generator).split(64):
            if truncating:
                trp.before_forward()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            trp.after_backward()
            optimizer.step()
    if truncating:
        trp.refresh()
    return model, trp


def test_splitting_a_network_trained_with_truncation(one_thread):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images / 16, dtype=torch.float32)[order][:, None]
    y = torch.tensor(data.target)[order]

    def accuracy(model):
        return float((model(x[1300:]).argmax(1) == y[1300:]).float().mean())

    numbers = {}
    for truncating in (False, True):
        model, trp = trained(x[:1300], y[:1300], truncating)
        small = trp.decompose(rule=Energy(0.9))
        numbers[truncating] = sum(
            small[int(name)].weight.numel()
            if type(small[int(name)]) is nn.Conv2d
            else small[int(name)].first.numel() + small[int(name)].second.numel()
            for name in trp.layers
        )
        if truncating:
            assert accuracy(model) > 0.8
            assert abs(accuracy(small) - accuracy(model)) < 0.01
            assert all(isinstance(small[int(name)], LowRankConv2d) for name in trp.layers)
    assert numbers[True] < numbers[False] / 2
