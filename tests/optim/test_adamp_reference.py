"""AdamP and SGDP against trajectories of the official implementation, at fixed gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.optim.adamp import SGDP, AdamP

FOLDER = Path(__file__).parents[1] / "reference" / "adamp"
CASES = {
    "adamp": (AdamP, {}),
    "adamp_nesterov_conv": (AdamP, {}),
    "sgdp_nesterov": (SGDP, {}),
    "sgdp_momentum_clean": (SGDP, {}),
    "sgdp_momentum_upstream_aliased": (SGDP, {"project_buffer": True}),
    "sgdp_plain": (SGDP, {}),
}
STATE = ("exp_avg", "exp_avg_sq", "momentum")


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def hyperparameters(d):
    values = {key[3:]: value for key, value in d.items() if key.startswith("hp_")}
    return {k: tuple(v.tolist()) if v.ndim else v.item() for k, v in values.items()}


def distance(value, expected):
    return np.abs(value.detach().numpy() - expected).max() / max(np.abs(expected).max(), 1e-300)


@pytest.fixture(params=["host", "device"])
def tolerance(request):
    """Branches read on the host, or masks as on an accelerator; how near the results must be."""
    if request.param == "host":
        return 1e-13
    request.getfixturevalue("on_device")
    return 1e-7  # averages are weighted with float32 scalars there


@pytest.mark.parametrize("name", CASES)
def test_trajectories_and_branches(name, tolerance):
    d = load(name)
    make, options = CASES[name]
    params = []
    while f"W0_{len(params)}" in d:
        params.append(torch.nn.Parameter(torch.tensor(d[f"W0_{len(params)}"])))
    optimizer = make(params, **hyperparameters(d), **options)
    for t in range(len(d["G_0"])):
        for i, param in enumerate(params):
            param.grad = torch.tensor(d[f"G_{i}"][t])
        optimizer.step()
        for i, param in enumerate(params):
            assert distance(param, d[f"W_{i}"][t]) < tolerance
            assert (optimizer.branch(param) or 0) == d[f"branch_{i}"][t]
    for i, param in enumerate(params):
        for key in STATE:
            if f"{key}_{i}" in d:
                assert distance(optimizer.state[param][key], d[f"{key}_{i}"]) < tolerance


def test_every_branch_is_covered():
    seen = {int(b) for name in CASES for k, v in load(name).items() if "branch" in k for b in v}
    assert seen == {0, 1, 2}
