"""PELA: feature distillation brings the student's hidden states back to the teacher's."""

import copy

import pytest
import torch
from torch import nn

from fullrank.compress.pela import pela_compress
from fullrank.compress.pela_features import Features
from fullrank.compress.pela_loss import PELALoss


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_features_are_a_quarter_closer_after_as_many_steps(ratio):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(data.target)[order]
    x, held_out, y = x[:1300], x[1300:], y[:1300]

    def fit(model, loss, epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(epoch)
            for index in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                loss(x[index], y[index]).backward()
                optimizer.step()

    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    teacher = nn.Sequential(*layers)
    fit(teacher, lambda x, y: nn.functional.cross_entropy(teacher(x), y), 25)
    errors = {}
    for alpha in (0.0, 1.0):
        student = pela_compress(copy.deepcopy(teacher), ratio)
        loss = PELALoss(
            student,
            teacher,
            alpha=alpha,
            beta=0.0,
            hidden_states=("1", "3"),
            criterion=nn.functional.cross_entropy,
        )
        fit(student, lambda x, y, loss=loss: loss((x, y)), 2)
        states = [
            Features(model, ("1", "3")).run(held_out, lambda m, b: m(b))[1]
            for model in (student, teacher)
        ]
        errors[alpha] = sum(
            float((a.value - b.value).detach().square().mean())
            for a, b in zip(*states, strict=True)
        )
    assert errors[1.0] < 0.75 * errors[0.0]
