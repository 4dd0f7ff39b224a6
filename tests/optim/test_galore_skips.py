"""GaLore with gradients that are not finite: skipped, raised, or not looked at."""

import copy
import math

import pytest
import torch
from stepping import parameter, random_grads, run
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import GaLoreAdafactor, GaLoreAdamW


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdafactor])
def test_bad_steps_are_skipped(make, at, bad):
    options = {"rank": 2, "update_proj_gap": 2, "weight_decay": 0.1}
    if make is GaLoreAdafactor:
        options |= {"lr": 0.01, "relative_step": False, "beta1": 0.9}
    params = [parameter(8, 12), parameter(5, 5)]
    optimizer = make(params, **options)
    grads = random_grads(params, 5)
    run(optimizer, params, grads[:at])
    before = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    weights = [p.detach().clone() for p in params]
    grads[at][1][2, 3] = bad
    run(optimizer, params, [grads[at]])
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    for param, old in zip(params, before, strict=True):
        for name, value in old.items():
            if name not in ("step", "unseen"):
                assert torch.equal(optimizer.state[param][name], value), name
    assert [float(optimizer.state[p]["unseen"]) for p in params] == [1.0, 1.0]
    run(optimizer, params, grads[at + 1 :])
    assert all(torch.isfinite(p).all() for p in params)


def test_raise_names_the_parameter_and_changes_nothing():
    model = nn.Linear(6, 5)
    optimizer = GaLoreAdamW(model.named_parameters(), nonfinite="raise")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.bias.grad[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'bias' of shape \(5,\)"):
        optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(float(optimizer.state[p]["step"]) == 0 for p in model.parameters())


def test_ignored_means_not_looked_at():
    W = parameter(6)
    optimizer = GaLoreAdamW([W], nonfinite="ignore")
    run(optimizer, [W], [[torch.full((6,), math.nan)]])
    assert torch.isnan(W).all()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("make", ["adamw", "adamw8", "adafactor", "adafactor_relative"])
def test_skips_known_to_the_device_only(make, moments, monkeypatch):
    options = {"update_proj_gap": 3, "weight_decay": 0.1, "moments": moments}
    adafactor = {"relative_step": False, "lr": 0.01, "beta1": 0.9}
    kind, extra = {
        "adamw": (GaLoreAdamW, {}),
        "adamw8": (GaLoreAdamW, {"state_bits": 8, "min_8bit_size": 1}),
        "adafactor": (GaLoreAdafactor, adafactor),
        "adafactor_relative": (GaLoreAdafactor, {"beta1": 0.9, "warmup_init": True}),
    }[make]
    dtype = torch.float32 if make == "adamw8" else torch.float64
    params = [parameter(8, 12, dtype=dtype), parameter(7, dtype=dtype)]
    others = copy.deepcopy(params)
    grads = random_grads(params, 9)
    for at in (1, 4, 5):
        grads[at][1][2] = math.nan
    # A refresh reads what the gradients are worth anyway, and may find a step to skip.
    grads[6][0][1, 1] = math.inf

    def optimizer(params):
        return kind([{"params": params[:1], "rank": 2}, {"params": params[1:]}], **options, **extra)

    first = optimizer(params)
    run(first, params, grads)
    monkeypatch.undo()
    second = optimizer(others)
    run(second, others, grads)
    # A rounding may flip a code of 8 bits.
    close = 2e-4 if make == "adamw8" else 1e-8
    torch.testing.assert_close(
        [p.data for p in params], [p.data for p in others], rtol=0, atol=close
    )
    for p, q in zip(params, others, strict=True):
        assert first.state[p]["unseen"] == second.state[q]["unseen"]
