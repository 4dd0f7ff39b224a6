"""FRUGAL against the official code's stored trajectories."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.optim import FrugalAdamW

FOLDER = Path(__file__).parents[1] / "reference" / "frugal"


def load(case):
    name, _, prefix = case.partition(":")
    with np.load(FOLDER / f"{name}.npz") as arrays:
        found = {k: arrays[k] for k in arrays.files}
    if not prefix:
        return found
    cut = f"{prefix}__"
    return {k.removeprefix(cut): v for k, v in found.items() if k.startswith(cut)}


def divided(param, **options):
    return [{"params": [param], "is_proj_params": True, **options}]


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def replay(d, own=False, momentum=0.9):
    turn = iter(range(len(d["refresh_steps"])))
    key = "P" if "P" in d else "indices"
    W = nn.Parameter(torch.tensor(d["W0"], dtype=torch.float64))
    b = nn.Parameter(torch.tensor(d["b0"], dtype=torch.float64)) if "b0" in d else None
    rule = str(d["inactive_update_rule"])
    kind = str(d["optimizer"])
    options = {
        "subspace": str(d["proj_type"] if "proj_type" in d else d["coord_choice"]),
        "density": float(d["density"]),
        "update_gap": int(d["update_gap"]),
        "state_free": None if rule == "no" else rule,
        "state_free_lr_scale": float(d["inactive_lr_scale"]),
        "proj_params_lr_scale": float(d["proj_params_lr_scale"]),
        "reset": bool(d["reset_statistics"]),
        "stateful": "lion" if "Lion" in kind else "adamw",
        "weight_decay": float(d["weight_decay"]),
        "betas": tuple(map(float, d["betas"])),
        "eps": float(d.get("eps", 1e-8)),
    }
    groups = divided(W)
    if b is not None:
        groups.append({"params": [b]})
    hook = None if own else (lambda w, g, side: torch.tensor(d[key][next(turn)]))
    optimizer = FrugalAdamW(groups, projection_hook=hook, **options)
    far = 0.0
    for t in range(len(d["G"])):
        for group in optimizer.param_groups:
            group["lr"] = float(d["lr"][t])
        W.grad = torch.tensor(d["G"][t], dtype=torch.float64)
        if b is not None:
            b.grad = torch.tensor(d["Gb"][t], dtype=torch.float64)
        optimizer.step()
        far = max(far, np.abs(W.detach().numpy() - d["W"][t]).max())
        if b is not None:
            far = max(far, np.abs(b.detach().numpy() - d["b"][t]).max())
    return far, optimizer.state[W]


@pytest.mark.parametrize(
    "case",
    [
        "adamw_svd_tall",
        "adamw_random_square_sgd",
        "adamw_columns",
        "adamw_coords_small:rows",
        "adamw_coords_small:randk",
        "lion_small:svd",
        "lion_small:columns",
    ],
)
def test_official_trajectories_with_stored_draws(case):
    d = load(case)
    far, state = replay(d)
    assert far < 1e-12
    for key in ("exp_avg", "exp_avg_sq"):
        if f"{key}_final" in d:
            np.testing.assert_allclose(state[key], d[f"{key}_final"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "case", ["adamw_svd_wide_galore_emulation", "adamw_coords_small:columns_noreset"]
)
def test_keeping_moments_follows_the_official_code_and_warns(case):
    with pytest.warns(UserWarning, match="reset=False"):
        far, _ = replay(load(case))
    assert far < 1e-12


@pytest.mark.parametrize("case", ["adamw_svd_tall", "lion_small:svd"])
def test_singular_vectors_need_no_signs_when_moments_start_over(case):
    far, _ = replay(load(case), own=True)
    assert far < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        "adamw_blocks:ascending",
        "adamw_blocks:descending",
        "adamw_blocks:mirror",
        "adamw_blocks:random",
        "adamw_block_density0",
    ],
)
def test_official_blocks(case):
    d = load(case)
    params = [
        nn.Parameter(torch.tensor(d[f"W0_{i}"], dtype=torch.float64))
        for i in range(d["active"].shape[1])
    ]
    places = {id(p): i for i, p in enumerate(params)}
    now = [0]

    def stored(weight, grad, side):
        assert side == "block"
        return bool(d["active"][now[0]][places[id(weight)]])

    optimizer = FrugalAdamW(
        [{"params": params, "is_proj_params": True}],
        lr=float(d["lr"]),
        betas=tuple(map(float, d["betas"])),
        eps=float(d["eps"]),
        weight_decay=float(d["weight_decay"]),
        density=float(d["density"]),
        update_gap=int(d["update_gap"]),
        block_order=str(d["block_order"]),
        projection_hook=stored if case.endswith("random") else None,
    )
    for t in range(len(d["G_0"])):
        now[0] = t
        grads = [torch.tensor(d[f"G_{i}"][t], dtype=torch.float64) for i in range(len(params))]
        step(optimizer, params, grads)
        for i, param in enumerate(params):
            assert np.abs(param.detach().numpy() - d[f"W_{i}"][t]).max() < 1e-12
            assert ("exp_avg" in optimizer.state[param]) == bool(d["active"][t][i])
