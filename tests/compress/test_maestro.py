"""Maestro: the official layers' numbers and training, sampling, gradients, shapes."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import LowRankLinear, load, save
from fullrank.compress.maestro import Maestro
from fullrank.compress.maestro_sampler import PairSampler
from fullrank.core.errors import InputError, StoreError

FOLDER = Path(__file__).parents[1] / "reference" / "maestro"
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.tensor(stored[key]) for key in stored.files}


def linear_case(name, **options):
    """The stored dense layer under Maestro: the controller, the layer, the numbers."""
    d = arrays(name)
    m, n = d["W"].shape
    dense = nn.Linear(n, m, dtype=torch.float64)
    dense.weight.data, dense.bias.data = d["W"].clone(), d["bias"].clone()
    maestro = Maestro(nn.Sequential(dense), **options)
    return d, maestro, maestro.layers["0"]


def perturbed(d, layer):
    layer.first.data, layer.second.data = d["A"].clone(), d["B"].clone()


def close(got, wanted):
    torch.testing.assert_close(got.detach(), wanted, **TIGHT)


LINEAR = ["linear_0", "linear_1", "linear_2"]


# -- official numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_fresh_decomposition(name):
    d, _, layer = linear_case(name)
    assert layer.full_rank == layer.rank == int(d["inner_dim"])
    close(layer.merged_weight(), d["product"])
    close(layer.second.norm(dim=0), d["col_norm_out"])
    close(layer.first.norm(dim=1), d["row_norm_in"])


@pytest.mark.parametrize("name", LINEAR)
def test_prefixes_norms_and_their_gradients(name):
    d, maestro, layer = linear_case(name)
    perturbed(d, layer)
    close(layer(d["x"]), d["y_full"])
    for rank in d["ranks"].tolist():
        with maestro.sample("0", rank):
            close(layer(d["x"]), d[f"y_rank{rank}"])
    for kind, hierarchical in {"plain": False, "hier": True}.items():
        lasso = layer.group_lasso(hierarchical)
        close(lasso, d[f"gl_{kind}"])
        close(layer.importance(hierarchical), d[f"imp_{kind}"])
        grads = torch.autograd.grad(lasso.sum(), [layer.first, layer.second])
        close(grads[0], d[f"gl_grad_A_{kind}"])
        close(grads[1], d[f"gl_grad_B_{kind}"])


@pytest.mark.parametrize("name", LINEAR)
def test_shrinking(name):
    d, maestro, layer = linear_case(name)
    perturbed(d, layer)
    maestro.eps = float(d["threshold_hier"])
    plan = maestro.shrink()
    assert torch.equal(layer.kept, d["keep_mask_hier"])
    assert layer.full_rank == int(d["kept_hier"]) == plan["0"].options["components"]
    close(layer(d["x"]), d["y_after_hier"])
    bigger = bool(d["factorised_is_bigger"])
    assert (plan["0"].rank is None) is bigger
    exported = maestro.export()[0]
    assert type(exported) is (nn.Linear if bigger else LowRankLinear)
    close(exported(d["x"]), d["y_after_hier"])
    close(exported.weight, d["merged_W"])
    unmerged = maestro.export(merge=False)[0]
    close(unmerged.first, d["pruned_A"])
    close(unmerged.second, d["pruned_B"])
    maestro.prune()
    close(layer.first, d["pruned_A"])
    close(layer.second, d["pruned_B"])


@pytest.mark.parametrize("name", LINEAR)
def test_plain_norms_keep_what_need_not_be_a_prefix(name):
    d, maestro, layer = linear_case(name, hierarchical=False, eps=1e-5)
    perturbed(d, layer)
    maestro.eps = float(d["threshold_plain"])
    maestro.shrink()
    assert torch.equal(layer.kept, d["keep_mask_plain"])
    close(layer(d["x"]), d["y_after_plain"])
    with maestro.sample("0", 2):
        close(layer(d["x"]), d["y_after_plain_rank2"])
    maestro.set_ranks({"0": 2})
    close(maestro.export()[0](d["x"]), d["y_after_plain_rank2"])
    maestro.set_ranks()
    maestro.prune()
    close(layer(d["x"]), d["y_after_plain"])


@pytest.mark.parametrize("name", ["train_0", "train_1"])
def test_official_training(name):
    d = arrays(name)
    sizes = [d["W1"].shape[1], d["W1"].shape[0], d["W2"].shape[0]]
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()
    maestro = Maestro(model, lam=float(d["lam"]), eps=float(d["threshold"]))
    names = ["0", "2"]
    for i, layer in enumerate(maestro.layers.values(), 1):
        layer.first.data = d[f"init_l{i}_in_network_weight"].clone()
        layer.second.data = d[f"init_l{i}_out_network_weight"].clone()
        layer.bias.data = d[f"init_l{i}_out_network_bias"].clone()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=float(d["lr"]),
        momentum=float(d["momentum"]),
        weight_decay=float(d["weight_decay"]),
    )
    cross_entropy = nn.functional.cross_entropy
    recorded = {int(step): i for i, step in enumerate(d["recorded_steps"])}
    for step, (x, y) in enumerate(zip(d["X"], d["Y"], strict=True)):
        index, rank = d["draws"][step].tolist()
        optimizer.zero_grad()
        loss = maestro.penalty()
        target = y
        if bool(d["full_pass"]):
            full = model(x)
            loss = loss + cross_entropy(full, y)
            target = full.detach().softmax(1)
        with maestro.sample(names[index], rank):
            loss = loss + cross_entropy(model(x), target)
        torch.testing.assert_close(loss.detach(), d["losses"][step], rtol=1e-8, atol=1e-12)
        loss.backward()
        optimizer.step()
        if (step + 1) % int(d["shrink_every"]) == 0:
            maestro.shrink()
        assert [layer.full_rank for layer in maestro.layers.values()] == d["kept"][step].tolist()
        if step in recorded:
            for i, layer in enumerate(maestro.layers.values(), 1):
                for key, value in {f"A{i}": layer.first, f"B{i}": layer.second}.items():
                    torch.testing.assert_close(
                        value.detach(), d[key][recorded[step]], rtol=1e-8, atol=1e-11
                    )


def test_official_sampler_also_visits_each_pair_once():
    d = arrays("sampler")
    widths = d["widths"].tolist()
    official = Counter()
    for row in d["fractions"].tolist():
        layer = next(i for i, fraction in enumerate(row) if fraction >= 0)
        official[layer, round(row[layer] * widths[layer])] += 1
    sampler = PairSampler(dict(enumerate(widths)), seed=0)
    ours = Counter(sampler.draw() for _ in range(len(d["fractions"])))
    assert ours == official


# -- sampling --------------------------------------------------------------------------------


def test_every_rank_of_every_width_is_drawn_once_a_cycle():
    widths = {f"w{width}": width for width in range(1, 513)}
    sampler = PairSampler(widths, seed=5)
    drawn = Counter(sampler.draw() for _ in range(sampler.pairs))
    assert set(drawn) == {(name, b) for name, width in widths.items() for b in range(1, width + 1)}
    assert set(drawn.values()) == {1}


def test_orders_differ_between_cycles_and_seeds_and_repeat_for_one_seed():
    def order(seed, cycles=1):
        sampler = PairSampler({"a": 30, "b": 20}, seed)
        return [sampler.draw() for _ in range(50 * cycles)]

    two = order(0, 2)
    assert two[:50] != two[50:]
    assert sorted(two[:50]) == sorted(two[50:])
    assert order(0) == two[:50]
    assert order(1) not in (two[:50], two[50:])
    generators = [torch.Generator().manual_seed(s) for s in (7, 7, 8)]
    drawn = []
    for generator in generators:
        maestro = Maestro(mlp(), generator=generator)
        with maestro.sample() as pair:
            drawn.append([pair, *(maestro._sampler.draw() for _ in range(20))])
    assert drawn[0] == drawn[1] != drawn[2]


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 6)).to(dtype)


def test_only_the_drawn_layer_is_cut_and_only_meanwhile():
    maestro = Maestro(mlp())
    with maestro.sample() as (name, rank):
        ranks = {other: layer.used_rank for other, layer in maestro.layers.items()}
        expected = {other: layer.full_rank for other, layer in maestro.layers.items()}
        assert ranks == {**expected, name: rank}
    assert all(layer.used_rank == layer.full_rank for layer in maestro.layers.values())
    with pytest.raises(RuntimeError), maestro.sample("0", 3):
        raise RuntimeError
    assert maestro.layers["0"].used_rank == 10


def test_same_function_as_the_dense_model():
    dense = mlp(torch.float64)
    maestro = Maestro(copy.deepcopy(dense))
    x = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(maestro.model(x), dense(x), rtol=1e-12, atol=1e-12)


# -- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("hierarchical", [True, False])
def test_gradients_against_finite_differences(hierarchical):
    maestro = Maestro(mlp(torch.float64), lam=0.3, hierarchical=hierarchical)
    maestro.eps = 1.0 if hierarchical else 0.15
    maestro.shrink()
    named = dict(maestro.model.named_parameters())
    x = torch.randn(4, 10, dtype=torch.float64)
    y = torch.randint(6, (4,))

    def loss(*values):
        state = dict(zip(named, values, strict=True))
        output = torch.func.functional_call(maestro.model, state, (x,))
        for (name, layer), pair in zip(maestro.layers.items(), [(0, 1), (3, 4)], strict=True):
            assert name in ("0", "2")
            assert layer.first.shape == values[pair[0]].shape
        return nn.functional.cross_entropy(output, y)

    with maestro.sample("0", 4):
        points = [p.detach().clone().requires_grad_() for p in named.values()]
        assert torch.autograd.gradcheck(loss, points)
    layer = maestro.layers["0"]

    def lasso(first, second):
        with torch.no_grad():
            layer.first.set_(first)
        state = {"first": first, "second": second}
        return torch.func.functional_call(
            Lasso(layer, hierarchical), {f"layer.{k}": v for k, v in state.items()}
        )

    first, second = (p.detach().clone().requires_grad_() for p in (layer.first, layer.second))
    assert torch.autograd.gradcheck(lasso, (first, second))


class Lasso(nn.Module):
    def __init__(self, layer, hierarchical):
        super().__init__()
        self.layer, self.hierarchical = layer, hierarchical

    def forward(self):
        return self.layer.group_lasso(self.hierarchical)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_zero_tails_have_finite_gradients(hierarchical):
    maestro = Maestro(mlp(), lam=1.0, hierarchical=hierarchical)
    layer = maestro.layers["0"]
    layer.first.data[4:] = 0
    layer.second.data[:, 6:] = 0
    maestro.penalty().backward()
    for parameter in (layer.first, layer.second):
        assert torch.isfinite(parameter.grad).all()
    assert (layer.first.grad[4:] == 0).all()
    assert (layer.first.grad[:4] != 0).any()


def test_hidden_components_get_no_gradient_from_the_data():
    maestro = Maestro(mlp(), eps=0.5)
    layer = maestro.layers["0"]
    layer.keep(torch.arange(10) < 4)
    maestro.model(torch.randn(3, 10)).sum().backward()
    assert (layer.first.grad[4:] == 0).all()
    assert (layer.second.grad[:, 4:] == 0).all()
    assert (layer.first.grad[:4] != 0).any()


# -- rank zero, dtypes, shapes ---------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_is_the_bias(bias):
    maestro = Maestro(nn.Sequential(nn.Linear(5, 3, bias=bias)))
    layer = maestro.layers["0"]
    plan = maestro.set_ranks({"0": 0})
    assert plan["0"].rank is None
    assert plan["0"].options["components"] == 0
    wanted = layer.bias if bias else torch.zeros(3)
    for shape in ((5,), (1, 5), (2, 7, 5), (0, 5)):
        got = maestro.model(torch.randn(shape))
        assert got.shape == (*shape[:-1], 3)
        assert torch.equal(got, wanted.expand(got.shape))
    maestro.model(torch.randn(2, 5)).sum().backward()
    assert (layer.first.grad == 0).all()
    exported = maestro.export()
    assert exported[0].rank == 1
    assert torch.equal(exported(torch.randn(2, 5)), wanted.expand(2, 3))
    # Shrunk to nothing, it is also pruned to nothing.
    maestro.set_ranks()
    maestro.eps = 1e9
    maestro.shrink()
    maestro.prune()
    assert torch.equal(maestro.model(torch.randn(2, 5)), wanted.expand(2, 3))
    assert torch.isfinite(maestro.penalty())
    with pytest.raises(InputError, match="shrunk to rank 0"), maestro.sample():
        pass


def test_a_model_in_training_is_not_saved(tmp_path):
    maestro = Maestro(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    maestro.set_ranks({"0": 2})
    with pytest.raises(StoreError, match=r"0 is in training by Maestro.*export\(\)"):
        save(maestro.model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    x, small = torch.randn(3, 8), maestro.export()
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    assert torch.equal(load(save(small, tmp_path / "model"), into=dense)(x), small(x))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (13, 7), (7, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    linear = nn.Linear(*shape, dtype=dtype)
    linear.weight.data = linear.weight.data.T.contiguous().T
    maestro = Maestro(nn.Sequential(linear), lam=0.1)
    x = torch.randn(1, shape[0], dtype=dtype)
    with maestro.sample():
        loss = maestro.model(x).float().sum() + maestro.penalty()
    loss.backward()
    assert maestro.penalty().dtype == torch.float32
    assert maestro.layers["0"].first.grad.dtype == dtype


def test_an_all_zero_weight_can_be_trained():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    maestro = Maestro(model, lam=0.1)
    (maestro.model(torch.randn(2, 4)).sum() + maestro.penalty()).backward()
    layer = maestro.layers["0"]
    assert torch.isfinite(layer.first.grad).all()
    assert layer.first.grad.any()
