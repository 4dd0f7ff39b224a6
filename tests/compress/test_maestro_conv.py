"""Maestro on convolutions: the official layer's numbers, every setting, rank zero, batch norm."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress.layers_conv import LowRankConv1d, LowRankConv2d
from fullrank.compress.maestro import Maestro
from fullrank.core.errors import InputError

FOLDER = Path(__file__).parents[1] / "reference" / "maestro"
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def close(got, wanted):
    torch.testing.assert_close(got.detach(), wanted, **TIGHT)


@pytest.mark.parametrize("name", ["conv_0", "conv_1"])
def test_official_layer(name):
    with np.load(FOLDER / f"{name}.npz") as stored:
        d = {key: torch.tensor(stored[key]) for key in stored.files}
    N, C, *kernel = d["weight"].shape
    window = {key: tuple(d[key].tolist()) for key in ("stride", "padding", "dilation")}
    dense = nn.Conv2d(C, N, tuple(kernel), **window).double()
    dense.weight.data, dense.bias.data = d["weight"].clone(), d["bias"].clone()
    maestro = Maestro(nn.Sequential(dense))
    layer = maestro.layers["0"]
    assert layer.full_rank == int(d["inner_dim"])
    close(layer(d["x"]), d["y_dense"])
    close(layer.merged_weight(), d["product"])
    layer.first.data, layer.second.data = d["first"].clone(), d["second"].clone()
    for rank in d["ranks"].tolist():
        with maestro.sample("0", rank):
            close(layer(d["x"]), d[f"y_rank{rank}"])
    for kind, hierarchical in {"plain": False, "hier": True}.items():
        close(layer.group_lasso(hierarchical), d[f"gl_{kind}"])
        close(layer.importance(hierarchical), d[f"imp_{kind}"])
    maestro.eps = float(d["threshold_hier"])
    maestro.shrink()
    assert torch.equal(layer.kept, d["keep_mask_hier"])
    close(layer(d["x"]), d["y_after_hier"])
    for merge in (True, False):
        close(maestro.export(merge)[0](d["x"]), d["y_after_hier"])
    maestro.prune()
    close(layer(d["x"]), d["y_after_hier"])


SETTINGS = [
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "dilation": (2, 1), "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_at_every_rank(settings):
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 5, **settings).double()
    maestro = Maestro(nn.Sequential(copy.deepcopy(dense)))
    layer = maestro.layers["0"]
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    U, S, Vh = torch.linalg.svd(dense.weight.detach().flatten(1), full_matrices=False)
    for rank in range(6):
        maestro.set_ranks({"0": rank})
        cut = copy.deepcopy(dense)
        cut.weight.data = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).view_as(dense.weight)
        torch.testing.assert_close(layer(x), cut(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(maestro.export()(x), cut(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_is_the_bias_at_any_size(bias):
    maestro = Maestro(nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, bias=bias)))
    layer = maestro.layers["0"]
    maestro.set_ranks({"0": 0})
    for size in ((1, 3, 7, 9), (4, 3, 3, 5), (3, 7, 7)):
        got = maestro.model(torch.randn(size))
        wanted = layer.bias if bias else torch.zeros(5)
        assert torch.equal(got, wanted[:, None, None].expand(got.shape))
    maestro.model(torch.randn(1, 3, 7, 9)).sum().backward()
    assert not layer.first.grad.any()
    maestro.set_ranks()
    maestro.eps = 1e9
    maestro.shrink()
    maestro.prune()
    assert torch.equal(maestro.model(torch.randn(3, 7, 7)), got)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    maestro = Maestro(nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1).double()))
    named = dict(maestro.model.named_parameters())
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)

    def run(*values):
        state = dict(zip(named, values, strict=True))
        return torch.func.functional_call(maestro.model, state, (x,))

    with maestro.sample("0", 2):
        values = [p.detach().clone().requires_grad_() for p in named.values()]
        assert torch.autograd.gradcheck(run, values)


def residual_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def train(maestro, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 1, 8, 8, generator=generator)
        y = torch.randint(3, (6,), generator=generator)
        with maestro.sample():
            loss = nn.functional.cross_entropy(maestro.model(x), y) + maestro.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 2:
            maestro.shrink()


def test_which_layers_and_what_is_exported():
    maestro = Maestro(residual_net())
    assert list(maestro.layers) == ["0", "3", "8"]
    with pytest.raises(InputError, match=r"'5' is a Conv2d; .* in one group"):
        Maestro(residual_net(), include="5")
    plan = maestro.set_ranks({"0": 2, "3": 1, "8": 1})
    assert [entry.scheme for entry in plan.values()] == ["channel", "channel", "linear"]
    assert plan["3"].shape == (8, 54)
    exported = maestro.export()
    assert type(exported[3]) is LowRankConv2d
    maestro.model.eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(exported.eval()(x), maestro.model(x))
    one = Maestro(nn.Sequential(nn.Conv1d(4, 6, 3)))
    one.set_ranks({"0": 2})
    assert type(one.export()[0]) is LowRankConv1d


def test_resume_is_bit_equal(tmp_path):
    def made():
        maestro = Maestro(residual_net(), lam=0.05, eps=0.3)
        return maestro, torch.optim.SGD(maestro.model.parameters(), lr=0.05, momentum=0.9)

    whole, optimizer = made()
    train(whole, optimizer, 10)
    assert whole.layers["3"].full_rank < 8
    half, optimizer = made()
    train(half, optimizer, 4)
    half.prune(optimizer)
    states = [half.model.state_dict(), optimizer.state_dict(), half.state_dict()]
    torch.save(states, tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    train(half, optimizer, 6, start=4)
    again, optimizer = made()
    for part, state in zip((again.model, optimizer, again), states, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, 6, start=4)
    one, two = half.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_batch_norm_after_a_convolution_is_recalibrated():
    maestro = Maestro(residual_net())
    maestro.set_ranks({"0": 1})
    x = torch.randn(8, 1, 8, 8)
    maestro.recalibrate_bn([x[:4], x[4:]])
    mean = maestro.model[0](x).mean((0, 2, 3))
    torch.testing.assert_close(maestro.model[1].running_mean, mean)
