"""Small matrices with gradients, and the ways the optimizers are asked to step them."""

import pytest
import torch

from fullrank.optim import foundation, gradients


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def on_device(monkeypatch):
    """Pretend that reading a number from the weights' device would wait for it."""
    for module in (foundation, gradients):
        monkeypatch.setattr(module, "host_decides", lambda device: False)


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device_or_not(request):
    if request.param:
        request.getfixturevalue("on_device")
