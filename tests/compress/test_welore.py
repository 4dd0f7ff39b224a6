"""WeLore: parity with the official code, the threshold search, and what is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import (
    LowRankLinear,
    NormalisedThreshold,
    WeLoreConfig,
    factorize,
    layer_spectra,
    load,
    make_plan,
    mark_trainable,
    save,
    solve_for_reduction,
    split,
    welore_compress,
    welore_plan,
)
from fullrank.compress.rules_threshold import effective_reduction
from fullrank.core.errors import InputError
from fullrank.core.rank_rules import LayerSpectrum

REFERENCE = Path(__file__).parents[1] / "reference" / "welore"


def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def planted(shape, decay, seed=0):
    """A matrix with singular values i^-decay."""
    draw = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=draw), full_matrices=False)
    return (U * torch.arange(1.0, min(shape) + 1) ** -decay) @ V


def net(decays=(2.0, 0.1, 2.0), width=16):
    """Projections, some with a heavy tail, and a norm."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"{i}_proj": nn.Linear(width, width) for i in range(len(decays))})
    with torch.no_grad():
        for i, decay in enumerate(decays):
            model[f"{i}_proj"].weight.copy_(planted((width, width), decay, i))
    model["norm"] = nn.LayerNorm(width)
    return model


def run(model, x):
    for name, layer in model.items():
        x = layer(x) if name == "norm" else x + layer(x).tanh()
    return x


def llama(record):
    """The official run's tiny Llama, with its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    q, k = (record[f"W_model_layers_0_self_attn_{x}_proj_weight"].shape[0] for x in "qk")
    heads = 4 if q == 16 else 2
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=q,
            intermediate_size=record["W_model_layers_0_mlp_up_proj_weight"].shape[0],
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads * k // q,
            max_position_embeddings=32,
        )
    )
    with torch.no_grad():
        for name in record["names"]:
            weight = torch.from_numpy(record[f"W_{name.replace('.', '_')}_weight"])
            model.get_submodule(str(name)).weight.copy_(weight)
    return model


def test_thresholds_drop_what_the_official_rule_drops():
    found = reference("threshold_rule")
    for row, theta in enumerate(found["thresholds"]):
        for i, pruned in enumerate(found["pruned"][row]):
            layer = nn.Linear(*found[f"W_{i}"].shape[::-1])
            layer.weight.data = torch.from_numpy(found[f"W_{i}"])
            seen = layer_spectra(nn.Sequential(layer))["0"]
            np.testing.assert_allclose(seen.values, found[f"sv_{i}"], rtol=1e-4, atol=1e-5)
            rank = NormalisedThreshold(float(theta))(seen.values, *seen.shape)
            assert rank == len(seen.values) - pruned


@pytest.mark.parametrize("case", ["layer_0", "layer_1", "layer_2"])
def test_factors(case):
    found = reference(case)
    W, rank = torch.from_numpy(found["W"]), int(found["rank"])
    factors = split(W, rank, "svd", "sqrt")
    product = factors.second @ factors.first
    exact = torch.from_numpy(found["exact_trunc"])
    torch.testing.assert_close(product, exact, rtol=1e-5, atol=1e-8)
    half = torch.from_numpy(found["UV"]).double()
    assert (product - half).abs().max() <= 0.02 * half.abs().max()
    y = torch.from_numpy(found["x"]).double() @ product.T
    official = torch.from_numpy(found["y_bf16"])
    assert (y - official).abs().max() <= 0.02 * official.abs().max()
    # Equal norms of each component on both sides.
    torch.testing.assert_close(factors.first.norm(dim=1), factors.second.norm(dim=0))


@pytest.mark.parametrize("case", ["llama_0", "llama_1"])
def test_a_llama_is_divided_as_the_official_code_divides_it(case):
    found = reference(case)
    model = llama(found)
    config = WeLoreConfig(theta=float(found["threshold"]), lrc_ratio=float(found["min_ratio"]))
    _, done = welore_compress(model, config)
    assert list(done.plan) == list(found["names"])
    lrc = [entry.options["lrc"] for entry in done.plan.values()]
    assert lrc == found["is_lrc"].tolist()
    # The official record gives dense matrices their full rank.
    k = [min(entry.shape) for entry in done.plan.values()]
    kept = [
        entry.options["kept"] if entry.options["lrc"] else full
        for entry, full in zip(done.plan.values(), k, strict=True)
    ]
    assert k == found["full_rank"].tolist()
    assert kept == found["kept_rank"].tolist()
    # `total_rank`: of all matrices, `reduced_rank`: dropped by low-rank components.
    assert sum(k) - sum(kept) == found["reduced_rank"]
    assert sum(k) == found["total_rank"]
    mark_trainable(model)
    trainable = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.requires_grad}
    official = {str(n).removesuffix(".weight").removesuffix(".U").removesuffix(".V")
                for n in found["trainable"]}  # fmt: skip
    # A layer that factors would make bigger stays dense here.
    bigger = {n for n, e in done.plan.items() if e.options["lrc"] and e.rank is None}
    assert trainable == official - bigger
    assert bigger == {
        n for n, e in done.plan.items() if e.options["lrc"] and e.options["kept"] > e.break_even
    }


def test_the_smallest_threshold_that_reaches_the_target():
    spectra = layer_spectra(net((0.3, 1.0, 2.0, 0.7)))
    top = effective_reduction(spectra, 1.0)
    before = 0.0
    for target in np.linspace(0.05, top, 12):
        theta = solve_for_reduction(spectra, float(target))
        assert effective_reduction(spectra, theta) >= target - 1e-12
        assert effective_reduction(spectra, np.nextafter(theta, 0)) < target
        assert theta >= before
        before = theta
    with pytest.raises(InputError, match="can drop 93"):
        solve_for_reduction(spectra, 0.99)


def test_a_stack_of_matrices_counts_as_many_times():
    spectra = {
        "many": LayerSpectrum(np.array([4.0, 3.0, 2.0, 1.0]), (4, 4), 3),
        "one": LayerSpectrum(np.array([4.0, 0.2, 0.1, 0.0]), (4, 4)),
    }
    # Four of sixteen directions: the last of each.
    theta = solve_for_reduction(spectra, 0.25)
    assert effective_reduction(spectra, theta) >= 0.25


def test_a_target_of_nothing_changes_nothing():
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    _, done = welore_compress(model, WeLoreConfig(target_reduction=0.0))
    assert (done.theta, done.reduction, done.kept) == (0, 0, 1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(InputError, match="no factorised layer"):
        mark_trainable(model)


def test_heavy_tails_are_factorised_and_flat_spectra_are_left():
    model, done = welore_compress(net(), WeLoreConfig(theta=0.2))
    assert [isinstance(model[f"{i}_proj"], LowRankLinear) for i in range(3)] == [True, False, True]
    assert 0 < done.reduction < done.nominal_reduction
    assert done.kept == done.plan.savings().kept < 1
    assert done.bytes_after < done.bytes_before
    assert "left" in str(done)


def test_only_low_rank_components_and_norms_move_in_training():
    model, _ = welore_compress(net(), WeLoreConfig(theta=0.2))
    names = mark_trainable(model)
    assert names == [
        *(f"{i}_proj.{part}" for i in (0, 2) for part in ("first", "second", "bias")),
        "norm.weight",
        "norm.bias",
    ]
    assert mark_trainable(model, train_norms=False) == names[:-2]
    mark_trainable(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        run(model, x).square().mul(torch.arange(16.0)).mean().backward()
        optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == names
    assert len(optimizer.state) == len(names)


def test_a_saved_model_is_the_same(tmp_path):
    model, done = welore_compress(net(), WeLoreConfig(theta=0.2))
    save(model, tmp_path / "m")
    x = torch.randn(4, 16)
    assert torch.equal(run(load(tmp_path / "m", into=net((1.0, 1.0, 1.0))), x), run(model, x))
    # The plan alone makes the same model of the same weights.
    assert torch.equal(run(factorize(net(), done.plan, balance="sqrt"), x), run(model, x))


def test_spectra_serve_many_plans():
    model = net()
    spectra = layer_spectra(model, include="*_proj")
    for theta in (0.1, 0.3):
        config = WeLoreConfig(theta=theta)
        assert welore_plan(model, config, spectra) == welore_plan(model, config)
    with pytest.raises(InputError, match="another model"):
        welore_plan(net((1.0,)), WeLoreConfig(theta=0.1), spectra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 768])
def test_an_orthogonal_matrix_stays_dense(width, dtype):
    model = net(width=width)
    torch.manual_seed(0)
    nn.init.orthogonal_(model["1_proj"].weight)
    plan = welore_plan(model.to(dtype), WeLoreConfig(theta=0.9))
    assert plan["1_proj"].rank is None
    assert plan["1_proj"].options["kept"] == width
    # The rule itself sees it too, as make_plan asks it.
    assert make_plan(model, NormalisedThreshold(0.9))["1_proj"].rank is None
    assert plan["0_proj"].rank is not None


def test_spectra_flatter_than_half_precision_shows_are_still_cut():
    model = nn.ModuleDict({"a_proj": nn.Linear(64, 64)})
    U, V = (torch.linalg.qr(torch.randn(64, 64)).Q for _ in "UV")
    model["a_proj"].weight.data = U @ torch.diag(torch.linspace(1, 0.95, 64)) @ V
    for dtype in (torch.float32, torch.bfloat16):
        assert welore_plan(model.to(dtype), WeLoreConfig(theta=0.9))["a_proj"].rank is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = net()
    model["0_proj"].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="0_proj: the weight holds NaN"):
        welore_compress(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_reduction": 1.0}, "target_reduction"),
        ({"target_reduction": -0.1}, "target_reduction"),
        ({"target_reduction": None}, "takes target_reduction"),
        ({"theta": 1.1}, "theta"),
        ({"theta": float("nan")}, "theta"),
        ({"lrc_ratio": 1.0}, "lrc_ratio"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        WeLoreConfig(**settings)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(InputError, match="is named like"):
        welore_compress(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (9, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_tall_odd_in_their_own_dtype(shape, dtype):
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    layer.weight.data = planted(shape, 2.0).to(dtype).T.contiguous().T
    model, done = welore_compress(nn.ModuleDict({"q_proj": layer}), WeLoreConfig(theta=0.1))
    assert model["q_proj"].first.dtype == dtype
    assert model["q_proj"].rank == done.plan["q_proj"].rank
    assert done.table.rows[0][5] < 0.05
