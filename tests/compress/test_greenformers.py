"""Greenformers: parity with the official code, and what a rewriting pass must hold."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import (
    LowRankConv2d,
    LowRankLinear,
    factorize,
    greenformers,
    greenformers_plan,
    load,
    report,
    save,
    semi_nmf,
    split,
)
from fullrank.compress.layers_build import build_layer
from fullrank.compress.matrices import matricise
from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry

REFERENCE = Path(__file__).parents[1] / "reference" / "greenformers"


def read(name):
    with np.load(REFERENCE / f"{name}.npz") as data:
        return {k: torch.tensor(data[k]) for k in data.files}


def names(kind):
    return sorted(path.stem for path in REFERENCE.glob(f"{kind}_*.npz"))


def argument(value):
    value = float(value)
    return int(value) if value >= 1 else value


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)


def quiet(*arguments, **named):
    """Factorise; that some ranks save nothing is said elsewhere."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return greenformers(*arguments, **named)


# -- parity ------------------------------------------------------------------------------------


def test_the_rank_rule_is_the_official_one():
    rules = read("rank_rule")
    for wide, out, rank, expected in rules["linear"].tolist():
        layer = nn.Linear(int(wide), int(out), device="meta")
        entry = greenformers_plan(nn.Sequential(layer), argument(rank))["0"]
        assert (entry.rank or -1) == expected, (wide, out, rank)
    for wide, out, groups, kernel, rank, expected in rules["conv2d"].tolist():
        sizes = [int(v) for v in (wide, out, kernel)]
        layer = nn.Conv2d(*sizes, groups=int(groups), device="meta")
        plan = greenformers_plan(nn.Sequential(layer), argument(rank), official_conv_rank=True)
        found = plan["0"].rank
        # The official rank is that of all groups together.
        assert (found * int(groups) if found else -1) == expected, (sizes, groups, rank)


@pytest.mark.parametrize("name", names("led_svd"))
def test_linear_layers_by_svd(name):
    d = read(name)
    m, n = d["W"].shape
    dense = nn.Linear(n, m, dtype=torch.float64)
    dense.load_state_dict({"weight": d["W"], "bias": d["bias"]})
    layer = greenformers(nn.Sequential(dense), argument(d["rank_arg"]))[0]
    assert layer.rank == int(d["rank"])
    product = layer.merged_weight().detach()
    assert (product - d["BA"]).norm() <= 1e-4 * d["BA"].norm()
    assert (product - d["W"]).norm() <= (d["BA"] - d["W"]).norm() * (1 + 1e-12)
    y = layer(d["x"]).detach()
    assert (y - d["y_led"]).norm() <= 1e-4 * d["y_led"].norm()
    # All sizes are in the first factor.
    eye = torch.eye(layer.rank, dtype=torch.float64)
    torch.testing.assert_close(layer.second.T @ layer.second, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.first.norm(dim=1), d["sv"][: layer.rank])


@pytest.mark.parametrize("name", names("ced_svd"))
def test_convolutions_by_svd(name):
    d = read(name)
    out, wide, *kernel = d["weight"].shape
    settings = {k: tuple(d[k].tolist()) for k in ("stride", "padding", "dilation")}
    dense = nn.Conv2d(wide, out, kernel, dtype=torch.float64, **settings)
    dense.load_state_dict({"weight": d["weight"], "bias": d["bias"]})
    torch.testing.assert_close(dense(d["x"]), d["y_dense"])
    model = greenformers(nn.Sequential(dense), argument(d["rank_arg"]), official_conv_rank=True)
    layer = model[0]
    assert layer.rank == int(d["rank"])
    assert (layer.first.shape, layer.second.shape) == (d["first"].shape, d["second"].shape)
    product = layer.merged_weight().detach()
    U, S, Vh = torch.linalg.svd(d["weight"].flatten(1), full_matrices=False)
    exact = (U[:, : layer.rank] * S[: layer.rank]) @ Vh[: layer.rank]
    torch.testing.assert_close(product.flatten(1), exact, rtol=0, atol=1e-10)
    # The recorded one is randomised, and up to 1.5e-4 away from the exact one.
    assert (product - d["product"]).norm() <= 2e-4 * d["product"].norm()
    lost, theirs = (product - d["weight"]).norm(), (d["product"] - d["weight"]).norm()
    assert lost <= theirs * (1 + 1e-12)
    y = layer(d["x"]).detach()
    assert (y - d["y_ced"]).norm() <= 2e-4 * d["y_ced"].norm()


@pytest.mark.parametrize("name", names("snmf"))
def test_semi_nmf_steps(name):
    d = read(name)
    F, H = semi_nmf(d["W"].T, int(d["rank"]), int(d["num_iter"]), start=d["H0"])
    torch.testing.assert_close(F, d["Wf"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(H, d["Hf"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((F @ H).T, d["BA"], rtol=1e-9, atol=1e-12)
    assert float((d["W"].T - F @ H).norm()) == pytest.approx(float(d["err"]), rel=1e-9)


# -- what is factorised ------------------------------------------------------------------------


def test_top_level_layers_are_factorised_and_the_model_is_not():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    small = greenformers(model, 0.5)
    assert [type(m) for m in small] == [LowRankLinear, nn.ReLU, LowRankLinear]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert greenformers(model, 0.5, inplace=True) is model
    assert model[0].rank == small[0].rank == 64 * 96 // 160 // 2


@pytest.mark.parametrize("method", ["svd", "snmf", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_methods_keep_dtype_bias_and_modes(method, dtype):
    model = mlp(dtype).eval()
    model.append(nn.Unflatten(1, (16, 2, 2)))
    model.append(nn.Conv2d(16, 32, 2, bias=False, dtype=dtype).eval())
    model[0].requires_grad_(False)
    small = greenformers(model, 0.4, method)
    assert type(small[4]) is LowRankConv2d
    assert torch.equal(small[0].bias, model[0].bias)
    assert small[4].bias is None
    assert not small[0].first.requires_grad
    assert small[2].first.requires_grad
    assert not small[2].training
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(torch.randn(3, 64, dtype=dtype)).shape == (3, 32, 1, 1)
    if method == "snmf":
        assert (small[2].second >= 0).all()
        assert (small[4].second >= 0).all()
    if method != "random":
        assert 0 < small[2].error < 1


def test_new_factors_have_the_variance_of_a_new_layer():
    torch.manual_seed(0)
    small = greenformers(nn.Sequential(nn.Linear(300, 200)), 0.5, "random")
    wanted = nn.Linear(300, 200).weight.var().item()
    assert small[0].merged_weight().var().item() == pytest.approx(wanted, rel=0.05)


def test_semi_nmf_is_worse_than_the_svd_and_better_than_nothing():
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    svd, snmf = (split(weight, 6, method).error for method in ("svd", "snmf"))
    assert svd < snmf < 1


def test_groups_are_factorised_one_by_one():
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, 3, groups=2, padding=1, dtype=torch.float64)
    model = nn.Sequential(dense)
    small = greenformers(model, 3)
    # Three channels between the two do not go into two groups: four do.
    assert small[0].first.shape == (4, 4, 3, 3)
    full = build_layer(dense, PlanEntry((12, 36), 6, scheme="channel", options={"stack": 2}))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(full(x), dense(x), rtol=0, atol=1e-10)
    by_parts = quiet(model, 4, "snmf")[0]
    matrices = matricise(dense).matrix
    lost = sum(split(matrix, 2, "snmf").error * matrix.square().sum() for matrix in matrices)
    assert by_parts.error == pytest.approx(float(lost / matrices.square().sum()))
    error = (by_parts.merged_weight() - dense.weight).square().sum() / dense.weight.square().sum()
    assert by_parts.error == pytest.approx(error.item())


def test_full_rank_by_svd_is_the_layer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(9, 7), (4, 9)),
        "Conv1D": (transformers.pytorch_utils.Conv1D(7, 9), (4, 9)),
        "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        "2d": (nn.Conv2d(4, 6, (3, 2), dilation=2, padding=(1, 0)), (2, 4, 9, 8)),
        "3d": (nn.Conv3d(4, 6, 2, groups=2), (2, 4, 5, 4, 3)),
    }
    for name, (dense, shape) in layers.items():
        dense.double()
        found = matricise(dense)
        options = {"stack": found.stack} if found.stack > 1 else {}
        whole = (found.stack * found.shape[0], found.shape[1])
        entry = PlanEntry(whole, min(found.shape), scheme=found.scheme, options=options)
        x = torch.randn(shape, dtype=torch.float64)
        layer = build_layer(dense, entry, balance="first")
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-10, msg=name)


def test_ranks_by_pattern_and_layers_that_would_grow():
    model = mlp()
    plan = greenformers_plan(model, {"0": 5, "2": 0.25})
    assert {n: e.rank for n, e in plan.items()} == {"0": 5, "2": 9}
    plan = greenformers_plan(model, {"2": 5})
    assert (plan["0"].rank, plan["0"].reason) == (None, "no pattern of ranks matches: left dense")
    with pytest.warns(UserWarning, match="1 layers stay dense, e.g. 0: rank 40: 40 saves nothing"):
        small = greenformers(model, 40, include="0")
    assert type(small[0]) is nn.Linear
    # A share so small that nothing is left of the rank leaves the layer without a word.
    assert greenformers_plan(nn.Sequential(nn.Linear(8, 8)), 0.1)["0"].rank is None


@pytest.mark.parametrize("rank", [0, -1, 1.0, 1.5, 0.0, -0.5, float("nan"), True, "half", None])
def test_ranks_that_mean_nothing_are_refused(rank):
    with pytest.raises(ValueError, match="a share of the break-even rank"):
        greenformers(mlp(), rank)


def test_other_bad_input_is_named():
    model = mlp()
    with pytest.raises(InputError, match="method 'nmf'; it is one of svd, snmf, random"):
        greenformers(model, 0.5, "nmf")
    with pytest.raises(InputError, match="no layer is named like 'encoder"):
        greenformers(model, {"*": 3, "encoder.*": 4})
    with pytest.raises(InputError, match="is named like 'x'"):
        greenformers(model, 0.5, include="x")
    model[2].weight.data[0, 0] = float("inf")
    for method in ("svd", "snmf"):
        with pytest.raises(ValueError, match="2: the weight holds NaN or infinite"):
            greenformers(model, 0.5, method)


def test_heads_and_embeddings_of_language_models_stay_dense():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    small = greenformers(transformers.GPT2LMHeadModel(config), 0.5, "random")
    assert len(report(small).rows) == 8
    assert small.lm_head.weight is small.transformer.wte.weight


# -- what a factorised model is ----------------------------------------------------------------


def test_it_is_saved_pickled_and_compiled(tmp_path):
    model = mlp()
    small, x = greenformers(model, 0.5), torch.randn(3, 64)
    shells = factorize(mlp(), greenformers_plan(model, 0.5), init=False)
    shells.load_state_dict(small.state_dict())
    assert torch.equal(shells(x), small(x))
    assert torch.equal(load(save(small, tmp_path / "m"), into=mlp())(x), small(x))
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.parametrize("method", ["svd", "random"])
def test_all_of_it_is_trained(method):
    small = greenformers(mlp(torch.float64), 0.3, method)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    x = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in small.parameters()]
    losses = []
    for _ in range(20):
        loss = (small(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(small.parameters(), before, strict=True))


def test_numpys_numbers_are_ranks():
    model = nn.Sequential(nn.Linear(64, 64))
    for rank, plain in ((np.int64(4), 4), (np.float32(0.5), 0.5)):
        assert greenformers_plan(model, rank) == greenformers_plan(model, plain)


def test_a_matrix_and_its_way_back_unpack():
    conv = nn.Conv2d(3, 8, 5)
    matrix, fold = matricise(conv)
    assert torch.equal(fold(matrix), conv.weight)
