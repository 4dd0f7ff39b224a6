"""What LoRAPro refuses, warns of, and lets through."""

import copy

import pytest
import torch
from lora_cases import Model, build, pair, train
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim.lora_pairs import LoraPair
from fullrank.optim.lora_pro import LoRAPro, create_lorapro_optimizer


def test_half_a_pair_is_refused_before_anything_changes():
    model, optimizer = build()
    train(model, optimizer, range(1))
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model.one.lora_A["default"].weight.grad = torch.ones(3, 20)
    with pytest.raises(InputError, match=r"B of one \(default\) has no gradient"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.state[model.one.lora_A["default"].weight]["step"] == 1


def test_a_pair_without_gradients_rests():
    model, optimizer = build()
    train(model, optimizer, range(1))
    before = model.two.lora_A["default"].weight.detach().clone()
    optimizer.zero_grad()
    for half in (model.one.lora_A, model.one.lora_B):
        half["default"].weight.grad = torch.ones_like(half["default"].weight)
    optimizer.step()
    assert torch.equal(model.two.lora_A["default"].weight, before)


def test_frozen_halves_are_refused():
    model = Model()
    model.two.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(InputError, match="only one half"):
        LoRAPro(model)


def test_frozen_pairs_are_left_alone():
    model = Model()
    model.two.requires_grad_(False)
    assert [p.name for p in LoRAPro(model).pairs] == ["one (default)", "three (default)"]


def test_factors_that_are_replaced_by_flat_shards_are_refused():
    _, optimizer = build()
    flat = nn.Parameter(torch.zeros(100))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(100)
    with pytest.raises(InputError, match="ZeRO"):
        optimizer.step()


def test_embeddings_and_experts_are_announced_and_stepped_plainly():
    model = Model()
    model.words = nn.Module()
    model.words.lora_embedding_A = nn.ParameterDict({"default": torch.randn(2, 30)})
    model.words.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(8, 2)})
    model.two.num_experts = 2
    with pytest.warns(UserWarning, match=r"two \(default\) and 1 more are no plain pair"):
        optimizer = LoRAPro(model)
    assert len(optimizer.pairs) == 2
    assert sum(p is model.words.lora_embedding_A["default"] for p in
               optimizer.param_groups[1]["params"]) == 1  # fmt: skip


A, B = torch.zeros(2, 5), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("pairs", "options", "says"),
    [
        ([], {}, "no trainable LoRA pair"),
        (nn.Linear(3, 3), {}, "no trainable LoRA pair"),
        ([A, B], {}, "item 0 is Tensor"),
        ([(A, B)], {}, "expected"),
        ([(A, "B", 1.0)], {}, "must be tensors"),
        ([(A, B, 0.0)], {}, "scaling=0"),
        ([(A, B, float("inf"))], {}, "scaling=inf"),
        ([(B, A, 1.0)], {}, "expected"),
        ([(A, torch.zeros(8), 1.0)], {}, "flattened or sharded"),
        ([(torch.zeros(0, 5), torch.zeros(4, 0), 1.0)], {}, "flattened or sharded"),
        ([(A, B.double(), 1.0)], {}, "agree"),
        ([(A, B, 1.0), (A, torch.zeros(7, 2), 1.0)], {}, "two pairs"),
        ([(A, B, 1.0)], {"optimizer": "adam"}, "optimizer="),
        ([(A, B, 1.0)], {"mode": "half"}, "mode="),
        ([(A, B, 1.0)], {"x": None}, "x=None"),
        ([(A, B, 1.0)], {"lr": -1.0}, "lr"),
        ([(A, B, 1.0)], {"betas": (0.9, 1.0)}, "betas"),
        ([(A, B, 1.0)], {"weight_decay": -0.1}, "weight_decay"),
        ([(A, B, 1.0)], {"delta": -1e-8}, "delta"),
        ([(A, B, 1.0)], {"state_dtype": torch.int8}, "state_dtype"),
        ([(A, B, 1.0)], {"decay_base": True}, "no base weight"),
        ([(A, B, 1.0, torch.zeros(4, 5, dtype=torch.uint8))], {"decay_base": True}, "uint8"),
        ([(A, B, 1.0)], {"nonfinite": "hope"}, "nonfinite"),
    ],
)
def test_bad_input(pairs, options, says):
    with pytest.raises(InputError, match=says):
        LoRAPro(pairs, **options)


def test_sparse_and_complex_are_refused():
    A, B = pair()
    optimizer = LoRAPro([(A, B, 1.0)])
    A.grad, B.grad = torch.ones_like(A).to_sparse(), torch.ones_like(B)
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    wild = [nn.Parameter(torch.zeros(shape, dtype=torch.complex64)) for shape in ((2, 5), (4, 2))]
    with pytest.raises(InputError, match="complex"):
        LoRAPro([(*wild, 1.0)])


def test_momentum_is_no_argument():
    with pytest.raises(TypeError, match="momentum"):
        LoRAPro([(*pair(), 1.0)], optimizer="sgd", momentum=0.9)


def test_pairs_as_dicts_and_objects():
    first, second = pair(), pair()
    optimizer = LoRAPro(
        [
            {"A": first[0], "B": first[1], "scaling": 2.0},
            LoraPair(*second, 3.0, name="mine"),
        ]
    )
    assert [p.scaling for p in optimizer.pairs] == [2.0, 3.0]
    assert optimizer.pairs[1].name == "mine"


def test_the_factory_names_parameters():
    optimizer = create_lorapro_optimizer(Model(), lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["param_names"][0] == "one.lora_A.default.weight"
    assert optimizer.param_groups[1]["param_names"] == ["norm.weight", "norm.bias"]
