"""Forms of AdamP and SGDP, and parameters and gradients that take every branch."""

import torch
from torch import nn

from fullrank.optim.adamp import SGDP, AdamP

MAKE = {
    "adamp": lambda p, **o: AdamP(p, **{"lr": 0.01, "weight_decay": 0.1} | o),
    "adamp-nesterov": lambda p, **o: AdamP(
        p, **{"lr": 0.01, "weight_decay": 0.1, "nesterov": True} | o
    ),
    "sgdp": lambda p, **o: SGDP(p, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | o),
    "sgdp-nesterov": lambda p, **o: SGDP(
        p, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True} | o
    ),
    "sgdp-buffer": lambda p, **o: SGDP(
        p, **{"lr": 0.1, "momentum": 0.9, "project_buffer": True} | o
    ),
}


def parameters(dtype=torch.float32):
    """A matrix, a convolution, a row, a column, a vector and a scalar."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 10), (5, 3, 3, 3), (1, 12), (7, 1), (9,), ()]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, t):
    """Orthogonal to each row, to the whole, or neither, in turns."""
    generator = torch.Generator().manual_seed(100 + t)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        weight = param.detach()
        kind = (t + i) % 3
        if param.dim() > 1 and kind < 2:
            g, w = (x.flatten(1) if kind == 0 else x.reshape(1, -1) for x in (grad, weight))
            g -= w * ((g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))
        param.grad = grad


def advance(params, optimizer, steps):
    for t in steps:
        gradients(params, t)
        optimizer.step()
    return [p.detach().clone() for p in params]
