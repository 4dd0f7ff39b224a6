"""A model with LoRA layers, forms of LoRAPro, and steps of both."""

import torch
from torch import nn

from fullrank.optim.lora_pro import LoRAPro

FORMS = {
    "full": {},
    "efficient": {"mode": "efficient"},
    "sgd": {"optimizer": "sgd"},
    "bf16 moments": {"state_dtype": torch.bfloat16},
}


class LoraLinear(nn.Module):
    """What PEFT's layer looks like to the optimizer."""

    def __init__(self, m, n, r, s=2.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n, dtype=dtype) * 0.1, requires_grad=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, dtype=dtype)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": s}

    def forward(self, x):
        lora = self.lora_B["default"](self.lora_A["default"](x))
        return x @ self.weight.T + self.scaling["default"] * lora


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.one = LoraLinear(12, 20, 3, dtype=dtype)
        self.two = LoraLinear(7, 12, 2, s=4.0, dtype=dtype)
        self.three = LoraLinear(12, 20, 3, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)

    def forward(self, x):
        return self.two(self.norm(self.one(x) + self.three(x)))


def build(form="full", dtype=torch.float32, **options):
    torch.manual_seed(3)
    model = Model(dtype)
    return model, LoRAPro(model, lr=0.01, **{**FORMS[form], **options})


def train(model, optimizer, steps, nan_at=None):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 20, generator=generator).to(model.norm.weight.dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        if t == nan_at:
            model.one.lora_B["default"].weight.grad[0, 0] = float("nan")
        optimizer.step()


def pair(m=6, n=9, r=2, dtype=torch.float64):
    A = nn.Parameter(torch.randn(r, n, dtype=dtype))
    B = nn.Parameter(torch.randn(m, r, dtype=dtype) * 0.1)
    return A, B
