"""Every optimizer of the package on a small model: the table for what all of them must do."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fullrank.optim import (
    LIFT,
    MKOR,
    MKORH,
    SGDP,
    AdamP,
    FiraAdamW,
    FiraRMSprop,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    LoRAPro,
    frugal_param_groups,
    param_groups,
)


class LoraLinear(nn.Module):
    """A frozen layer and a pair of factors, under the names that PEFT gives them."""

    def __init__(self, inside, outside, rank=2):
        super().__init__()
        self.base = nn.Linear(inside, outside).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outside, bias=False)})
        self.scaling = {"default": 2.0}

    def get_base_layer(self):
        return self.base

    def forward(self, x):
        change = self.lora_B["default"](self.lora_A["default"](x))
        return self.base(x) + self.scaling["default"] * change


def plain(layer=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(layer(8, 16), nn.LayerNorm(16), nn.GELU(), layer(16, 8))


def projected(kind, **options):
    group = {"rank": 3, "verbose": False, "update_proj_gap": 3}
    return lambda model: kind(param_groups(model, kind, **group), lr=0.01, **options)


def frugal(**options):
    return lambda model: FrugalAdamW(frugal_param_groups(model, update_gap=3, **options), lr=0.01)


def lift(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "rank": 2}, {"params": vectors}]
    return LIFT(groups, lr=0.01, lra_rank=3, update_interval=3)


def mkor(kind, **options):
    inner = partial(torch.optim.AdamW, lr=0.01)
    return lambda model: kind(model, inner, inv_freq=2, **options)


@dataclass
class Case:
    make: Callable
    model: Callable = plain

    def build(self, dtype=torch.float32):
        model = self.model().to(dtype)
        return model, self.make(model)


lora = partial(plain, LoraLinear)
EVERY = {
    "galore": Case(projected(GaLoreAdamW)),
    "galore_8bit": Case(projected(GaLoreAdamW, state_bits=8, min_8bit_size=1)),
    "adafactor": Case(projected(GaLoreAdafactor, relative_step=False)),
    "fira": Case(projected(FiraAdamW)),
    "fira_rmsprop": Case(projected(FiraRMSprop)),
    "gradnormlorp": Case(projected(GradNormLoRPAdamW)),
    "frugal_block": Case(frugal(subspace="block", density=0.5)),
    "frugal_columns": Case(frugal(subspace="columns")),
    "frugal_svd": Case(frugal(subspace="svd")),
    "lift": Case(lift),
    "lora_pro": Case(lambda model: LoRAPro(model, lr=0.01), lora),
    "lora_pro_efficient": Case(lambda model: LoRAPro(model, lr=0.01, mode="efficient"), lora),
    "lora_pro_sgd": Case(lambda model: LoRAPro(model, lr=0.01, optimizer="sgd"), lora),
    "adamp": Case(lambda model: AdamP(model.parameters(), lr=0.01)),
    "sgdp": Case(lambda model: SGDP(model.parameters(), lr=0.01, momentum=0.9)),
    "mkor": Case(mkor(MKOR)),
    "mkorh": Case(mkor(MKORH, patience=2, switch_beta=5.0)),
}


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator).to(dtype)


def loss_of(model, x):
    return (model(x) - x.roll(1, 1)).square().mean()


def observe(optimizer, loss):
    """MKOR-H wants to see the loss of each step, which loops that call `step()` do not give."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, MKORH):
        optimizer.observe(loss.detach())


def same(model, other, tolerance=0.0):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )
