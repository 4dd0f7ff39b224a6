"""What is stepped together is alike: a step does not depend on the neighbours in the group."""

import pytest
import torch
from torch import nn

from fullrank.optim import (
    FiraAdamW,
    FiraRMSprop,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
)

CASES = {
    "galore": lambda groups: GaLoreAdamW(groups, lr=0.1),
    "galore 8 bit": lambda groups: GaLoreAdamW(groups, lr=0.1, state_bits=8, min_8bit_size=1),
    "adafactor": lambda groups: GaLoreAdafactor(groups, lr=0.1, relative_step=False),
    "adafactor's own rate": GaLoreAdafactor,
    "fira": lambda groups: FiraAdamW(groups, lr=0.1),
    "fira rmsprop": lambda groups: FiraRMSprop(groups, lr=0.1),
    "frugal lion": lambda groups: FrugalAdamW(groups, lr=0.1, stateful="lion"),
    "frugal sgdm": lambda groups: FrugalAdamW(groups, lr=0.1, stateful="sgdm"),
    "gradnorm": lambda groups: GradNormLoRPAdamW(groups, lr=0.1, mode="official"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*projects nothing:UserWarning")


def stepped(make, params, of):
    """What two steps make of one of the parameters."""
    optimizer = make([{"params": params}])
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return params[of].detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(0, 5), ()], ids=["empty", "scalar"])
def test_the_neighbours_do_not_matter(shape, case, dtype):
    start = torch.randn(6).to(dtype)
    alone = stepped(CASES[case], [nn.Parameter(start.clone())], 0)
    for first in (True, False):
        pair = [nn.Parameter(torch.ones(shape, dtype=dtype)), nn.Parameter(start.clone())]
        found = stepped(CASES[case], pair if first else pair[::-1], 1 if first else 0)
        torch.testing.assert_close(found, alone)
