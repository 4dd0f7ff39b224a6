"""What tuners of ours share, on one made here: the least that a tuner has to say."""

import copy
import pickle
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from fullrank.adapters.export import to_lora  # noqa: E402
from fullrank.adapters.lora_files import LowRank  # noqa: E402
from fullrank.adapters.registration import TUNERS, make_known, register_tuner  # noqa: E402
from fullrank.adapters.tuner import TunerModel  # noqa: E402
from fullrank.adapters.tuner_config import TunerConfig  # noqa: E402
from fullrank.adapters.tuner_layer import Held, TunerLayer  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402

NEAR = {"rtol": 1e-5, "atol": 1e-6}


@dataclass
class MiniConfig(TunerConfig):
    r: int = 2
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    choices: ClassVar = {"bias": ("none", "all", "mini_only")}
    patterns: ClassVar = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self):
        super().__post_init__()
        self.check_whole("r", 1)


class MiniLinear(TunerLayer):
    """``B diag(f) A`` and a shift, which is ``W0 1`` times a number: of the original weight."""

    held = (
        Held("mini_A", trained=True),
        Held("mini_B", trained=True),
        Held("mini_shift", trained=True),
        Held("mini_f"),
        Held("mini_seen", saved=False),
    )
    beside = ("notes",)

    def make(self, adapter_name, config):
        out, width = self.shape
        self.mini_A[adapter_name] = nn.Parameter(torch.randn(config.r, width))
        self.mini_B[adapter_name] = nn.Parameter(torch.randn(out, config.r))
        self.mini_shift[adapter_name] = nn.Parameter(torch.ones(1))
        self.mini_f[adapter_name] = torch.linspace(0.1, 0.7, config.r)
        self.mini_seen[adapter_name] = torch.zeros((), dtype=torch.int64)
        self.notes[adapter_name] = "kept"

    def add_update(self, adapter_name, result, x, base):
        A, B = self.to_lora(adapter_name)
        return result + x @ A.T @ B.T + self.get_delta_bias(adapter_name)

    def to_lora(self, adapter_name):
        B = self.mini_B[adapter_name] * self.mini_f[adapter_name]
        return LowRank(self.mini_A[adapter_name], self.scaling[adapter_name] * B)

    def get_delta_bias(self, adapter_name):
        return self.mini_shift[adapter_name] * self.original()[0].float().sum(1)


class MiniModel(TunerModel):
    prefix = "mini_"
    tuner_layer_cls = MiniLinear
    title = "Mini"


register_tuner("fullrank_mini", MiniConfig, MiniModel)


def base(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 7)).to(dtype)


def tuned(model=None, **options):
    torch.manual_seed(1)
    options = {"target_modules": ["0", "2"]} | options
    return peft.get_peft_model(base() if model is None else model, MiniConfig(**options))


def rows(dtype=torch.float32):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_merged_and_made_and_taken_away(bias):
    model = tuned(base(bias=bias))
    with pytest.raises(InputError, match="0: the update comes with a bias"):
        to_lora(model)
    before = copy.deepcopy(model.state_dict())
    expected = model(rows())
    model.merge_adapter(safe_merge=True)
    assert model.base_model.model[0].base_layer.bias is not None
    torch.testing.assert_close(model(rows()), expected, **NEAR)
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(rows()), expected, **NEAR)


def test_adapters_merged_one_after_another_see_the_original_weight():
    model = tuned()
    model.add_adapter("b", MiniConfig(r=3, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "b"])
    before, expected = copy.deepcopy(model.state_dict()), model(rows())
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(rows()), expected, **NEAR)
    with model.disable_adapter():  # which takes everything out again
        torch.testing.assert_close(model(rows()), base()(rows()), rtol=0, atol=0)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_narrow_base_rounds_nothing_of_the_adapter_and_comes_back_from_merging(tmp_path):
    model = tuned(base(torch.bfloat16), r=4)
    layer = model.base_model.model[0]
    assert torch.equal(layer.mini_f["default"], torch.linspace(0.1, 0.7, 4))
    assert layer.mini_seen["default"].dtype == torch.int64
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert not torch.equal(layer.base_layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(torch.bfloat16), tmp_path)
    x = rows(torch.bfloat16)
    assert torch.equal(again(x), model(x))


def test_files_hold_what_is_to_be_saved(tmp_path):
    from safetensors.torch import load_file

    model = tuned()
    model.save_pretrained(tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"mini_A", "mini_B", "mini_shift", "mini_f"}
    assert "FULLRANK_MINI" in (tmp_path / "README.md").read_text()


def test_an_optimizer_keeps_its_parameters_when_an_adapter_is_moved():
    model = tuned()
    layer = model.base_model.model[0]
    held = layer.mini_A["default"]
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.mini_A["default"] is held
    assert held.requires_grad


def test_patterns_give_layers_settings_of_their_own():
    model = tuned(alpha=4, rank_pattern={"2": 3}, alpha_pattern={"0": 1})
    first, second = model.base_model.model[0], model.base_model.model[2]
    assert (first.r["default"], second.r["default"]) == (2, 3)
    assert (first.scaling["default"], second.scaling["default"]) == (1 / 2, 4 / 3)
    assert [tuple(x.to_lora("default").B.shape) for x in (first, second)] == [(5, 2), (7, 3)]
    with pytest.raises(InputError, match="2 is 7 x 5: a rank of 6 is above 5"):
        tuned(rank_pattern={"2": 6})
    with pytest.raises(InputError, match=r"r=1\.5"):
        tuned(rank_pattern={"2": 1.5})


def test_deleting_leaves_nothing():
    model = tuned()
    model.add_adapter("b", MiniConfig(target_modules=["0"]))
    model.delete_adapter("b")
    layer = model.base_model.model[0]
    for name in (*layer.adapter_layer_names, *layer.other_param_names, "notes"):
        assert list(getattr(layer, name)) == ["default"]


def test_a_file_of_another_base_or_other_layers_is_refused(tmp_path):
    tuned(target_modules=["0"]).save_pretrained(tmp_path / "one")
    tuned().save_pretrained(tmp_path / "both")

    def load(name, model):
        return peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path / name))

    with pytest.raises(InputError, match="the file holds nothing for 2; load it on the base"):
        load("one", tuned())
    with pytest.raises(InputError, match="the file is also for 2, not here"):
        load("both", tuned(target_modules=["0"]))
    wide = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 7))
    with pytest.raises(InputError, match=r"tensor for 0 is \(2, 6\), not \(2, 8\)"):
        peft.PeftModel.from_pretrained(wide, tmp_path / "both")
    assert load("both", tuned()).unexpected_keys == []


def test_layers_that_are_not_linear_are_refused_and_nothing_is_changed():
    model = base()
    with pytest.raises(InputError, match="1 is a Tanh: Mini is for linear layers"):
        tuned(model, target_modules=["0", "1"])
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())
    kept = tuned(model)
    with pytest.raises(InputError, match="a rank of 9"):
        kept.add_adapter("b", MiniConfig(r=9, target_modules=["0"]))
    assert list(kept.peft_config) == ["default"]
    kept.add_adapter("b", MiniConfig(target_modules=["0"]))


def test_types_are_members_that_travel():
    kind = register_tuner("fullrank_mini", MiniConfig, MiniModel)  # a second time: nothing happens
    assert kind is peft.PeftType("FULLRANK_MINI")
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert copy.deepcopy(kind) is kind
    for name in TUNERS:
        make_known(name)
        assert name in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    make_known("LORA")
