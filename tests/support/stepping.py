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


def advance(model, optimizer, steps):
    """Take the steps of these numbers, each with its own gradients; step 4 has a NaN."""
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if t == 4:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step()


def assert_continues(build, stops, steps=9):
    """Stopping after so many steps and continuing from files gives what never stopping does."""
    whole, optimizer = build()
    advance(whole, optimizer, range(steps))
    for stop in stops:
        first, before = build()
        advance(first, before, range(stop))
        second, after = build()
        second.load_state_dict(through_a_file(first.state_dict()))
        after.load_state_dict(through_a_file(before.state_dict()))
        advance(second, after, range(stop, steps))
        for a, b in zip(whole.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), stop
            for name, value in optimizer.state[a].items():
                assert value.dtype == after.state[b][name].dtype
                assert torch.equal(value, after.state[b][name])
