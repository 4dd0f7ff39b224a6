"""LoRA-Pro against stored numbers of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.optim.lora_adjust import adjust_lora_grads
from fullrank.optim.lora_pro import LoRAPro

FOLDER = Path(__file__).parents[1] / "reference" / "lora-pro"
TRAJECTORIES = {
    "sgd_24x40": {"optimizer": "sgd"},
    "adam_efficient_24x40": {"mode": "efficient"},
    "adam_efficient_zeroB_24x40": {"mode": "efficient"},
    "adam_full_24x40": {"decay_base": True},
    "adam_full_zeroB_24x40": {},
}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


def relative(found, expected):
    return np.abs(found.detach().numpy() - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ["static_24x40", "static_40x24_rs"])
@pytest.mark.parametrize(
    ("x", "suffix"),
    [("zero", "zero"), ("sylvester", "sylvester"), ("symmetry", "symmetry_derived")],
)
def test_adjusted_gradients(name, x, suffix):
    d = load(name)
    A, B, g_A, g_B = (torch.tensor(d[k]) for k in ("A", "B", "g_A", "g_B"))
    s = float(d["scaling"])
    dA, dB = adjust_lora_grads(A, B, g_A, g_B, s, x)
    assert relative(dA, d[f"A_adj_{suffix}"]) < 1e-12
    assert relative(dB, d[f"B_adj_{suffix}"]) < 1e-12
    assert relative(s * (B @ dA + dB @ A), d["G_equiv"]) < 1e-12


def test_symmetry_is_not_the_official_slip():
    d = load("static_24x40")
    A, B, g_A, g_B = (torch.tensor(d[k]) for k in ("A", "B", "g_A", "g_B"))
    dA, _ = adjust_lora_grads(A, B, g_A, g_B, float(d["scaling"]), "symmetry")
    assert relative(dA, d["A_adj_symmetry_upstream"]) > 1e-3


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories(name):
    d = load(name)
    A, B = (torch.nn.Parameter(torch.tensor(d[k])) for k in ("A0", "B0"))
    s = float(d["scaling"])
    base = torch.tensor(d["W0"]) if "W0" in d else None
    optimizer = LoRAPro(
        [(A, B, s, base)],
        lr=float(d["lr"]),
        betas=tuple(map(float, d["betas"])),
        eps=float(d["eps"]),
        weight_decay=float(d["weight_decay"]),
        **TRAJECTORIES[name],
    )
    for t, G in enumerate(torch.tensor(d["G"], dtype=torch.float64)):
        A.grad, B.grad = s * B.detach().T @ G, s * G @ A.detach().T
        optimizer.step()
        assert np.abs(A.detach().numpy() - d["A"][t]).max() < 1e-12 * np.abs(d["A"]).max()
        assert np.abs(B.detach().numpy() - d["B"][t]).max() < 1e-12 * np.abs(d["B"]).max()
        if base is not None:
            assert relative(base, d["W_base"][t]) < 1e-14
    if "exp_avg_final" in d:
        assert relative(optimizer.state[A]["exp_avg"], d["exp_avg_final"]) < 1e-12
        assert relative(optimizer.state[A]["exp_avg_sq"], d["exp_avg_sq_final"]) < 1e-12
