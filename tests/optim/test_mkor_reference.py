"""MKOR against trajectories of the official implementation, and its update against inverses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.optim import mkor_factors
from fullrank.optim.mkor import MKOR, sm_update

FOLDER = Path(__file__).parents[1] / "reference" / "mkor"
# Relative to the largest element; half-precision factors absolutely.
CASES = {
    "linear_bias_f64": 1e-12,
    "linear_nobias_seq_f64_freq3": 1e-12,
    "linear_bias_adam_f64_freq5": 1e-12,
    "conv_bias_f64": 1e-12,
    "linear_bias_f32_upstream": 1e-5,
    "linear_bias_f16_upstream": 1e-2,
}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def distance(value, expected):
    return np.abs(value.detach().numpy() - expected).max() / np.abs(expected).max()


def layer(d, dtype):
    W = torch.tensor(d["W0"], dtype=dtype)
    bias = "b0" in d
    if W.dim() == 4:
        made = nn.Conv2d(W.shape[1], W.shape[0], W.shape[2], padding=1, bias=bias, dtype=dtype)
    else:
        made = nn.Linear(W.shape[1], W.shape[0], bias=bias, dtype=dtype)
    made.weight.data.copy_(W)
    if bias:
        made.bias.data.copy_(torch.tensor(d["b0"]))
    return made


def optimizer_of(model, d):
    options = {k.removeprefix("inner_"): v.item() for k, v in d.items() if k.startswith("inner_")}
    inner = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[str(d["inner"])]
    return MKOR(
        model,
        inner(model.parameters(), **options),
        inv_freq=int(d["inv_freq"]),
        warmup_steps=int(d["warmup_steps"]),
        clip=float(d["clipping_value"]),
        grad_scale=float(d["grad_scale"]),
        factor_dtype=torch.float16 if d["half_precision"] else torch.float32,
    )


@pytest.mark.parametrize("thin", [False, True], ids=["matrix", "columns"])
@pytest.mark.parametrize("name", CASES)
def test_trajectories(name, thin, monkeypatch):
    if thin:  # sides this small are kept as matrices otherwise
        monkeypatch.setattr(mkor_factors, "_SMALL", 1)
    d, tolerance = load(name), CASES[name]
    dtype = torch.float64 if "f64" in name else torch.float32
    model = layer(d, dtype)
    optimizer = optimizer_of(model, d)
    saved = d["inv_saved_at_steps"].tolist()
    for t, (x, dy) in enumerate(zip(d["X"], d["dY"], strict=True)):
        model.zero_grad()
        model(torch.tensor(x, dtype=dtype)).backward(torch.tensor(dy, dtype=dtype))
        optimizer.step()
        assert distance(model.weight, d["W"][t]) < tolerance
        assert distance(model.weight.grad, d["precond_weight_grad"][t]) < tolerance
        if "b0" in d:
            assert distance(model.bias, d["b"][t]) < tolerance
            assert distance(model.bias.grad, d["precond_bias_grad"][t]) < tolerance
        if t in saved:
            left, right = optimizer.factors("")
            assert distance(left, d["L_inv"][saved.index(t)]) < tolerance
            assert distance(right, d["R_inv"][saved.index(t)]) < tolerance


@pytest.mark.parametrize("i", range(3))
def test_updates_equal_explicit_inverses(i):
    d = load("derived_updates")
    J, v, gamma = (torch.tensor(d[f"{key}_{i}"]) for key in ("J", "v", "gamma"))
    assert distance(sm_update(J, v, "ema", float(gamma)), d[f"exact_sm_{i}"]) < 1e-12
    assert distance(sm_update(J, v), d[f"official_{i}"]) < 1e-12
    assert distance(sm_update(J, v.unsqueeze(1)), d[f"official_{i}"]) < 1e-12
    # The formula as printed is recognised, so that nobody brings it in.
    assert distance(sm_update(J, v, "ema", float(gamma)), d[f"paper_eq_{i}"]) > 1e-2
