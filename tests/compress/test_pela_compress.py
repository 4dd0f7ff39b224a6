"""PELA: one backbone compressed: official splits, what stays dense, files, hidden states."""

import copy

import numpy as np
import pytest
import torch
from pela_cases import Net, arrays, batch, pair
from torch import nn

from fullrank.compress import load, report, save
from fullrank.compress.pela import OMITTED, pela_compress, pela_plan
from fullrank.compress.pela_features import Features
from fullrank.compress.pela_loss import PELALoss
from fullrank.core.errors import InputError
from fullrank.core.rank_rules import ParamRatio


def test_ranks_are_the_official_ones():
    for inputs, outputs, ratio, rank in arrays("rank_rule")["table"].tolist():
        got = ParamRatio(ratio)(np.empty(0), int(outputs), int(inputs))
        assert (got or 0) == int(rank)


@pytest.mark.parametrize("name", ["split_0", "split_1", "split_2"])
def test_official_splits(name):
    d = arrays(name)
    m, n = d["W"].shape
    linear = nn.Linear(n, m, dtype=torch.float64)
    linear.weight.data, linear.bias.data = d["W"].clone(), d["bias"].clone()
    layer = pela_compress(nn.Sequential(linear), float(d["compress_ratio"]))[0]
    assert layer.rank == int(d["rank"])
    torch.testing.assert_close(layer.merged_weight(), d["BA"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer(d["x"]), d["y"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.second.norm(dim=0), d["colnorm_B"], rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.first.norm(dim=1), d["rownorm_A"], rtol=1e-9, atol=0)
    error = (layer.merged_weight() - d["W"]).square().mean()
    torch.testing.assert_close(error, d["mse_error"], rtol=1e-9, atol=0)


# -- compressing -----------------------------------------------------------------------------


def test_what_is_left_dense_and_why():
    model = nn.ModuleDict(
        {
            "patch_embed": nn.Linear(48, 32),
            "head": nn.Linear(32, 40),
            "match": nn.Linear(32, 2),
            "fc": nn.Linear(32, 40),
            "thin": nn.Linear(2, 40),
        }
    )
    plan = pela_plan(model, 2.0)
    assert {name: entry.rank for name, entry in plan.items()} == {
        "match": None,
        "fc": 8,
        "thin": None,
    }
    assert "fewer than 10 outputs" in plan["match"].reason
    assert "left dense" in plan["thin"].reason
    # The official patterns may match nothing, the user's own may not.
    assert set(pela_plan(model, 2.0, (*OMITTED, "thin"))) == {"match", "fc"}
    with pytest.raises(InputError, match="named like 'conv"):
        pela_plan(model, 2.0, (*OMITTED, "conv*"))
    student = pela_compress(model)
    assert [row[0] for row in report(student).rows] == ["fc"]
    assert type(model["fc"]) is nn.Linear


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (17, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    linear = nn.Linear(*shape, bias=False, dtype=dtype)
    linear.weight.data = linear.weight.data.T.contiguous().T
    layer = pela_compress(nn.Sequential(linear), 2.0)[0]
    assert layer.first.dtype == dtype
    assert layer.bias is None
    assert layer(torch.randn(1, shape[0], dtype=dtype)).shape == (1, shape[1])
    kept = layer.first.numel() + layer.second.numel()
    assert kept <= linear.weight.numel() / 2


def test_a_frozen_model_gives_a_trainable_student():
    teacher = Net().requires_grad_(False)
    student = pela_compress(teacher)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert pela_compress(teacher, inplace=True) is teacher


def test_a_teacher_may_be_partly_factorised():
    torch.manual_seed(0)
    teacher = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))
    teacher = pela_compress(teacher, include="1")
    student = pela_compress(teacher, 4.0)
    assert [layer.rank for layer in student] == [3, 6, 3]
    loss = PELALoss(student, teacher, alpha=0.0, eps=0.0)
    with torch.no_grad():
        student[1].first.mul_(1.5)
    errors = [
        (s.merged_weight() - t.weight).abs().max() for s, t in zip(student, teacher, strict=True)
    ]
    assert float(loss.perturbation()) == pytest.approx(
        float(torch.stack(errors).square().mean()), rel=1e-4
    )


def test_saved_and_rebuilt_without_svd(tmp_path):
    teacher, student = pair(torch.float32)
    for parameter in student.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    save(student, tmp_path / "student")
    x = batch(dtype=torch.float32)[0]
    rebuilt = load(tmp_path / "student", into=copy.deepcopy(teacher))
    assert torch.equal(rebuilt(x), student(x))
    shell = pela_compress(teacher, init=False)
    shell.load_state_dict(student.state_dict())
    assert torch.equal(shell(x), student(x))


@pytest.mark.parametrize("ratio", [0.5, float("nan")])
def test_bad_ratios(ratio):
    with pytest.raises(InputError, match="compression ratio"):
        pela_compress(Net(), ratio)


def test_nothing_shrinks_or_a_weight_is_broken():
    with pytest.raises(InputError, match="no layer would shrink at ratio 1000"):
        pela_compress(Net(), 1000.0)
    broken = Net()
    broken.blocks[0].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.0\.fc1"):
        pela_compress(broken)


# -- which hidden states ---------------------------------------------------------------------


def test_choice_of_hidden_states():
    torch.manual_seed(0)
    model = Net(blocks=3).double()
    x = batch()[0]

    def shapes(which):
        return Features(model, which).run(x, lambda m, b: m(b))[1]

    every = shapes("all")
    assert len(every) == 3
    assert torch.equal(shapes("last")[0].value, every[2].value)
    first, third = shapes([0, -1])
    assert torch.equal(first.value, every[0].value)
    assert torch.equal(third.value, every[2].value)
    assert len(shapes("blocks.*.fc1")) == 3
    assert shapes("blocks.*.fc1")[0].value.shape == (4, 3, 24)
    # Nobody is watched afterwards.
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("layers.*", "no module is named like 'layers"),
        ([], "hidden_states=\\[\\]"),
        ([7], "the model has 2 blocks"),
        ([0, "blocks.0"], "hidden_states="),
    ],
)
def test_hidden_states_that_are_not_there(which, message):
    with pytest.raises(InputError, match=message):
        Features(Net(), which).run(torch.zeros(1, 3, 16), lambda m, b: m(b))


def test_a_model_without_blocks_says_so():
    teacher = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    with pytest.raises(InputError, match="no row of blocks"):
        PELALoss(pela_compress(teacher), teacher)
    loss = PELALoss(pela_compress(teacher), teacher, hidden_states="1")
    assert loss(torch.randn(2, 24)) > 0
