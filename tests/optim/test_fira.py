"""Fira: the official code's trajectories, the residual's geometry, the limiter, bad input."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import FiraAdamW, FiraRMSprop, GaLoreAdamW, state_bytes

FOLDER = Path(__file__).parents[1] / "reference" / "fira"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


def build(d, dtype=torch.float64, own_bases=False, **options):
    turn = iter(range(len(d["refresh_steps"])))

    def hook(weight, grad, side):
        assert side == str(d["side"])
        return torch.tensor(d["P"][next(turn)])

    W = nn.Parameter(torch.tensor(d["W0"], dtype=dtype))
    keys = {"rank": int, "update_proj_gap": int, "alpha": float, "proj_type": str}
    groups = [{"params": [W], **{key: kind(d[key]) for key, kind in keys.items()}}]
    b = nn.Parameter(torch.tensor(d["b0"], dtype=dtype)) if "b0" in d else None
    if b is not None:
        groups.append({"params": [b]})
    options = {
        "eps": float(d["eps"]),
        "weight_decay": float(d["weight_decay"]),
        "projection_hook": None if own_bases else hook,
        "zero_start": True,
        **options,
    }
    if "beta" in d:
        return W, b, FiraRMSprop(groups, beta=float(d["beta"]), **options)
    return W, b, FiraAdamW(groups, betas=tuple(map(float, d["betas"])), **options)


def replay(d, dtype=torch.float64, steps=None, **options):
    """Largest distances of weight, vector and limiter's norm from the stored ones."""
    W, b, optimizer = build(d, dtype, **options)
    far = np.zeros(3)
    for t in range(steps or len(d["G"])):
        for group in optimizer.param_groups:
            group["lr"] = float(d["lr"][t])
        W.grad = torch.tensor(d["G"][t], dtype=dtype)
        if b is not None:
            b.grad = torch.tensor(d["Gb"][t], dtype=dtype)
        optimizer.step()
        now = [np.abs(W.detach().numpy() - d["W"][t]).max(), 0.0, 0.0]
        if b is not None:
            now[1] = np.abs(b.detach().numpy() - d["b"][t]).max()
        norm = optimizer.state[W]["residual_norm"].item()
        now[2] = abs(norm - d["residual_norm"][t]) / max(1.0, d["residual_norm"][t])
        far = np.maximum(far, now)
    return far, optimizer.state[W]


@pytest.mark.parametrize("name", NAMES)
def test_official_trajectories_with_stored_bases(name):
    d = load(name)
    far, state = replay(d)
    assert far.max() < 1e-12
    for key in ("exp_avg", "exp_avg_sq", "square_avg"):
        if f"{key}_final" in d:
            np.testing.assert_allclose(state[key], d[f"{key}_final"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
@pytest.mark.parametrize("name", [n for n in NAMES if "zero" not in n])
def test_first_period_with_own_bases(name, refresh):
    d = load(name)
    far, _ = replay(d, steps=int(d["update_proj_gap"]), own_bases=True, refresh=refresh)
    assert far.max() < 1e-5


@pytest.mark.parametrize("name", [n for n in NAMES if "zero" not in n])
def test_float32_follows(name):
    far, _ = replay(load(name), dtype=torch.float32)
    assert far.max() < 2e-5


def by_three_products(W, G, P, side, alpha, residual, limiter=1.01, lr=0.01, eps=1e-6):
    """Some steps of the method with every full-size array formed; P stays as it is."""
    W, M, V, rho = W.clone(), 0.0, 0.0, None
    b1, b2 = 0.9, 0.999
    right = side == "right"
    leak = alpha if residual == "official" else 1.0
    for t, g in enumerate(G, 1):
        R = g @ P.T if right else P.T @ g
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        N = M / (V.sqrt() + eps)
        back = (lambda x: x @ P) if right else (lambda x: P @ x)
        S = g - leak * back(R)
        dim = 1 if right else 0
        phi = N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)
        S = phi * S
        nu = S.norm()
        if limiter is not None and rho is not None:
            grown = max(nu / (rho + 1e-8), limiter) / limiter
            S, nu = S / grown, nu / grown
        rho = nu
        s = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        W = W - s * (alpha * back(N) + S)
    return W


@pytest.mark.parametrize("residual", ["official", "orthogonal"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (7, 13)])
def test_two_products_equal_three(shape, proj_type, residual):
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = W.detach().clone()
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
    optimizer = FiraAdamW([W], rank=3, proj_type=proj_type, residual=residual)
    for g in grads:
        W.grad = g
        optimizer.step()
    state = optimizer.state[W]
    side = "right" if "basis_right" in state else "left"
    expected = by_three_products(start, grads, state[f"basis_{side}"], side, 0.25, residual)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-10, atol=1e-12)
    # In float32, to its own precision.
    V = nn.Parameter(start.float())
    optimizer = FiraAdamW([V], rank=3, proj_type=proj_type, residual=residual)
    for g in grads:
        V.grad = g.float()
        optimizer.step()
    assert (V.double() - expected).norm() < 1e-6 * expected.norm()


def test_bases_of_a_caller_need_not_be_orthonormal():
    W = nn.Parameter(torch.randn(12, 9, dtype=torch.float64))
    start, P = W.detach().clone(), torch.randn(3, 9, dtype=torch.float64)
    grads = [torch.randn(12, 9, dtype=torch.float64) for _ in range(5)]
    optimizer = FiraAdamW([W], rank=3, projection_hook=lambda w, g, side: P)
    for i, g in enumerate(grads):
        W.grad = g
        optimizer.step()
        if i == 2:  # what was saved does not say that P was given
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = by_three_products(start, grads, P, "right", 0.25, "official")
    torch.testing.assert_close(W.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_at_alpha_1_the_residual_lies_outside(shape):
    W, V = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
    G = torch.randn(shape, dtype=torch.float64)
    fira, galore = FiraAdamW([W], rank=3, alpha=1.0), GaLoreAdamW([V], rank=3, scale=1.0)
    for param, optimizer in ((W, fira), (V, galore)):
        param.grad = G
        optimizer.step()
    rest = (W - V).detach()
    state = fira.state[W]
    inside = rest @ state["basis_right"].T if shape[0] > shape[1] else state["basis_left"].T @ rest
    assert rest.norm() > 0.1
    assert inside.abs().max() < 1e-12
    assert torch.linalg.matrix_rank(W.detach()) == 12


def test_the_limiter_holds_a_spike():
    W = nn.Parameter(torch.randn(16, 12, dtype=torch.float64))
    optimizer = FiraAdamW([W], rank=3, alpha=1.0)
    norms = []
    for t in range(40):
        W.grad = torch.randn(16, 12, dtype=torch.float64) * (100.0 if t == 20 else 1.0)
        optimizer.step()
        norms.append(optimizer.state[W]["residual_norm"].item())
    assert all(b <= a * 1.01 + 1e-7 for a, b in pairwise(norms))
    free = FiraAdamW([nn.Parameter(torch.randn(16, 12))], rank=3, limiter=None)
    (W,) = free.param_groups[0]["params"]
    W.grad = torch.randn(16, 12)
    free.step()
    assert "residual_norm" not in free.state[W]


def test_a_first_gradient_of_zeros_does_not_freeze_the_residual():
    W = nn.Parameter(torch.randn(16, 12))
    optimizer = FiraAdamW([W], rank=3)
    for t in range(3):
        W.grad = torch.zeros(16, 12) if t == 0 else torch.randn(16, 12)
        optimizer.step()
    assert optimizer.state[W]["residual_norm"] > 1.0


def test_full_rank_updates_and_state_of_galore_plus_one_number():
    W = nn.Parameter(torch.randn(24, 16))
    optimizer = FiraAdamW([W], rank=4)
    start = W.detach().clone()
    W.grad = torch.randn(24, 16)
    optimizer.step()
    assert torch.linalg.matrix_rank(W.detach() - start) == 16
    assert state_bytes(optimizer) == 4 * (2 * 4 * 24 + 4 * 16) + 8 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    half = nn.Parameter((torch.randn(32, 16) * 0.1).to(dtype))
    full = nn.Parameter(half.detach().float())
    for param in (half, full):
        optimizer = FiraAdamW([param], lr=0.05, rank=4, update_proj_gap=3, weight_decay=0.01)
        torch.manual_seed(1)
        for _ in range(6):
            param.grad = torch.randn(32, 16).to(dtype).to(param.dtype)
            optimizer.step()
        assert optimizer.state[param]["residual_norm"].dtype == torch.float32
    assert (half.float() - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("kind", [FiraAdamW, FiraRMSprop])
def test_layouts_convolutions_and_vectors(kind):
    values = [torch.randn(10, 14), torch.randn(9), torch.randn(6, 4, 3, 3)]
    plain = [nn.Parameter(v.clone()) for v in values]
    strided = [
        nn.Parameter(values[0].t().contiguous().t()),
        nn.Parameter(torch.stack([values[1]] * 2, 1)[:, 0]),
        nn.Parameter(values[2].contiguous(memory_format=torch.channels_last)),
    ]
    found = []
    for params in (plain, strided):
        optimizer = kind(
            [{"params": [params[0], params[2]], "rank": 3}, {"params": params[1]}], lr=0.01
        )
        torch.manual_seed(2)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"centered": True}])
def test_rmsprop_without_rank_is_that_of_torch(options):
    W, V = (nn.Parameter(torch.ones(5, 4, dtype=torch.float64)) for _ in range(2))
    with pytest.warns(UserWarning, match="projects nothing"):
        ours = FiraRMSprop([W], lr=0.01, beta=0.9, eps=1e-8, **options)
    theirs = torch.optim.RMSprop([V], lr=0.01, alpha=0.9, eps=1e-8, **options)
    for _ in range(5):
        W.grad = torch.randn(5, 4, dtype=torch.float64)
        V.grad = W.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(W, V)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", [{}, {"state_bits": 8, "min_8bit_size": 1}, {"limiter": None}])
def test_skips_known_to_the_device_only(options, monkeypatch):
    params = [nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(7))]
    others = copy.deepcopy(params)
    grads = [[torch.randn(8, 12), torch.randn(7)] for _ in range(8)]
    for at in (1, 4):
        grads[at][1][2] = math.nan
    grads[6][0][1, 1] = math.inf

    def run(params):
        groups = [{"params": params[:1], "rank": 2}, {"params": params[1:]}]
        optimizer = FiraAdamW(groups, update_proj_gap=3, weight_decay=0.1, **options)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.clone()
            optimizer.step()

    run(params)
    monkeypatch.undo()
    run(others)
    assert all(torch.isfinite(p).all() for p in params)
    close = 2e-3 if options.get("state_bits") else 1e-5
    torch.testing.assert_close(params, others, rtol=0, atol=close)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_type": "full"}, "proj_type='full' leaves no line"),
        ({"limiter": 1.0}, "limiter=1.0"),
        ({"limiter": 0.5}, "limiter=0.5"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 9}, r"rank=9 is larger than parameter 0 of shape \(6, 8\)"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"residual": "paper"}, "residual='paper'"),
        ({"proj_type": "both"}, "proj_type='both'"),
    ],
)
@pytest.mark.parametrize("kind", [FiraAdamW, FiraRMSprop])
def test_bad_arguments_raise(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind([nn.Parameter(torch.randn(6, 8))], **{"rank": 2, **options})
