"""AdamP and SGDP: shapes, dtypes, limits, the toy of the paper, resume, bad input."""

import copy
import math

import pytest
import torch
from adamp_cases import MAKE, advance, gradients, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim.adamp import SGDP, AdamP, project_radial
from fullrank.optim.radial import scale_invariance


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


# -- the projection --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    conv=st.booleans(),
    view=st.sampled_from(["channel", "layer", "none"]),
    seed=st.integers(0, 999),
)
def test_projected_updates_are_orthogonal_to_the_weight(m, n, conv, view, seed):
    torch.manual_seed(seed)
    shape = (m, n, 2, 3) if conv else (m, n)
    W, G, U = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    w, g = (x.view(m, -1) if view == "channel" else x.view(1, -1) for x in (W, G))
    if view != "none":
        g -= w * ((g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))
    else:
        g += 10 * w
    update, ratio = project_radial(U, W, G)
    branch = scale_invariance(W, G).settle()
    assert float(ratio) == (0.1 if branch else 1.0)
    if view == "none":
        assert branch == 0
        assert torch.equal(update, U)
        return
    assert branch == 1 if view == "channel" else branch >= 1
    rows = (update, W) if branch == 1 else (update.view(1, -1), W.view(1, -1))
    assert (rows[0].flatten(1) * rows[1].flatten(1)).sum(1).abs().max() < 1e-6
    # What is taken out is along the weight.
    taken = (U - update).view(m if branch == 1 else 1, -1)
    along = W.view(taken.shape)
    factor = (taken * along).sum(1, keepdim=True) / (along * along).sum(1, keepdim=True)
    torch.testing.assert_close(taken, factor * along, atol=1e-6, rtol=0)


def test_the_sign_of_the_cosine_does_not_matter():
    W = torch.randn(4, 5)
    for sign in (1, -1):
        assert scale_invariance(W, sign * W).settle() == 0


def test_all_channels_must_pass():
    W = torch.ones(4, 100)
    G = torch.zeros(4, 100)
    G[:, 0], G[:, 1] = 1.0, -1.0
    assert scale_invariance(W, G).settle() == 1
    G[3, 1] = 1.0  # one row of four, and with it the whole
    assert scale_invariance(W, G).settle() == 0


def test_zeros_count_as_orthogonal():
    W, zero = torch.randn(3, 4), torch.zeros(3, 4)
    for weight, grad in ((W, zero), (zero, W), (zero, zero)):
        update, ratio = project_radial(torch.ones(3, 4), weight, grad, eps=0.0)
        assert float(ratio) == pytest.approx(0.1)
        assert torch.isfinite(update).all()


def test_vectors_and_empty_weights_are_not_projected():
    for shape in [(5,), (), (0, 3)]:
        update, ratio = project_radial(torch.ones(shape), torch.ones(shape), torch.zeros(shape))
        assert torch.equal(update, torch.ones(shape))
        assert float(ratio) == 1.0
    with pytest.raises(InputError, match="one shape"):
        project_radial(torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3))


def test_channels_of_a_transposed_convolution():
    kernel, grad, update = (torch.randn(3, 5, 2, 2, dtype=torch.float64) for _ in range(3))
    rows = kernel.transpose(0, 1).flatten(1)
    g = grad.transpose(0, 1).flatten(1)
    g = g - rows * ((g * rows).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True))
    grad = g.view(5, 3, 2, 2).transpose(0, 1)
    assert scale_invariance(kernel, grad, channel_dim=1).settle() == 1
    assert scale_invariance(kernel, grad, channel_dim=0).settle() != 1
    got, _ = project_radial(update, kernel, grad, channel_dim=1)
    expected, _ = project_radial(
        update.transpose(0, 1), kernel.transpose(0, 1), grad.transpose(0, 1)
    )
    torch.testing.assert_close(got, expected.transpose(0, 1))


# -- the step --------------------------------------------------------------------------------


def test_without_a_passing_test_adamp_is_adamw():
    params, others = parameters(torch.float64), parameters(torch.float64)
    options = {"lr": 0.01, "weight_decay": 0.05}
    ours = AdamP(params, delta=0.0, **options)
    torchs = torch.optim.AdamW(others, **options)
    for t in range(8):
        gradients(params, t)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        torchs.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.data, other.data, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_a_passing_test_sgdp_is_sgd(nesterov):
    params, others = parameters(torch.float64), parameters(torch.float64)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, torchs = SGDP(params, delta=0.0, **options), torch.optim.SGD(others, **options)
    for t in range(8):
        gradients(params, t)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        torchs.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.data, other.data, rtol=1e-12, atol=1e-13)


def test_dampening_counts_in_the_first_step():
    W = nn.Parameter(torch.ones(4, dtype=torch.float64))
    W.grad = torch.ones_like(W)
    SGDP([W], lr=1.0, momentum=0.9, dampening=0.5).step()
    torch.testing.assert_close(W.data, torch.full_like(W, 0.5))


def test_host_and_device_paths_agree(make, request):
    params, others = parameters(torch.float64), parameters(torch.float64)
    optimizer = make(params)
    advance(params, optimizer, range(7))
    branches = [optimizer.branch(p) for p in params]
    assert {b for b in branches if b is not None} >= {0, 1}
    request.getfixturevalue("on_device")
    twin = make(others)
    advance(others, twin, range(7))
    assert branches == [twin.branch(p) for p in others]
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_state_in_float32(make, dtype):
    half = parameters(dtype)
    full = [nn.Parameter(p.detach().float()) for p in half]
    optimizer, other = make(half), make(full)
    for t in range(4):
        gradients(half, t)
        for param, twin in zip(half, full, strict=True):
            twin.grad = param.grad.float()
        optimizer.step()
        other.step()
    for param, twin in zip(half, full, strict=True):
        kept = [v for k, v in optimizer.state[param].items() if k not in ("step", "unseen")]
        assert all(v.dtype == torch.float32 for v in kept)
        assert (param.float() - twin).norm() < 0.02 * twin.norm()


def test_layout_does_not_matter(make):
    params = parameters()
    strided = [nn.Parameter(p.detach().clone()) for p in parameters()]
    strided[0] = nn.Parameter(params[0].detach().t().contiguous().t())
    strided[1] = nn.Parameter(params[1].detach().contiguous(memory_format=torch.channels_last))
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    expected = advance(params, make(params), range(6))
    got = advance(strided, make(strided), range(6))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_maximize_ascends(make):
    params, others = parameters(), parameters()
    up, down = make(params, maximize=True), make(others)
    for t in range(4):
        gradients(params, t)
        for param, other in zip(params, others, strict=True):
            other.grad = -param.grad
        up.step()
        down.step()
    torch.testing.assert_close([p.data for p in params], [p.data for p in others])


def test_the_norm_grows_less_and_the_loss_falls_lower():
    """The paper's two-dimensional toy: minimise -cos(w, w*)."""

    def run(optimizer_of):
        start = torch.tensor([[1.0, 0.02]], dtype=torch.float64)
        w = nn.Parameter(start / start.norm())
        optimizer = optimizer_of([w])
        for _ in range(200):
            optimizer.zero_grad()
            w.grad = torch.autograd.grad(-w[0, 1] / w.norm(), w)[0]
            optimizer.step()
        w = w.detach()
        return float(w.norm()), float(1 - w[0, 1] / w.norm())

    plain, _ = run(lambda p: torch.optim.SGD(p, lr=0.3))
    assert plain == pytest.approx(1.148, abs=0.001)
    expected = {0.9: (7.66, 1.41), 0.95: (15.4, 1.43), 0.99: (66.6, 1.44)}
    for momentum, (free, held) in expected.items():
        norm, gap = run(lambda p, m=momentum: torch.optim.SGD(p, lr=0.3, momentum=m))
        ours, our_gap = run(lambda p, m=momentum: SGDP(p, lr=0.3, momentum=m))
        assert norm == pytest.approx(free, rel=0.01)
        assert ours == pytest.approx(held, rel=0.01)
        assert plain < ours < norm
    assert gap == pytest.approx(6.9e-4, rel=0.05)
    assert our_gap < 1e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("device", [False, True])
def test_bad_steps_are_skipped(make, bad, device, request):
    if device:
        request.getfixturevalue("on_device")
    params = parameters()
    optimizer = make(params)
    advance(params, optimizer, range(3))
    weights = [p.detach().clone() for p in params]
    before = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    gradients(params, 3)
    params[0].grad[1, 1] = bad
    optimizer.step()
    for param, weight, old in zip(params, weights, before, strict=True):
        assert torch.equal(param.detach(), weight)
        for key, value in old.items():
            if key not in ("step", "unseen"):
                assert torch.equal(optimizer.state[param][key], value)
    # The steps that count are the good ones.
    advance(params, optimizer, range(4, 6))
    twins = parameters()
    other = make(twins)
    advance(twins, other, range(3))
    advance(twins, other, range(4, 6))
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a.data, b.data)


def test_raise_names_the_parameter(make):
    model = nn.Linear(3, 2)
    optimizer = make(model.named_parameters(), nonfinite="raise")
    model.weight.grad = torch.full((2, 3), math.nan)
    with pytest.raises(InputError, match="'weight'"):
        optimizer.step()
