"""GaLoreAdamW and GaLoreAdafactor: the equations, shapes, dtypes, layouts, state bytes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import parameter, random_grads, run
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import GaLoreAdafactor, GaLoreAdamW, state_bytes


def by_the_book(W, grads, rank, gap, scale, lr, wd, betas=(0.9, 0.999), eps=1e-6):
    """The method's equations in float64, one matrix, side "std"."""
    W = W.double().clone()
    right = W.shape[0] >= W.shape[1]
    M = V = None
    P = None
    for t, G in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[:rank] if right else U[:, :rank].T
            if P is not None:
                new = new * torch.where((new * P).sum(1) < 0, -1.0, 1.0).unsqueeze(1)
            P = new
        R = G @ P.T if right else P @ G
        M = (0 if M is None else betas[0] * M) + (1 - betas[0]) * R
        V = (0 if V is None else betas[1] * V) + (1 - betas[1]) * R * R
        N = M / (V.sqrt() + eps)
        s = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        W -= s * scale * (N @ P if right else P.T @ N)
        W -= lr * wd * W
    return W


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), rank=st.integers(1, 8), gap=st.integers(1, 6))
def test_equals_the_equations_for_any_shape(m, n, rank, gap):
    torch.manual_seed(m * 100 + n)
    W = parameter(m, n, dtype=torch.float64)
    if rank > min(m, n):
        with pytest.raises(InputError, match=f"rank={rank} is larger than parameter 0"):
            GaLoreAdamW([W], rank=rank)
        return
    grads = random_grads([W], 8)
    start = W.detach().clone()
    optimizer = GaLoreAdamW([W], lr=0.01, rank=rank, update_proj_gap=gap, weight_decay=0.1)
    run(optimizer, [W], grads)
    plain = rank >= min(m, n)
    assert any(k.startswith("basis") for k in optimizer.state[W]) is not plain
    if not plain:
        expected = by_the_book(start, [g[0] for g in grads], rank, gap, 0.25, 0.01, 0.1)
        torch.testing.assert_close(W.detach(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (7, 13)])
def test_updates_stay_in_the_subspace(shape, proj_type):
    W = parameter(*shape, dtype=torch.float64)
    start = W.detach().clone()
    optimizer = GaLoreAdamW([W], rank=3, proj_type=proj_type)
    run(optimizer, [W], random_grads([W], 4))
    update = W.detach() - start
    assert torch.linalg.matrix_rank(update, rtol=1e-9) == 3
    state = optimizer.state[W]
    if "basis_right" in state:
        P = state["basis_right"]
        torch.testing.assert_close(update @ P.T @ P, update)
    if "basis_left" in state:
        P = state["basis_left"]
        torch.testing.assert_close(P @ P.T @ update, update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refresh", ["svd", "subspace"])
def test_half_precision_follows_float32(dtype, refresh):
    half, full = parameter(32, 16, dtype=dtype), parameter(32, 16)
    full.data.copy_(half.data)
    bias, full_bias = parameter(16, dtype=dtype), parameter(16)
    full_bias.data.copy_(bias.data)
    grads = [[g.to(dtype) for g in step] for step in random_grads([half, bias], 5)]
    options = {"lr": 0.1, "weight_decay": 0.01, "update_proj_gap": 3}
    for params in ([half, bias], [full, full_bias]):
        groups = [
            {"params": params[0], "rank": 4, "refresh": refresh, "scale": 1.0},
            {"params": params[1]},
        ]
        optimizer = GaLoreAdamW(groups, **options)
        run(optimizer, params, grads)
        state = optimizer.state[params[0]]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["basis_right"].dtype == params[0].dtype
    assert (half.float() - full).norm() < 0.03 * full.norm()
    assert (bias.float() - full_bias).norm() < 0.03 * full_bias.norm()


@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdafactor])
def test_layout_of_weights_and_gradients_does_not_matter(make):
    options = {"rank": 3, "update_proj_gap": 2, "weight_decay": 0.1}
    if make is GaLoreAdafactor:
        options |= {"lr": 0.01, "relative_step": False}
    values = [torch.randn(10, 14), torch.randn(9), torch.randn(6, 4, 3, 3)]
    plain = [nn.Parameter(v.clone()) for v in values]
    strided = [
        nn.Parameter(values[0].t().contiguous().t()),
        nn.Parameter(torch.stack([values[1]] * 2, 1)[:, 0]),
        nn.Parameter(values[2].contiguous(memory_format=torch.channels_last)),
    ]
    assert not any(p.is_contiguous() for p in strided)
    grads = random_grads(plain, 5)
    with pytest.warns(UserWarning, match="fewer than two dimensions"):
        expected = run(make(plain, **options), plain, grads)
    with pytest.warns(UserWarning, match="fewer than two dimensions"):
        got = run(make(strided, **options), strided, grads)
    odd = [[g.t().contiguous().t() if g.dim() == 2 else g for g in step] for step in grads]
    fresh = [nn.Parameter(v.clone()) for v in values]
    with pytest.warns(UserWarning, match="fewer than two dimensions"):
        strided_grads = run(make(fresh, **options), fresh, odd)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(strided_grads, expected)


def test_convolution_is_read_as_out_by_rest():
    kernel = parameter(8, 4, 3, 3)
    matrix = nn.Parameter(kernel.detach().reshape(8, 36).clone())
    grads = random_grads([kernel], 4)
    options = {"rank": 3, "update_proj_gap": 2}
    run(GaLoreAdamW([kernel], **options), [kernel], grads)
    run(GaLoreAdamW([matrix], **options), [matrix], [[g[0].reshape(8, 36)] for g in grads])
    torch.testing.assert_close(kernel.detach().reshape(8, 36), matrix.detach())


def test_without_rank_equals_adamw():
    # With eps 0 the two conventions for eps are one; decay before or after the step is not.
    params = [parameter(6, 5, dtype=torch.float64), parameter(4, dtype=torch.float64)]
    others = copy.deepcopy(params)
    grads = random_grads(params, 6)
    run(GaLoreAdamW(params, lr=0.01, eps=0.0), params, grads)
    run(torch.optim.AdamW(others, lr=0.01, eps=0.0, weight_decay=0.0), others, grads)
    torch.testing.assert_close([p.data for p in params], [p.data for p in others])


def test_full_rank_of_one_side_rotates_adam():
    W = parameter(6, 4, dtype=torch.float64)
    optimizer = GaLoreAdamW([W], rank=3, scale=1.0)
    run(optimizer, [W], random_grads([W], 1))
    P = optimizer.state[W]["basis_right"]
    torch.testing.assert_close(P @ P.T, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (80, 80)])
def test_state_bytes_follow_the_formula(shape, state_bits):
    m, n = shape
    r = 8
    W = parameter(m, n)
    optimizer = GaLoreAdamW([W], rank=r, state_bits=state_bits, min_8bit_size=1)
    run(optimizer, [W], random_grads([W], 2))
    small = r * max(m, n)
    moments = 8 * small if state_bits == 32 else 2 * (small + 4 * -(-small // 256))
    # `step` and `unseen` are the constant.
    assert state_bytes(optimizer) == moments + 4 * r * min(m, n) + 8
