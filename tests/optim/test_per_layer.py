"""Steps in the backward pass: the trajectory of ordinary steps, gradients freed, refusals."""

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import FiraAdamW, FrugalAdamW, GaLoreAdamW, GradNormLoRPAdamW, step_per_layer

KINDS = {
    "galore": lambda groups: GaLoreAdamW(groups, lr=0.01, update_proj_gap=2),
    "fira": lambda groups: FiraAdamW(groups, lr=0.01, update_proj_gap=2),
    "gradnorm": lambda groups: GradNormLoRPAdamW(groups, lr=0.01, update_proj_gap=2),
    "block": lambda groups: FrugalAdamW(groups, lr=0.01, update_gap=2, density=0.5),
    "columns": lambda groups: FrugalAdamW(groups, lr=0.01, update_gap=2, subspace="columns"),
}


def build(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    frugal = kind in ("block", "columns")
    own = {"is_proj_params": True} if frugal else {"rank": 3}
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return model, KINDS[kind]([{"params": weights, **own}, {"params": others}])


def train(model, optimizer, steps, accumulate=1):
    for step in range(steps * accumulate):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        (model(x).square().mean() / accumulate).backward()
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_ordinary_steps(kind, accumulate):
    model, optimizer = build(kind)
    train(model, optimizer, 5, accumulate)
    twin, other = build(kind)
    handle = step_per_layer(other, accumulation_steps=accumulate)
    train(twin, other, 5, accumulate)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert b.grad is None
    # Hooks taken off, the two go on alike.
    handle.remove()
    train(model, optimizer, 2)
    train(twin, other, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_never_there_together():
    model, optimizer = build("galore")
    most = []

    def count(_):
        most.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    with step_per_layer(optimizer):
        train(model, optimizer, 2)
    assert max(most) == 1


def test_schedulers_see_every_step():
    model, optimizer = build("galore")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    with step_per_layer(optimizer):
        train(model, optimizer, 1)
        schedule.step()
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1)
    for old, param in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, param)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_are_cut_short_or_leave_parameters_out(kind):
    """Passes as (whether the first layer is used, whether a step follows)."""
    passes = [(1, 0), (0, 1), (0, 0), (1, 1), (1, 1), (1, 0), (1, 1)]
    found = []
    for per_layer in (False, True):
        model, optimizer = build(kind)
        if per_layer:
            step_per_layer(optimizer, accumulation_steps=2)
        for i, (all_, steps) in enumerate(passes):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            out = model(x) if all_ else model[2](torch.cat([x, x[:, :4]], 1))
            out.square().mean().backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
        found.append((list(model.parameters()), optimizer.state.values()))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b)
    assert all(state["step"] == 4 for state in found[1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "limiter"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"accumulation_steps": 2.5}, "accumulation_steps=2.5"),
    ],
)
def test_what_it_refuses(options, message):
    _, optimizer = build("galore")
    with pytest.raises(InputError, match=message):
        step_per_layer(optimizer, **options)
    with pytest.raises(InputError, match="without the others"):
        step_per_layer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))


def test_passes_that_were_thrown_away_do_not_count():
    model, optimizer = build("galore")
    train(model, optimizer, 4, 2)
    twin, other = build("galore")
    with step_per_layer(other, accumulation_steps=2):
        train(twin, other, 2, 2)
        twin(torch.ones(4, 8)).sum().backward()
        other.zero_grad()
        for step in range(4, 8):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            (twin(x).square().mean() / 2).backward()
            if step % 2:
                other.step()
                other.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
