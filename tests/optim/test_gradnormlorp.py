"""GradNormLoRP: stored trajectories, the reparametrisation's identities, degenerate rows."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import GradNormLoRPAdamW, state_bytes, weight_norm_gradients

FOLDER = Path(__file__).parents[1] / "reference" / "gradnormlorp"
UPSTREAM = ["upstream_tall", "upstream_wide_wd", "upstream_norank", "upstream_full"]
DERIVED = ["derived_consistent_tall", "derived_consistent_wide_twosided"]


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


def replay(d, mode, own_bases=False, steps=None):
    turn = iter(range(len(d["refresh_steps"])))

    def hook(weight, grad, side):
        k = next(turn)
        if side == "full":
            return torch.tensor(d["P_left"][k]), torch.tensor(d["P_right"][k])
        return torch.tensor(d["P"][k])

    W = nn.Parameter(torch.tensor(d["W0"], dtype=torch.float64))
    group = {"params": [W], "rank": int(d["rank"]) or None, "scale": float(d["scale"])}
    group["update_proj_gap"] = int(d["update_proj_gap"])
    group["proj_type"] = "full" if str(d.get("side")) == "full" else "std"
    groups, b = [group], None
    if "b0" in d:
        b = nn.Parameter(torch.tensor(d["b0"], dtype=torch.float64))
        groups.append({"params": [b]})
    optimizer = GradNormLoRPAdamW(
        groups,
        betas=tuple(map(float, d["betas"])),
        eps=float(d["eps"]),
        weight_decay=float(d["weight_decay"]),
        mode=mode,
        projection_hook=None if own_bases else hook,
    )
    rates = np.broadcast_to(d["lr"], len(d["G"]))
    far = 0.0
    for t in range(steps or len(d["G"])):
        for each in optimizer.param_groups:
            each["lr"] = float(rates[t])
        W.grad = torch.tensor(d["G"][t], dtype=torch.float64)
        if b is not None:
            b.grad = torch.tensor(d["Gb"][t], dtype=torch.float64)
        optimizer.step()
        far = max(far, np.abs(W.detach().numpy() - d["W"][t]).max())
        g = optimizer.state[W]["magnitude"].squeeze(1).numpy()
        far = max(far, np.abs(g - d["g"][t]).max())
        if b is not None:
            far = max(far, np.abs(b.detach().numpy() - d["b"][t]).max())
    return far, W, optimizer.state[W]


@pytest.mark.parametrize("name", UPSTREAM)
def test_official_trajectories(name):
    d = load(name)
    far, _, state = replay(d, "official")
    assert far < 1e-12
    np.testing.assert_allclose(state["direction"], d["v_final"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(state["exp_avg"], d["exp_avg_v_final"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(state["magnitude_exp_avg"], d["exp_avg_g_final"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", DERIVED)
def test_consistent_trajectories(name):
    d = load(name)
    far, W, state = replay(d, "consistent")
    assert far < 1e-10
    v = W.detach() * (state["direction_norm"] / state["magnitude"])
    np.testing.assert_allclose(v, d["v_final"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DERIVED)
def test_first_period_with_own_bases(name):
    d = load(name)
    far, _, _ = replay(d, "consistent", own_bases=True, steps=int(d["update_proj_gap"]))
    # Both sides at once leave a diagonal R, and Adam normalises the rounding beside it.
    assert far < (1e-4 if "twosided" in name else 1e-9)


def test_gradients_equal_autograds():
    d = {k: torch.tensor(v) for k, v in load("derived_weightnorm_grad").items()}
    norm = d["v"].norm(dim=1, keepdim=True)
    grad_v, grad_g = weight_norm_gradients(d["W"], d["grad_W"], d["g"], norm)
    torch.testing.assert_close(grad_v, d["grad_v"], rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_g, d["grad_g"], rtol=0, atol=1e-12)
    assert (grad_v * d["v"]).sum(1).abs().max() < 1e-12


def by_the_book(W, grads, P, side, scale, lr, magnitude_lr, decay, eps=1e-6):
    """The method with v, autograd and all arrays formed; the basis stays as it is."""
    v, g = W.clone(), W.norm(dim=1, keepdim=True)
    moments = {"v": [0.0, 0.0], "g": [0.0, 0.0]}

    def direction(name, x):
        m = moments[name]
        m[0] = 0.9 * m[0] + 0.1 * x
        m[1] = 0.999 * m[1] + 0.001 * x * x
        return m[0] / (m[1].sqrt() + eps)

    for t, G in enumerate(grads, 1):
        v.requires_grad_(True)
        g.requires_grad_(True)
        loss = (g * v / v.norm(dim=1, keepdim=True) * G).sum()
        grad_v, grad_g = torch.autograd.grad(loss, (v, g))
        v, g = v.detach(), g.detach()
        right = side == "right"
        N = direction("v", grad_v @ P.T if right else P.T @ grad_v)
        s = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        v = v - lr * s * scale * (N @ P if right else P @ N)
        g = (g - magnitude_lr * s * direction("g", grad_g)) * (1 - magnitude_lr * decay)
    return g * v / v.norm(dim=1, keepdim=True), g


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_equals_autograd_through_the_normalisation(shape, proj_type):
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = W.detach().clone()
    pointer = W.data_ptr()
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(7)]
    optimizer = GradNormLoRPAdamW(
        [W], lr=0.05, rank=4, proj_type=proj_type, magnitude_lr=0.2, weight_decay=0.1
    )
    for G in grads:
        W.grad = G
        optimizer.step()
        state = optimizer.state[W]
        torch.testing.assert_close(W.detach().norm(dim=1, keepdim=True), state["magnitude"].abs())
    side = "right" if "basis_right" in state else "left"
    P = state[f"basis_{side}"]
    expected, g = by_the_book(start, grads, P, side, 0.25, 0.05, 0.2, 0.1)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["magnitude"], g, rtol=1e-10, atol=1e-12)
    assert W.data_ptr() == pointer


def test_magnitudes_may_change_sign():
    W = nn.Parameter(torch.randn(6, 8, dtype=torch.float64) * 0.05)
    start = W.detach().clone()
    grads = [start.sign() + 0.1 * torch.randn(6, 8, dtype=torch.float64) for _ in range(12)]
    optimizer = GradNormLoRPAdamW([W], lr=0.05, rank=3)
    for G in grads:
        W.grad = G
        optimizer.step()
    state = optimizer.state[W]
    assert bool((state["magnitude"] < 0).any())
    P = state["basis_left"]
    expected, g = by_the_book(start, grads, P, "left", 0.25, 0.05, 0.05, 0.0)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state["magnitude"], g, rtol=1e-9, atol=1e-11)


def test_at_full_rank_the_subspace_is_everything():
    W = nn.Parameter(torch.randn(10, 6, dtype=torch.float64))
    G = torch.randn(10, 6, dtype=torch.float64)
    norm = W.detach().norm(dim=1, keepdim=True)
    grad_v, _ = weight_norm_gradients(W.detach(), G, norm, norm)
    optimizer = GradNormLoRPAdamW([W], rank=6, scale=1.0)
    W.grad = G
    optimizer.step()
    state = optimizer.state[W]
    torch.testing.assert_close(state["exp_avg"].norm(), 0.1 * grad_v.norm())
    assert state["basis_right"].shape == (6, 6)


@pytest.mark.parametrize("mode", ["consistent", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_finite(mode, dtype):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).to(dtype)
    with torch.no_grad():
        model[0].weight[3] = 0.0
        model[1].weight.zero_()
        model[1].bias.zero_()
    weights = [model[0].weight, model[1].weight]
    groups = [
        {"params": weights, "rank": 3, "mode": mode},
        {"params": [model[0].bias, model[1].bias], "mode": mode},
    ]
    optimizer = GradNormLoRPAdamW(groups, lr=0.02)
    for t in range(5):
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(dtype)
            if t == 0:
                param.grad.zero_()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert bool((model[1].weight.float().norm(dim=1) > 0).all())
    if mode == "consistent":
        lengths = model[1].weight.float().norm(dim=1, keepdim=True)
        stored = optimizer.state[model[1].weight]["magnitude"].abs()
        torch.testing.assert_close(lengths, stored, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_state_bytes_follow_the_formula(shape):
    m, n = shape
    W = nn.Parameter(torch.randn(shape))
    optimizer = GradNormLoRPAdamW([W], rank=4)
    W.grad = torch.randn(shape)
    optimizer.step()
    galore = 4 * (2 * 4 * max(m, n) + 4 * min(m, n))
    assert state_bytes(optimizer) == galore + 4 * 4 * m + 8


def test_convolutions_and_vectors():
    kernel, b = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.zeros(6))
    matrix = nn.Parameter(kernel.detach().reshape(6, 36).clone())
    twin = nn.Parameter(torch.zeros(6))
    G, Gb = torch.randn(6, 4, 3, 3), torch.randn(6)
    for W, v in ((kernel, b), (matrix, twin)):
        optimizer = GradNormLoRPAdamW([{"params": W, "rank": 3}, {"params": v}])
        for _ in range(3):
            W.grad, v.grad = G.reshape(W.shape), Gb
            optimizer.step()
    torch.testing.assert_close(kernel.detach().reshape(6, 36), matrix.detach())
    torch.testing.assert_close(b, twin)


@pytest.mark.parametrize("mode", ["consistent", "official"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype, mode):
    half = nn.Parameter((torch.randn(32, 16) * 0.1).to(dtype))
    full = nn.Parameter(half.detach().float())
    for param in (half, full):
        optimizer = GradNormLoRPAdamW([param], lr=0.02, rank=4, update_proj_gap=3, mode=mode)
        torch.manual_seed(1)
        for _ in range(6):
            param.grad = torch.randn(32, 16).to(dtype).to(param.dtype)
            optimizer.step()
    assert (half.float() - full).norm() < 0.03 * full.norm()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("mode", ["consistent", "official"])
def test_skips_known_to_the_device_only(mode, moments, monkeypatch):
    params = [nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(7))]
    others = copy.deepcopy(params)
    grads = [[torch.randn(8, 12), torch.randn(7)] for _ in range(8)]
    for at in (1, 4):
        grads[at][1][2] = math.nan
    grads[6][0][1, 1] = math.inf

    def run(params):
        groups = [{"params": params[:1], "rank": 2}, {"params": params[1:]}]
        options = {"update_proj_gap": 3, "weight_decay": 0.1, "mode": mode, "moments": moments}
        optimizer = GradNormLoRPAdamW(groups, lr=0.01, **options)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.clone()
            optimizer.step()

    run(params)
    monkeypatch.undo()
    run(others)
    assert all(torch.isfinite(p).all() for p in params)
    torch.testing.assert_close(params, others, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "paper"}, "mode='paper'"),
        ({"magnitude_lr": -1.0}, "magnitude_lr=-1.0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 9}, r"rank=9 is larger than parameter 0 of shape \(6, 8\)"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"proj_type": "both"}, "proj_type='both'"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(InputError, match=message):
        GradNormLoRPAdamW([nn.Parameter(torch.randn(6, 8))], **{"rank": 2, **options})


def test_a_weight_that_is_changed_from_outside_is_taken_as_it_is_then():
    W = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    optimizer = GradNormLoRPAdamW([W], rank=2, lr=0.01)
    for _ in range(3):
        W.grad = torch.randn_like(W)
        optimizer.step()
    loaded = torch.randn_like(W)
    loaded[2] = 0
    with torch.no_grad():
        W.copy_(loaded)
    optimizer.param_groups[0]["lr"] = 0.0
    W.grad = torch.randn_like(W)
    optimizer.step()
    torch.testing.assert_close(W.detach(), loaded, rtol=1e-12, atol=0)


def test_tiny_weights_in_float16_are_not_taken_for_changed_ones():
    torch.manual_seed(0)
    W = nn.Parameter(torch.zeros(24, 16, dtype=torch.float16))
    optimizer = GradNormLoRPAdamW([W], rank=4, lr=1e-4)
    for _ in range(60):
        W.grad = torch.randn(24, 16).half()
        optimizer.step()
    assert W.isfinite().all()
