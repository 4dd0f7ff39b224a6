"""Parameters, gradients and steps as the optimizers' tests want them."""

import io

import torch
from torch import nn


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter((torch.randn(*shape) * 0.1).to(dtype))


def run(optimizer, params, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def random_grads(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        for _ in range(steps)
    ]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
