"""FRUGAL: its limits (signSGD, AdamW), its draws and blocks, memory, skips, bad input."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import FrugalAdamW, frugal_param_groups, memory_table, param_groups, state_bytes
from fullrank.optim.blocks import active_blocks

SPACES = ["block", "columns", "rows", "randk", "svd", "random"]


def divided(param, **options):
    return [{"params": [param], "is_proj_params": True, **options}]


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


# -- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SPACES)
def test_density_0_is_sign_sgd(subspace):
    W, V = (nn.Parameter(torch.ones(6, 8, dtype=torch.float64)) for _ in range(2))
    optimizer = FrugalAdamW(divided(W), lr=0.01, subspace=subspace, density=0.0, weight_decay=0.1)
    for _ in range(4):
        G = torch.randn(6, 8, dtype=torch.float64)
        G[2] = 0.0
        step(optimizer, [W], [G])
        with torch.no_grad():
            V.mul_(1 - 0.01 * 0.1).sub_(0.01 * G.sign())
    assert torch.equal(W, V)
    # Two counters, and a block's period.
    assert state_bytes(optimizer) == (12 if subspace == "block" else 8)


@pytest.mark.parametrize("subspace", SPACES)
def test_density_1_is_adamw(subspace):
    W, V = (nn.Parameter(torch.ones(6, 8, dtype=torch.float64)) for _ in range(2))
    ours = FrugalAdamW(
        divided(W), lr=0.01, subspace=subspace, density=1.0, weight_decay=0.1, update_gap=10
    )
    theirs = torch.optim.AdamW([V], lr=0.01, weight_decay=0.1)
    for _ in range(9):
        G = torch.randn(6, 8, dtype=torch.float64)
        step(ours, [W], [G])
        step(theirs, [V], [G])
    torch.testing.assert_close(W, V, rtol=0, atol=1e-12)


@pytest.mark.parametrize("subspace", SPACES)
@pytest.mark.parametrize("stateful", ["adamw", "sgdm"])
def test_density_1_starts_over_every_period(subspace, stateful):
    W, V = (nn.Parameter(torch.ones(6, 8, dtype=torch.float64)) for _ in range(2))
    options = {"lr": 0.01, "density": 1.0, "stateful": stateful}
    ours = FrugalAdamW(divided(W), subspace=subspace, update_gap=3, **options)
    for t in range(8):
        if t % 3 == 0:
            new = FrugalAdamW(divided(V), **options)
        G = torch.randn(6, 8, dtype=torch.float64)
        step(ours, [W], [G])
        step(new, [V], [G])
    torch.testing.assert_close(W, V, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stateful", ["lion", "sgdm"])
def test_other_rules_on_the_whole_weight(stateful):
    W, V = (nn.Parameter(torch.ones(6, 8, dtype=torch.float64)) for _ in range(2))
    ours = FrugalAdamW(
        divided(W), lr=0.01, stateful=stateful, density=1.0, betas=(0.9, 0.99), momentum=0.8
    )
    M = torch.zeros(6, 8, dtype=torch.float64)
    for _ in range(6):
        G = torch.randn(6, 8, dtype=torch.float64)
        step(ours, [W], [G])
        with torch.no_grad():
            if stateful == "lion":
                V.sub_(0.01 * (0.9 * M + 0.1 * G).sign())
                M = 0.99 * M + 0.01 * G
            else:
                M = 0.8 * M + G
                V.sub_(0.01 * M)
    torch.testing.assert_close(W, V, rtol=0, atol=1e-12)


@pytest.mark.parametrize("state_free", ["sign_sgd", "sgd", None])
@pytest.mark.parametrize("subspace", ["columns", "rows", "randk", "svd", "random"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_inside_and_outside_are_what_they_should_be(shape, subspace, state_free):
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = W.detach().clone()
    optimizer = FrugalAdamW(
        divided(W), lr=0.01, subspace=subspace, state_free=state_free, state_free_lr_scale=0.5
    )
    G = torch.randn(shape, dtype=torch.float64)
    step(optimizer, [W], [G])
    space = optimizer._slot(W).subspace
    R = space.down(G)
    rest = G - space.up(R)
    outside = {"sign_sgd": rest.sign(), "sgd": rest, None: 0 * rest}[state_free]
    # A first step of Adam is the sign, up to eps.
    inside = space.up(R / (R.abs() + 1e-8))
    torch.testing.assert_close(
        start - W.detach(), 0.01 * (inside + 0.5 * outside), rtol=0, atol=1e-9
    )
    if subspace in ("columns", "rows", "randk"):
        assert int((space.up(torch.ones_like(R)) > 0).sum()) == R.numel()


def test_columns_that_no_batch_touched_stay():
    W = nn.Parameter(torch.randn(8, 12))
    start = W.detach().clone()
    optimizer = FrugalAdamW(divided(W), subspace="columns", update_gap=2)
    for _ in range(5):
        G = torch.randn(8, 12)
        G[:, 3:6] = 0.0
        step(optimizer, [W], [G])
    assert torch.equal(W[:, 3:6], start[:, 3:6])


@pytest.mark.parametrize("subspace", ["svd", "random", "columns", "rows", "randk"])
def test_gradients_of_zeros_do_nothing(subspace):
    W = nn.Parameter(torch.randn(8, 12))
    start = W.detach().clone()
    optimizer = FrugalAdamW(divided(W), subspace=subspace, update_gap=2)
    for _ in range(3):
        step(optimizer, [W], [torch.zeros(8, 12)])
    assert torch.equal(W, start)
    step(optimizer, [W], [torch.randn(8, 12)])
    assert optimizer._slot(W).subspace.fitted


# -- draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", ["random", "columns", "randk"])
def test_draws_follow_the_seed_and_not_the_global_generator(subspace):
    found = []
    for seed, noise in ((0, 1), (0, 2), (5, 1), (torch.Generator().manual_seed(1), 1)):
        torch.manual_seed(noise)
        params = [nn.Parameter(torch.zeros(9, 16)) for _ in range(2)]
        optimizer = FrugalAdamW(
            [{"params": params, "is_proj_params": True}],
            subspace=subspace,
            update_gap=2,
            generator=seed,
        )
        for t in range(3):
            G = torch.arange(144.0).view(9, 16).add(t).cos()
            step(optimizer, params, [G, G])
        found.append([p.detach() for p in params])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[3][0])
    # Each weight has a draw of its own.
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("subspace", ["columns", "rows", "randk", "random"])
def test_every_period_draws_anew(subspace):
    W = nn.Parameter(torch.randn(12, 16))
    optimizer = FrugalAdamW(divided(W), subspace=subspace, update_gap=2)
    states = []
    for _ in range(6):
        step(optimizer, [W], [torch.randn(12, 16)])
        states.append({k: v.clone() for k, v in optimizer._slot(W).subspace.state.items()})
        assert optimizer.state[W]["unseen"] == 2 * ((len(states) - 1) // 2)
    (key,) = states[0]
    same = [torch.equal(a[key], b[key]) for a, b in pairwise(states)]
    assert same == [True, False, True, False, True]


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror", "random"])
@pytest.mark.parametrize(("count", "active"), [(6, 2), (7, 4), (5, 0), (8, 8)])
def test_blocks_are_as_many_as_asked_for(order, count, active):
    for period in range(1, 9):
        turn = active_blocks(order, count, active, period, 3)
        if order != "mirror" or 2 * (count // 2) >= active:
            assert len(turn) == active
        assert turn <= set(range(count))
    if order == "ascending" and active:
        periods = math.ceil(count / active)
        assert set().union(*(active_blocks(order, count, active, p) for p in range(1, periods + 1)))


def test_blocks_take_turns_and_free_their_state():
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(4)]
    optimizer = FrugalAdamW([{"params": params, "is_proj_params": True}], density=0.5, update_gap=3)
    for t in range(7):
        step(optimizer, params, [torch.randn(8, 6) for _ in params])
        kept = ["exp_avg" in optimizer.state[p] for p in params]
        assert kept == (
            [False, False, True, True] if t // 3 % 2 == 0 else [True, True, False, False]
        )
        assert state_bytes(optimizer) == 2 * 2 * 4 * 48 + 4 * 12


def test_a_block_without_gradient_keeps_to_the_groups_clock():
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    optimizer = FrugalAdamW([{"params": params, "is_proj_params": True}], density=0.5, update_gap=2)
    for t in range(4):
        grads = [torch.randn(8, 6), torch.randn(8, 6) if t != 1 else None]
        step(optimizer, params, grads)
    kept = ["exp_avg" in optimizer.state[p] for p in params]
    assert kept == [True, False]


@pytest.mark.parametrize("without_clock", [False, True])
def test_the_groups_clock_never_goes_back_and_is_saved(without_clock):
    """Of two tensors the second joins late; the first then misses a step."""

    def make():
        params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
        groups = [{"params": params, "is_proj_params": True}]
        return params, FrugalAdamW(groups, density=0.5, update_gap=4, block_order="ascending")

    params, optimizer = make()
    kept, G = [], torch.ones(4, 4)
    for t in range(7):
        step(optimizer, params, [G if t != 5 else None, G if t > 3 else None])
        kept.append(["exp_avg" in optimizer.state[p] for p in params])
        if t == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            if without_clock:
                del saved["param_groups"][0]["clock"]
            params, optimizer = make()
            optimizer.load_state_dict(saved)
    assert kept == [[True, False]] * 4 + [[False, True]] * 3
    assert optimizer.state[params[1]]["step"] - optimizer.state[params[1]]["unseen"] == 3


def test_the_groups_clock_counts_every_step_of_any_tensor():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = FrugalAdamW([{"params": params, "is_proj_params": True}], density=0.5, update_gap=4)
    for t in range(6):
        step(optimizer, params, [torch.ones(4, 4) if t % 2 == i else None for i in range(2)])
    assert ["exp_avg" in optimizer.state[p] for p in params] == [True, False]


# -- memory, precision, skips ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
@pytest.mark.parametrize("subspace", SPACES)
def test_state_bytes_follow_the_formula(subspace, shape):
    W = nn.Parameter(torch.randn(shape))
    optimizer = FrugalAdamW(divided(W), subspace=subspace, density=0.25)
    step(optimizer, [W], [torch.randn(shape)])
    moments = 0 if subspace == "block" else 2 * 4 * 24 * 32 // 4
    # A seed of 8 bytes, a basis of the shorter side, or a block's period; and the counters.
    extra = {"block": 4, "svd": 4 * 6 * 24, "random": 4 * 6 * 24}.get(subspace, 8)
    assert state_bytes(optimizer) == moments + extra + 8
    table = memory_table(FrugalAdamW(divided(W), subspace=subspace, density=0.25))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["part"] == "projected"
    assert row["optimizer state"] == state_bytes(optimizer)


@pytest.mark.parametrize("subspace", SPACES)
def test_half_precision_moves_weights(subspace):
    half = nn.Parameter((torch.randn(32, 16) * 0.1).to(torch.bfloat16))
    full = nn.Parameter(half.detach().float())
    for param in (half, full):
        optimizer = FrugalAdamW(divided(param), lr=0.01, subspace=subspace, state_free="sgd")
        torch.manual_seed(1)
        for _ in range(4):
            param.grad = torch.randn(32, 16).to(torch.bfloat16).to(param.dtype)
            optimizer.step()
    assert (half.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("subspace", SPACES)
@pytest.mark.parametrize("stateful", ["adamw", "lion", "sgdm"])
def test_skips_known_to_the_device_only(subspace, stateful, monkeypatch):
    params = [nn.Parameter(torch.randn(8, 12).double()) for _ in range(2)]
    params.append(nn.Parameter(torch.randn(7).double()))
    others = copy.deepcopy(params)
    grads = [[torch.randn(p.shape).double() for p in params] for _ in range(8)]
    for at in (1, 4):
        grads[at][1][2] = math.nan
    grads[6][0][1, 1] = math.inf

    def run(params):
        groups = [{"params": params[:2], "is_proj_params": True}, {"params": params[2:]}]
        options = {"update_gap": 3, "weight_decay": 0.1, "stateful": stateful, "density": 0.5}
        optimizer = FrugalAdamW(groups, lr=0.01, subspace=subspace, **options)
        for step_grads in grads:
            step(optimizer, params, [g.clone() for g in step_grads])

    run(params)
    monkeypatch.undo()
    run(others)
    assert all(torch.isfinite(p).all() for p in params)
    torch.testing.assert_close(params, others, rtol=0, atol=1e-9)


# -- groups ----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 16)
        self.head = nn.Linear(16, 20)

    def get_output_embeddings(self):
        return self.head


def test_groups_of_a_model():
    model = Model()
    names = frugal_param_groups(model).projected
    assert list(names) == ["attn.weight", "mlp.weight"]
    assert names["mlp.weight"] == ((16, 8), None)
    every = frugal_param_groups(
        model, project_embeddings=True, project_head=True, project_norms=True, density=0.5
    )
    assert list(every.projected) == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "attn.weight",
        "mlp.weight",
        "head.weight",
    ]
    optimizer = FrugalAdamW(every)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert sum("exp_avg" in optimizer.state[p] for p in every[0]["params"]) == 3
    assert list(frugal_param_groups(model, targets="mlp").projected) == ["mlp.weight"]
    assert "not projected" in str(every)
    with pytest.raises(InputError, match="nothing to divide"):
        frugal_param_groups(model, targets="conv")
    with pytest.raises(InputError, match="have no 'rho'"):
        frugal_param_groups(model, rho=0.5)


def test_other_ways_to_say_which():
    model = Model()
    groups = param_groups(model, FrugalAdamW, rank=3, subspace="columns", verbose=False)
    optimizer = FrugalAdamW(groups)
    assert optimizer._slot(model.mlp.weight).small_shape == (16, 3)
    optimizer = FrugalAdamW(model.parameters(), proj_params=[model.mlp.weight], subspace="rows")
    assert [len(g["params"]) for g in optimizer.param_groups] == [8, 1]
    optimizer = FrugalAdamW(
        model.named_parameters(), proj_params=[("mlp.weight", model.mlp.weight)], density=0.5
    )
    assert optimizer.param_groups[1]["param_names"] == ["mlp.weight"]
    with pytest.warns(UserWarning, match="fewer than two dimensions"):
        optimizer = FrugalAdamW(model.named_parameters(), rank=2, subspace="svd")
    assert optimizer._slot(model.mlp.weight).small_shape == (16, 2)
    with pytest.warns(UserWarning, match="projects nothing"):
        FrugalAdamW(model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": -0.1}, "density=-0.1"),
        ({"density": 1.5}, "density=1.5"),
        ({"state_free": "same"}, "state_free='same'"),
        ({"stateful": "adafactor"}, "stateful='adafactor'"),
        ({"subspace": "layers"}, "subspace='layers'"),
        ({"block_order": "sideways"}, "block_order='sideways'"),
        ({"block_order": "mirror", "density": 1.0}, "half of its 1 active"),
        ({"update_gap": 0}, "update_gap=0"),
        ({"subspace": "svd", "rank": 0}, "rank=0"),
        ({"subspace": "svd", "rank": 9}, r"rank=9 is larger than parameter 0 of shape \(6, 8\)"),
        ({"rank": 3}, "by density, not rank"),
        ({"generator": "seven"}, "generator='seven'"),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(InputError, match=message):
        FrugalAdamW(divided(nn.Parameter(torch.randn(6, 8))), **options)


@pytest.mark.parametrize("subspace", ["columns", "rows", "randk", "svd", "random"])
def test_vectors_cannot_be_divided(subspace):
    with pytest.raises(InputError, match=r"divides matrices; parameter 0 of shape \(6,\)"):
        FrugalAdamW(divided(nn.Parameter(torch.randn(6))), subspace=subspace)


@pytest.mark.parametrize(
    ("subspace", "given", "message"),
    [
        ("columns", torch.arange(3), r"indices of shape \[\(3,\)\]; columns need \[\(2,\)\]"),
        ("svd", torch.ones(3, 3), r"bases of shape \[\(3, 3\)\]"),
    ],
)
def test_an_injected_choice_of_another_shape_raises(subspace, given, message):
    W = nn.Parameter(torch.randn(6, 8))
    optimizer = FrugalAdamW(divided(W), subspace=subspace, projection_hook=lambda w, g, s: given)
    with pytest.raises(InputError, match=message):
        step(optimizer, [W], [torch.randn(6, 8)])
