"""GaLoreAdamW and GaLoreAdafactor: shapes, dtypes, refresh, skips, training, bad input."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import GaLoreAdafactor, GaLoreAdamW, IterativeSubspace, SVDSubspace, state_bytes


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter((torch.randn(*shape) * 0.1).to(dtype))


def run(optimizer, params, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def random_grads(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        for _ in range(steps)
    ]


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


# -- refresh ---------------------------------------------------------------------------------


def test_refresh_happens_on_schedule():
    W = parameter(8, 12)
    optimizer = GaLoreAdamW([W], rank=2, update_proj_gap=3)
    bases = []
    for step in random_grads([W], 7):
        run(optimizer, [W], [step])
        bases.append(optimizer.state[W]["basis_left"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_signs_are_aligned_with_the_old_basis():
    W = parameter(8, 12)
    optimizer = GaLoreAdamW([W], rank=4, update_proj_gap=1)
    old = None
    for step in random_grads([W], 6):
        run(optimizer, [W], [step])
        new = optimizer.state[W]["basis_left"].clone()
        if old is not None:
            assert bool(((new * old).sum(0) >= 0).all())
        old = new


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
def test_zero_gradients_keep_the_old_basis(refresh):
    W = parameter(8, 12)
    zero = torch.zeros(8, 12)
    optimizer = GaLoreAdamW([W], rank=2, update_proj_gap=2, refresh=refresh)
    start = W.detach().clone()
    run(optimizer, [W], [[zero], [zero], [zero]])
    assert torch.equal(W, start)
    assert not optimizer.state[W]["basis_left"].any()
    (G,) = random_grads([W], 1)[0]
    # The first gradient that has a subspace gives it, whatever the schedule says.
    run(optimizer, [W], [[G]])
    basis = optimizer.state[W]["basis_left"].clone()
    torch.testing.assert_close(basis.T @ basis, torch.eye(2))
    run(optimizer, [W], [[zero]])
    assert torch.equal(optimizer.state[W]["basis_left"], basis)
    assert torch.isfinite(W).all()


def test_gradients_of_low_rank_are_fine():
    W = parameter(10, 12)
    grads = [[torch.outer(torch.randn(10), torch.randn(12))] for _ in range(6)]
    run(GaLoreAdamW([W], rank=5, update_proj_gap=2, refresh="subspace"), [W], grads)
    assert torch.isfinite(W).all()


def test_moments_reset_starts_over():
    grads = random_grads([torch.empty(8, 12)], 5)
    W, fresh = parameter(8, 12), parameter(8, 12)
    options = {"rank": 2, "update_proj_gap": 3, "moments": "reset"}
    optimizer = GaLoreAdamW([W], **options)
    run(optimizer, [W], grads[:3])
    fresh.data.copy_(W.data)
    other = GaLoreAdamW([fresh], **options)
    run(optimizer, [W], grads[3:])
    run(other, [fresh], grads[3:])
    # Bases agree up to signs, of which a moment that starts at 0 knows nothing.
    torch.testing.assert_close(W.data, fresh.data)
    assert optimizer.state[W]["unseen"] == 3


def test_moments_rotate_keeps_their_image():
    W = parameter(8, 12, dtype=torch.float64)
    G, H = random_grads([W], 2)
    optimizer = GaLoreAdamW([W], rank=7, update_proj_gap=1, moments="rotate", betas=(0.9, 0.999))
    run(optimizer, [W], [G])
    state = optimizer.state[W]
    before, mean = state["basis_left"].clone(), state["exp_avg"].clone()
    run(optimizer, [W], [H])
    new = state["basis_left"]
    expected = 0.9 * (new.T @ before @ mean) + 0.1 * (new.T @ H[0])
    torch.testing.assert_close(state["exp_avg"], expected)


def turning(steps, m, n, noise):
    """A gradient with a decaying spectrum whose singular vectors turn a little every step."""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(s, k))[0] for s in (m, n))
    sigma = torch.arange(1, k + 1).float() ** -1.0
    for _ in range(steps):
        U = torch.linalg.qr(U + noise / math.sqrt(m) * torch.randn(m, k))[0]
        V = torch.linalg.qr(V + noise / math.sqrt(n) * torch.randn(n, k))[0]
        yield (U * sigma) @ V.T


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((96, 64), "right"), ((64, 96), "left"), ((96, 64), "left"), ((64, 96), "full")],
)
def test_subspace_refresh_keeps_the_energy(shape, side, noise):
    subspace, iterated = IterativeSubspace(16, side), 0
    for G in turning(8, *shape, noise):
        subspace = subspace.fit(torch.empty(shape), G)
        best = SVDSubspace(16, side).fit(torch.empty(shape), G).down(G).square().sum()
        assert subspace.down(G).square().sum() >= 0.999 * best
        iterated += subspace.steps > 0
        for basis in subspace.state.values():
            short = basis if basis.shape[0] < basis.shape[1] else basis.T
            torch.testing.assert_close(short @ short.T, torch.eye(16), rtol=0, atol=1e-5)
    # Where the gradient turns slowly, all but the first fit are iterations.
    assert noise > 0.01 or iterated == 7


# -- gradients that are not finite -----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdafactor])
def test_bad_steps_are_skipped(make, at, bad):
    options = {"rank": 2, "update_proj_gap": 2, "weight_decay": 0.1}
    if make is GaLoreAdafactor:
        options |= {"lr": 0.01, "relative_step": False, "beta1": 0.9}
    params = [parameter(8, 12), parameter(5, 5)]
    optimizer = make(params, **options)
    grads = random_grads(params, 5)
    run(optimizer, params, grads[:at])
    before = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    weights = [p.detach().clone() for p in params]
    grads[at][1][2, 3] = bad
    run(optimizer, params, [grads[at]])
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    for param, old in zip(params, before, strict=True):
        for name, value in old.items():
            if name not in ("step", "unseen"):
                assert torch.equal(optimizer.state[param][name], value), name
    assert [float(optimizer.state[p]["unseen"]) for p in params] == [1.0, 1.0]
    run(optimizer, params, grads[at + 1 :])
    assert all(torch.isfinite(p).all() for p in params)


def test_raise_names_the_parameter_and_changes_nothing():
    model = nn.Linear(6, 5)
    optimizer = GaLoreAdamW(model.named_parameters(), nonfinite="raise")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.bias.grad[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'bias' of shape \(5,\)"):
        optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(float(optimizer.state[p]["step"]) == 0 for p in model.parameters())


def test_ignored_means_not_looked_at():
    W = parameter(6)
    optimizer = GaLoreAdamW([W], nonfinite="ignore")
    run(optimizer, [W], [[torch.full((6,), math.nan)]])
    assert torch.isnan(W).all()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("make", ["adamw", "adamw8", "adafactor", "adafactor_relative"])
def test_skips_known_to_the_device_only(make, moments, monkeypatch):
    options = {"update_proj_gap": 3, "weight_decay": 0.1, "moments": moments}
    adafactor = {"relative_step": False, "lr": 0.01, "beta1": 0.9}
    kind, extra = {
        "adamw": (GaLoreAdamW, {}),
        "adamw8": (GaLoreAdamW, {"state_bits": 8, "min_8bit_size": 1}),
        "adafactor": (GaLoreAdafactor, adafactor),
        "adafactor_relative": (GaLoreAdafactor, {"beta1": 0.9, "warmup_init": True}),
    }[make]
    dtype = torch.float32 if make == "adamw8" else torch.float64
    params = [parameter(8, 12, dtype=dtype), parameter(7, dtype=dtype)]
    others = copy.deepcopy(params)
    grads = random_grads(params, 9)
    for at in (1, 4, 5):
        grads[at][1][2] = math.nan
    # A refresh reads what the gradients are worth anyway, and may find a step to skip.
    grads[6][0][1, 1] = math.inf

    def optimizer(params):
        return kind([{"params": params[:1], "rank": 2}, {"params": params[1:]}], **options, **extra)

    first = optimizer(params)
    run(first, params, grads)
    monkeypatch.undo()
    second = optimizer(others)
    run(second, others, grads)
    # A rounding may flip a code of 8 bits.
    close = 2e-4 if make == "adamw8" else 1e-8
    torch.testing.assert_close(
        [p.data for p in params], [p.data for p in others], rtol=0, atol=close
    )
    for p, q in zip(params, others, strict=True):
        assert first.state[p]["unseen"] == second.state[q]["unseen"]


# -- as part of a training loop --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh": "subspace", "moments": "rotate"},
        {"state_bits": 8, "min_8bit_size": 1},
        {"moments": "reset"},
    ],
)
def test_training_lowers_the_loss(options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    data = torch.randn(256, 16)
    target = data @ torch.randn(16, 16) / 4
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "rank": 8, "update_proj_gap": 10, **options}, {"params": biases}]
    optimizer = GaLoreAdamW(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    losses = []
    for _ in range(60):
        loss = (model(data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_closure_and_its_loss():
    W = parameter(4, 6)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    optimizer = GaLoreAdamW([W], rank=2)
    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first


def test_parameters_without_gradient_are_left_alone():
    params = [parameter(6, 8), parameter(6, 8)]
    optimizer = GaLoreAdamW(params, rank=2)
    assert optimizer.step() is None
    run(optimizer, params, [[torch.randn(6, 8), None]])
    assert list(optimizer.state) == [params[0]]
    # Each counts its own steps.
    run(optimizer, params, [[torch.randn(6, 8), torch.randn(6, 8)]])
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0, 1.0]


def test_one_rank_for_each_parameter_of_a_group():
    params = [parameter(8, 12), parameter(12, 8), parameter(9, 9)]
    optimizer = GaLoreAdamW([{"params": params, "rank": [2, 5, None]}])
    run(optimizer, params, random_grads(params, 2))
    shapes = [tuple(optimizer.state[p]["exp_avg"].shape) for p in params]
    assert shapes == [(2, 12), (12, 5), (9, 9)]


def test_add_param_group_after_some_steps():
    first, second = parameter(6, 8), parameter(8, 6)
    optimizer = GaLoreAdamW([first], rank=2)
    run(optimizer, [first], random_grads([first], 2))
    group = {"params": [second], "rank": 3, "lr": 0.5}
    optimizer.add_param_group(group)
    assert list(group) == ["params", "rank", "lr"]
    run(optimizer, [first, second], random_grads([first, second], 2))
    assert optimizer.state[second]["exp_avg"].shape == (8, 3)
    assert optimizer.state[first]["step"] == 4


def test_official_groups_work_unchanged():
    W, b = parameter(8, 6), parameter(6)
    galore = {"rank": 2, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": [b]}, {"params": [W], **galore}], lr=0.01, weight_decay=0.1)
    run(optimizer, [W, b], random_grads([W, b], 2))
    assert "basis_right" in optimizer.state[W]
    assert "basis_right" not in optimizer.state[b]


def test_empty_parameters_and_a_cleared_state():
    params = [nn.Parameter(torch.empty(0, 5)), parameter(6, 8), nn.Parameter(torch.tensor(1.0))]
    groups = [{"params": params[:2], "rank": 2}, {"params": params[2:]}]
    optimizer = GaLoreAdamW(groups)
    grads = random_grads(params, 4)
    run(optimizer, params, grads[:2])
    optimizer.state.clear()
    twins = copy.deepcopy(params)
    fresh = GaLoreAdamW([{"params": twins[:2], "rank": 2}, {"params": twins[2:]}])
    run(optimizer, params, grads[2:])
    run(fresh, twins, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_weights_keep_their_storage():
    params = [parameter(6, 8), parameter(4)]
    pointers = [p.data_ptr() for p in params]
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 2}, {"params": params[1:]}])
    run(optimizer, params, random_grads(params, 3))
    assert [p.data_ptr() for p in params] == pointers


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -4}, "rank=-4"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": True}, "rank=True"),
        ({"rank": [2, 3]}, "1 parameters lists 2 ranks"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"proj_type": "both"}, "proj_type='both'.*'std'"),
        ({"refresh": "random"}, "refresh='random'"),
        ({"moments": "forget"}, "moments='forget'"),
        ({"state_bits": 4}, "state_bits=4"),
        ({"nonfinite": "warn"}, "nonfinite='warn'"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        GaLoreAdamW([parameter(6, 8)], **options)
    assert isinstance(caught.value, InputError)
    if "nonfinite" not in options:
        optimizer = GaLoreAdamW([parameter(3, 3)])
        with pytest.raises(InputError, match=message):
            optimizer.add_param_group({"params": [parameter(6, 8)], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "relative_step"),
        ({"relative_step": False}, "learning rate"),
        ({"lr": 0.1, "relative_step": False, "warmup_init": True}, "warmup_init"),
        ({"beta1": 1.0}, "beta1"),
        ({"eps": 1e-30}, "eps"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
    ],
)
def test_bad_adafactor_arguments_raise(options, message):
    with pytest.raises(InputError, match=message):
        GaLoreAdafactor([parameter(6, 8)], **options)


def test_vectors_in_a_rank_group_warn_and_are_stepped():
    b = parameter(6)
    with pytest.warns(UserWarning, match=r"1 parameters .*shape \(6,\).*without projection"):
        optimizer = GaLoreAdamW([{"params": [b], "rank": 2}])
    before = b.detach().clone()
    run(optimizer, [b], random_grads([b], 1))
    assert not torch.equal(b, before)


def test_sparse_gradients_raise():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = GaLoreAdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_only_real_floats_are_stepped(dtype):
    tensor = torch.zeros(4, 4, dtype=dtype)
    with pytest.raises(InputError, match=str(dtype)):
        GaLoreAdamW([tensor])


def test_a_parameter_in_two_groups_raises():
    W = parameter(4, 6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([{"params": [W], "rank": 2}, {"params": [W]}])


def test_an_injected_basis_of_another_shape_raises():
    W = parameter(4, 6)
    optimizer = GaLoreAdamW([W], rank=2, projection_hook=lambda w, g, side: torch.ones(3, 3))
    with pytest.raises(InputError, match=r"\[\(3, 3\)\].*side 'left' needs \[\(4, 2\)\]"):
        run(optimizer, [W], random_grads([W], 1))


def test_a_hook_may_leave_the_choice():
    W, V = parameter(4, 6), parameter(4, 6)
    V.data.copy_(W.data)
    grads = random_grads([W], 3)
    run(GaLoreAdamW([W], rank=2, projection_hook=lambda w, g, side: None), [W], grads)
    run(GaLoreAdamW([V], rank=2), [V], grads)
    assert torch.equal(W, V)
