"""Every optimizer under a GradScaler: steps as without, but for those that overflow."""

import math

import pytest
import torch
from every_optimizer import EVERY, batch, loss_of, observe, same

OVERFLOWS = (0, 5)


@pytest.fixture(params=EVERY)
def case(request):
    return EVERY[request.param]


def trained(case, scaled):
    model, optimizer = case.build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3, enabled=scaled)
    if hasattr(optimizer, "grad_scale"):  # statistics of the backward pass, too, are scaled
        optimizer.grad_scale = scaler.get_scale
    scales = set()
    for t in range(9):
        if t in OVERFLOWS and not scaled:
            continue
        loss = loss_of(model, batch(t))
        scaler.scale(loss).backward()
        if t in OVERFLOWS:
            next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = math.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.add(scaler.get_scale())
        if t not in OVERFLOWS:
            observe(optimizer, loss)
        optimizer.zero_grad()
    return model, optimizer, scales


def test_scale_is_taken_off_and_overflows_are_left_out(case):
    model, optimizer, scales = trained(case, scaled=True)
    twin, other, _ = trained(case, scaled=False)
    # A power of two is exact.
    same(model, twin)
    assert len(scales) > 1
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.get("step") == b.get("step")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_lower_precision(case, dtype):
    model, optimizer = case.build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if hasattr(optimizer, "grad_scale"):
        optimizer.grad_scale = scaler.get_scale
    x, losses = batch(0), []
    for _ in range(30):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        observe(optimizer, loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
