"""Maestro's importance threshold against what the layers themselves compute."""

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import ImportanceThreshold, Maestro, layer_spectra
from fullrank.core.errors import InputError


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_the_rule_agrees_with_maestro_at_its_start(shape):
    torch.manual_seed(0)
    layer = nn.Linear(*shape).double()
    seen = layer_spectra(nn.Sequential(layer))["0"]
    importance = Maestro(nn.Sequential(layer)).layers["0"].importance().detach().numpy()
    for eps in (0.05, 0.5, 1.5, 1e9):
        wanted = int(np.count_nonzero(importance >= eps)) or None
        assert ImportanceThreshold(eps)(seen.values, *seen.shape) == wanted


def test_negative_thresholds_are_refused():
    with pytest.raises(InputError, match="eps"):
        ImportanceThreshold(-1.0)
