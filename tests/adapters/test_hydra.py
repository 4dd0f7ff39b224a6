"""Hydra as a tuner: what is its own beside the matrix of tests."""

import subprocess
import sys

import pytest
import torch

peft = pytest.importorskip("peft")

from cases import shaken  # noqa: E402
from small_net import TARGETS, net, samples  # noqa: E402
from torch import nn  # noqa: E402

from fullrank.adapters import HydraConfig, adapt, save_as_lora, to_lora  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402

IDS = samples()["ids"]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def tuned(kind="linear", model=None, **options):
    config = HydraConfig(**{"r": 2, "target_modules": TARGETS, **options})
    return peft.get_peft_model(model or net(kind), config)


def without_bias():
    model = net()
    model.wide.bias = None
    return model


def layer(model):
    return model.base_model.model.wide


@pytest.mark.parametrize("ranks", [(2, 2), (3, 0), (0, 1)])
def test_either_branch_may_be_left_out(ranks):
    model = tuned(r=None, r_parallel=ranks[0], r_sequential=ranks[1])
    torch.testing.assert_close(model(IDS), net()(IDS), rtol=0, atol=0)
    expected = ranks[0] * (12 + 20) + ranks[1] * (20 + 20)
    assert sum(p.numel() for p in layer(model).parameters() if p.requires_grad) == expected
    shaken(model)
    before = model(IDS)
    torch.testing.assert_close(model.merge_and_unload()(IDS), before, **NEAR)


def test_the_sequential_branch_sees_the_output_of_the_base_with_its_bias():
    model = shaken(tuned(r=None, r_parallel=0, r_sequential=2, alpha=3.0))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    wide = layer(model)
    h = wide.base_layer(x)
    A, B = wide.hydra_seq_A["default"], wide.hydra_seq_B["default"]
    torch.testing.assert_close(wide(x), h + 1.5 * h @ A.T @ B.T, **NEAR)


def test_dropout_sits_between_the_projections():
    model = shaken(tuned(r=None, r_parallel=2, r_sequential=0, dropout=0.5)).train()
    wide, x = layer(model), torch.randn(4000, 12, generator=torch.Generator().manual_seed(0))
    added = wide(x) - wide.base_layer(x)
    # Two dimensions, each dropped for half of the rows: a quarter gets nothing at all.
    share = float((added.abs().amax(1) < 1e-6).float().mean())
    assert 0.2 < share < 0.3


@pytest.mark.parametrize("init", ["kaiming", "xavier", "normal"])
def test_starts(init):
    torch.manual_seed(0)
    wide = layer(tuned(model=net(), r=9, init=init))
    A = wide.hydra_par_A["default"]
    limit = {"kaiming": 12**-0.5, "xavier": (6 / (9 + 12)) ** 0.5, "normal": 0.1}[init]
    assert A.abs().max() <= limit
    assert A.std() > 0.1 * limit
    assert not wide.hydra_par_B["default"].any()


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("base", [net, without_bias])
def test_merging_makes_a_bias_where_one_is_needed_and_takes_it_away(base, biases):
    model = shaken(tuned(model=base(), branch_bias=biases))
    expected = model(IDS)
    original = layer(model).base_layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected, **NEAR)
    made = layer(model).base_layer.bias is not None
    assert made == (biases or base is net)
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, original)
    assert (layer(model).base_layer.bias is not None) == (base is net)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)


def test_two_merged_adapters_are_both_of_the_original_weight():
    model = shaken(tuned())
    model.add_adapter("b", HydraConfig(r=1, target_modules=TARGETS))
    model.set_adapter("b")
    shaken(model, seed=1)
    model.base_model.set_adapter(["default", "b"])
    expected = model(IDS)
    model.merge_adapter(["default", "b"])
    torch.testing.assert_close(model(IDS), expected, **NEAR)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("base", [net, without_bias])
def test_the_lora_file_holds_the_bias_that_comes_with_it(base, biases, tmp_path):
    model = shaken(tuned(model=base(), branch_bias=biases))
    if base is net or biases:
        with pytest.raises(InputError, match=r"(wide|tall): the update comes with a bias"):
            to_lora(model)
    save_as_lora(model, tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(again(IDS), model(IDS), **NEAR)
    config = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.r == 4
    torch.save(model(IDS), tmp_path / "expected.pt")


@pytest.mark.slow
def test_the_lora_file_loads_in_a_process_without_fullrank(tmp_path):
    model = shaken(tuned())
    save_as_lora(model, tmp_path / "lora")
    torch.save((net().state_dict(), IDS, model(IDS)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, peft\n"
        "from small_net import net\n"
        f"state, ids, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "base = net(); base.load_state_dict(state)\n"
        f"model = peft.PeftModel.from_pretrained(base, {str(tmp_path / 'lora')!r})\n"
        "torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)\n"
        "assert 'fullrank' not in sys.modules\n"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_adapt_shares_the_rank_between_the_branches():
    model = adapt(net(), "hydra", rank=5, targets=TARGETS)
    wide = layer(model)
    assert wide.hydra_par_A["default"].shape == (3, 12)
    assert wide.hydra_seq_A["default"].shape == (2, 20)
    assert wide.scaling["default"] == 1.0
    assert layer(adapt(net(), "hydra", rank=4, alpha=8, targets=TARGETS)).scaling == {"default": 2}


def test_a_quantised_base_runs_and_is_not_merged():
    class Packed(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float() / 100, self.bias)

    base = net()
    packed = Packed(12, 20)
    packed.weight = nn.Parameter((base.wide.weight * 100).to(torch.int8), requires_grad=False)
    base.wide = packed
    model = shaken(tuned(model=base))
    assert model(IDS).isfinite().all()
    with pytest.raises(InputError, match="quantised"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r_parallel": 0, "r_sequential": 0}, "give one of the branches a rank"),
        ({"r_sequential": -1}, "r_sequential=-1"),
        ({"init": "zeros"}, "init"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        HydraConfig(**options)


def test_a_branch_above_the_shorter_side_names_the_layer():
    with pytest.raises(InputError, match=r"wide is 20 x 12: a rank of 13"):
        tuned(r=None, r_parallel=1, r_sequential=13)
