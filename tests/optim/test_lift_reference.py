"""LIFT against stored masks and trajectories of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.optim.lift import LIFT
from fullrank.optim.mask import principal_mask, principal_part

FOLDER = Path(__file__).parents[1] / "reference" / "lift"


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("i", range(4))
def test_masks(i, dtype):
    d = load("masks")
    W = torch.tensor(d[f"W_{i}"], dtype=dtype)
    r, R = int(d[f"rank_{i}"]), int(d[f"lra_rank_{i}"])
    mask = principal_mask(W, r, R)
    np.testing.assert_array_equal(mask, d[f"mask_{i}"])
    assert mask.sum() == min(r * sum(W.shape), W.numel())
    error = np.abs(principal_part(W, R).numpy() - d[f"W_lowrank_{i}"]).max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("name", ["adam_24x32", "adam_32x20"])
def test_trajectories(name):
    d = load(name)
    W, b = (torch.nn.Parameter(torch.tensor(d[k])) for k in ("W0", "b0"))
    group = {"params": [W], "rank": int(d["selected_rank"]), "lra_rank": int(d["lra_rank"])}
    group["update_interval"] = int(d["update_interval"])
    optimizer = LIFT(
        [group, {"params": [b]}],
        lr=float(d["lr"]),
        betas=tuple(map(float, d["betas"])),
        eps=float(d["eps"]),
    )
    masks = dict(zip(d["mask_set_after_step"].tolist(), d["masks"], strict=True))
    expected = None
    for t in range(len(d["G"])):
        expected = masks.get(t, expected)
        before = W.detach().clone()
        W.grad, b.grad = (torch.tensor(d[k][t], dtype=torch.float64) for k in ("G", "gb"))
        optimizer.step()
        ((_, mask),) = optimizer.masks()
        np.testing.assert_array_equal(mask, expected)
        assert mask.sum() == int(d["k"])
        assert torch.equal(W[~mask], before[~mask])
        assert np.abs(W.detach().numpy() - d["W"][t]).max() < 1e-14
        assert np.abs(b.detach().numpy() - d["b"][t]).max() < 1e-14
    for name in ("exp_avg", "exp_avg_sq"):
        dense = torch.zeros_like(W)
        dense[mask] = optimizer.state[W][name]
        assert np.abs(dense.numpy() - d[f"{name}_final"]).max() < 1e-15
