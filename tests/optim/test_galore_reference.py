"""GaLore against the official code's stored trajectories."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.optim import GaLoreAdafactor, GaLoreAdamW
from fullrank.optim.quantize import Blockwise, dynamic_map

FOLDER = Path(__file__).parents[1] / "reference" / "galore"
ADAMW = ["adamw_square", "adamw_tall", "adamw_wide"]
ADAFACTOR = ["adafactor_beta1_none", "adafactor_beta1_0p9"]
PROJ_TYPES = [
    "std_16x16",
    "reverse_std_18x12",
    "reverse_std_12x18",
    "left_18x12",
    "right_12x18",
    "full_18x12",
]


def load(name, case=""):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        prefix = f"{case}__" if case else ""
        return {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}


def stored_bases(d):
    """A hook that gives the stored bases in turn, and checks the side."""
    turn = iter(range(len(d["refresh_steps"])))

    def hook(weight, grad, side):
        assert side == str(d["side"])
        k = next(turn)
        if side == "full":
            return torch.tensor(d["P_left"][k]), torch.tensor(d["P_right"][k])
        return torch.tensor(d["P"][k])

    return hook


def replay(make, d, hook=None, steps=None, dtype=torch.float64):
    """Largest distance of the weights from the stored ones at each step, and the optimizer."""
    W = torch.nn.Parameter(torch.tensor(d["W0"], dtype=dtype))
    group = {"params": [W], "rank": int(d["rank"])}
    group.update(update_proj_gap=int(d["update_proj_gap"]), scale=float(d["scale"]))
    group["proj_type"] = str(d.get("proj_type", "std"))
    groups, b = [group], None
    if "b0" in d:
        b = torch.nn.Parameter(torch.tensor(d["b0"], dtype=dtype))
        groups.append({"params": [b]})
    optimizer = make(groups, weight_decay=float(d["weight_decay"]), projection_hook=hook)
    rates = np.broadcast_to(d["lr"], len(d["G"]))
    errors = []
    for t in range(steps or len(d["G"])):
        for g in optimizer.param_groups:
            g["lr"] = float(rates[t])
        W.grad = torch.tensor(d["G"][t], dtype=dtype)
        if b is not None:
            b.grad = torch.tensor(d["Gb"][t], dtype=dtype)
        optimizer.step()
        errors.append(np.abs(W.detach().numpy() - d["W"][t]).max())
        if b is not None:
            errors[-1] = max(errors[-1], np.abs(b.detach().numpy() - d["b"][t]).max())
    return np.array(errors), optimizer.state[W]


def adamw(d, **options):
    return lambda groups, **kw: GaLoreAdamW(
        groups, betas=tuple(map(float, d["betas"])), eps=float(d["eps"]), **kw, **options
    )


def adafactor(d):
    return lambda groups, **kw: GaLoreAdafactor(
        groups,
        lr=1.0,
        eps=tuple(map(float, d["eps"])),
        clip_threshold=float(d["clip_threshold"]),
        decay_rate=float(d["decay_rate"]),
        beta1=None if d["beta1"] < 0 else float(d["beta1"]),
        scale_parameter=False,
        relative_step=False,
        **kw,
    )


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_with_stored_bases(name):
    d = load(name)
    errors, state = replay(adamw(d), d, stored_bases(d))
    assert errors.max() < 1e-12
    for key in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(state[key], d[f"{key}_final"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", PROJ_TYPES)
def test_projection_types_with_stored_bases(case):
    d = load("adamw_proj_types", case)
    errors, state = replay(adamw(d), d, stored_bases(d))
    assert errors.max() < 1e-12
    assert state["exp_avg"].shape == d["exp_avg_final"].shape


@pytest.mark.parametrize("name", ADAFACTOR)
def test_adafactor_with_stored_bases(name):
    d = load(name)
    errors, state = replay(adafactor(d), d, stored_bases(d))
    assert errors.max() < 1e-12
    for key in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"):
        if f"{key}_final" in d:
            np.testing.assert_allclose(state[key], d[f"{key}_final"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
@pytest.mark.parametrize("name", ADAMW + ADAFACTOR)
def test_first_period_with_own_bases(name, refresh):
    d = load(name)
    make = adamw(d) if name in ADAMW else adafactor(d)
    errors, _ = replay(
        lambda groups, **kw: make([{**g, "refresh": refresh} for g in groups], **kw),
        d,
        steps=int(d["update_proj_gap"]),
    )
    assert errors.max() < 1e-5


@pytest.mark.parametrize("case", PROJ_TYPES)
def test_first_period_of_projection_types_with_own_bases(case):
    d = load("adamw_proj_types", case)
    errors, _ = replay(adamw(d), d, steps=int(d["update_proj_gap"]))
    # On both sides at once, R is diagonal in exact singular bases: what Adam normalises beside
    # the diagonal in the stored run is the rounding of its float32 SVD.
    assert errors.max() < (2e-5 if case.startswith("full") else 1e-5)


def test_8_bit_trajectory():
    d = load("adamw8bit_wide")
    make = adamw(d, state_bits=8, min_8bit_size=int(d["min_8bit_size"]))
    errors, state = replay(make, d, stored_bases({**d, "side": "left"}), dtype=torch.float32)
    assert errors.max() < 2e-3
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    # The codes themselves are not compared: the stored ones are only approximately nearest.
    assert state["exp_avg_absmax"].shape == d["absmax1"][-1].shape


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_block_quantiser(kind):
    d = load("quantize_blockwise")
    code = Blockwise(kind == "signed")
    np.testing.assert_array_equal(dynamic_map(kind == "signed"), d[f"qmap_{kind}"])
    x = torch.tensor(d[f"input_{kind}"])
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(len(d[f"absmax_{kind}"]))
    code.encode(x, codes, absmax)
    np.testing.assert_array_equal(absmax, d[f"absmax_{kind}"])
    whole = d[f"codes_{kind}_torchao"]
    np.testing.assert_array_equal(codes.flatten()[: len(whole)], whole)
    decoded = code.decode(torch.tensor(d[f"codes_{kind}"]), absmax)
    np.testing.assert_array_equal(decoded, d[f"dequant_{kind}"])
