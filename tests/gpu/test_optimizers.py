"""Every optimizer on a GPU: the CPU's trajectory, no waiting inside a step, and resume."""

import io
from functools import partial

import pytest
import torch
from every_optimizer import EVERY, Case, batch, loss_of, observe, projected

from fullrank.optim import MKOR, MKORH, FiraAdamW, GaLoreAdamW, step_per_layer

CASES = {
    **EVERY,
    "galore_subspace": Case(projected(GaLoreAdamW, refresh="subspace")),
    "galore_skip": Case(projected(GaLoreAdamW, nonfinite="skip")),
    "fira_subspace": Case(projected(FiraAdamW, refresh="subspace")),
}
every_case = pytest.mark.parametrize("name", CASES)


def kernel(device):
    """MKOR leaves a step out without waiting where its inner optimizer's kernel can."""
    inner = partial(torch.optim.AdamW, lr=0.01, fused=device == "cuda")
    return {
        "mkor": Case(lambda model: MKOR(model, inner, inv_freq=2)),
        "mkorh": Case(lambda model: MKORH(model, inner, inv_freq=2, patience=2, switch_beta=5.0)),
    }


def build(name, device, dtype=torch.float32):
    case = {**CASES, **kernel(device)}[name]
    model = case.model().to(device, dtype)
    return model, case.make(model)


def gradients(model, step):
    parameter = next(model.parameters())
    loss = loss_of(model, batch(step, parameter.dtype).to(parameter.device))
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss = gradients(model, step)
        optimizer.step()
        observe(optimizer, loss)


@every_case
def test_follows_the_cpu(name):
    """Up to the first refresh after the start: bases may be another basis of the same subspace."""
    host, on_host = build(name, "cpu", torch.float64)
    device, on_device = build(name, "cuda", torch.float64)
    train(host, on_host, range(3))
    train(device, on_device, range(3))
    # Eight bits round where two numbers that differ in the last digit may part.
    near = 1e-3 if "8bit" in name else 1e-8
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=near, atol=near)


@every_case
def test_learns_through_refreshes(name):
    model, optimizer = build(name, "cuda")
    before = loss_of(model, batch(0).cuda()).item()
    train(model, optimizer, [0] * 12)
    assert loss_of(model, batch(0).cuda()).item() < before
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.numel() > 1:
                assert value.device == parameter.device, key


# LoRA-Pro decomposes the factors' Gram matrices every step, and torch's eigh waits for its result.
WAITING = {"lora_pro", "lora_pro_efficient", "lora_pro_sgd"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in WAITING])
def test_a_step_between_refreshes_waits_for_nothing(name, no_host_sync):
    model, optimizer = build(name, "cuda")
    train(model, optimizer, range(4))  # a refresh is the fourth
    optimizer.zero_grad()
    loss = gradients(model, 4)
    with no_host_sync():
        optimizer.step()
        observe(optimizer, loss)


@every_case
def test_stops_and_goes_on_bit_equal(name):
    whole, straight = build(name, "cuda")
    train(whole, straight, range(8))
    first, before = build(name, "cuda")
    train(first, before, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    second, after = build(name, "cuda")
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    train(second, after, range(4, 8))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["galore", "galore_subspace", "fira", "galore_8bit"])
def test_bfloat16_weights(name):
    model, optimizer = build(name, "cuda", torch.bfloat16)
    x = batch(0, torch.bfloat16).cuda()
    before = loss_of(model, x).item()
    train(model, optimizer, [0] * 20)
    assert loss_of(model, x).item() < before


@pytest.mark.parametrize("name", ["galore", "fira", "frugal_svd"])
def test_by_layer_is_the_same_step(name):
    model, optimizer = build(name, "cuda")
    train(model, optimizer, range(5))
    layered, other = build(name, "cuda")
    step_per_layer(other)
    for step in range(5):
        gradients(layered, step)
    assert all(parameter.grad is None for parameter in layered.parameters())
    for a, b in zip(model.parameters(), layered.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_not_a_number_is_skipped_without_waiting(no_host_sync):
    model, optimizer = build("galore_skip", "cuda")
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    gradients(model, 2)
    model[0].weight.grad[0, 0] = float("nan")
    before = model[0].weight.detach().clone()
    with no_host_sync():
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    train(model, optimizer, range(3, 6))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_with_a_gradient_scaler():
    model, optimizer = build("galore", "cuda")
    scaler = torch.amp.GradScaler("cuda")
    x = batch(0).cuda()
    before = loss_of(model, x).item()
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss_of(model, x).item() < before
