"""Hooks that feed what flows through modules to a function."""

import pytest
import torch
from torch import nn

from fullrank.core import capture


class Pair(nn.Module):
    def forward(self, x, *, scale=1.0):
        return x * scale, x + 1


@pytest.fixture
def seen():
    return []


def test_inputs_and_outputs(seen):
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    with capture({"fc": layer}, lambda name, value: seen.append((name, value))):
        y = layer(x)
    with capture({"fc": layer}, lambda name, value: seen.append((name, value)), side="output"):
        layer(x)
    assert [name for name, _ in seen] == ["fc", "fc"]
    torch.testing.assert_close(seen[0][1], x)
    torch.testing.assert_close(seen[1][1], y)
    assert not seen[1][1].requires_grad
    assert y.requires_grad


def test_named_inputs_and_tuples(seen):
    model = Pair()
    with capture({"m": model}, lambda _, value: seen.append(value)):
        model(x=torch.ones(2), scale=3.0)
    with capture({"m": model}, lambda _, value: seen.append(value), side="output"):
        model(torch.ones(2), scale=3.0)
    assert [value.tolist() for value in seen] == [[1.0, 1.0], [3.0, 3.0]]


def test_hooks_are_gone_afterwards_even_after_an_error(seen):
    layer = nn.Linear(3, 2)

    def fail(name, value):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), capture({"fc": layer}, fail):
        layer(torch.zeros(1, 3))
    layer(torch.zeros(1, 3))
    with capture({"fc": layer}, lambda *value: seen.append(value)):
        pass
    layer(torch.zeros(1, 3))
    assert seen == []
