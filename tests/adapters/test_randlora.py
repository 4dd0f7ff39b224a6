"""RandLoRA beyond what the matrix of all adapters holds: its bases, their files, its products."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fullrank.core import PlanError, RankPlan
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fullrank.adapters.randlora import RandLoraConfig  # noqa: E402

NEAR = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Wide, tall, square, and transformers' transposed layer."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(24, 15), nn.Linear(15, 33)
        self.conv = transformers.pytorch_utils.Conv1D(21, 33)
        self.square, self.head = nn.Linear(21, 21), nn.Linear(21, 6, bias=False)

    def forward(self, x):
        x = self.conv(self.tall(self.wide(x).relu()).relu()).relu()
        return self.head(self.square(x).relu())


LAYERS = ["wide", "tall", "conv", "square", "head"]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def rows(count=40, dtype=torch.float32):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(base=None, **options):
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": LAYERS, "init_weights": False} | options
    return peft.get_peft_model(net() if base is None else base, RandLoraConfig(**options))


def train(model, optimizer=None, steps=3):
    x = rows(dtype=next(model.parameters()).dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    return optimizer


def test_a_fresh_adapter_changes_nothing_and_trains_full_rank():
    base, model = net(), adapted(init_weights=True)
    assert torch.equal(model(rows()), base(rows()))
    assert set(model.base_model.delta_rank().values()) == {0}
    # Gamma starts even, so that the update's rank grows with the steps.
    train(model, steps=20)
    ranks = model.base_model.delta_rank()
    assert ranks == {"wide": 15, "tall": 15, "conv": 21, "square": 21, "head": 6}
    for name, weight in base.state_dict().items():
        left, _, right = name.rpartition(".")
        assert torch.equal(
            model.get_base_model().get_submodule(left).base_layer.state_dict()[right], weight
        )


def test_what_is_trained_and_how_much():
    model = adapted(r=4)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    # N (r + a) a layer.
    expected = sum(-(-a // 4) * (4 + a) for a in (15, 15, 21, 21, 6))
    assert sum(trained.values()) == expected
    assert all("randlora_lambda" in n or "randlora_gamma" in n for n in trained)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("options", [{}, {"pairing": "paper"}, {"bases": "sparse", "r": 2}])
def test_outputs_gradients_and_merging_agree(options, count):
    model, x = adapted(**options), rows(count)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "randlora_lambda")}
    assert len(layers) == 5
    for layer in layers.values():
        inputs = torch.randn(count, layer.in_features, requires_grad=True)
        weight = layer.get_base_layer().weight.T if layer.fan_in_fan_out else layer.weight
        update = layer.get_delta_weight("default")
        update = update.T if layer.fan_in_fan_out else update
        expected = nn.functional.linear(inputs, weight + update, layer.bias)
        torch.testing.assert_close(layer(inputs), expected, **NEAR)
        (found,) = torch.autograd.grad(layer(inputs).sum(), inputs)
        torch.testing.assert_close(found, (weight + update).sum(0).expand(count, -1), **NEAR)
    before, original = model(x), copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), before, **NEAR)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, original[name], **NEAR)
    torch.testing.assert_close(model.merge_and_unload()(x), before, **NEAR)


def test_low_memory_gives_the_same_numbers():
    fast, lean = adapted(), adapted(low_memory=True)
    train(fast)
    train(lean)
    for name, tensor in fast.state_dict().items():
        torch.testing.assert_close(lean.state_dict()[name], tensor, **NEAR)


@pytest.mark.parametrize("stored", ["once", "none"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_gives_the_same_model(tmp_path, stored, lazy):
    model = adapted(save_projection=stored, projection_key=7, basis_dtype=torch.bfloat16)
    train(model)
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.projection_key, config.basis_dtype) == (4, 7, "bfloat16")
    again = peft.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=lazy)
    assert torch.equal(again(rows()), model(rows()))
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")
    assert torch.equal(again(rows()), model(rows()))
    keys = load_file(tmp_path / "adapter_model.safetensors")
    held = {key.rpartition(".")[2] for key in keys if "randlora_bases" in key}
    assert held == ({"checksum"} if stored == "none" else {"A", "B", "checksum"})


def test_another_key_or_base_is_an_error(tmp_path):
    model = adapted(save_projection="none")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"projection_key": 1}))
    with pytest.raises(InputError, match="key 1"):
        peft.PeftModel.from_pretrained(net(), tmp_path)
    path.write_text(json.dumps(config))
    other = net()
    other.tall = nn.Linear(15, 34)
    other.conv = transformers.pytorch_utils.Conv1D(21, 34)
    with pytest.raises(InputError, match="same target layers"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_adapters_of_other_ranks_keys_and_larger_targets_side_by_side(tmp_path):
    model = adapted(r=3, target_modules=["head", "wide"])
    model.add_adapter(
        "b", RandLoraConfig(r=5, projection_key=3, target_modules=LAYERS, init_weights=False)
    )
    model.add_adapter("c", RandLoraConfig(r=2, bases="sparse", target_modules=["square"]))
    x = rows()
    first = model(x)
    model.set_adapter("b")
    second = model(x)
    alone = adapted(r=5, projection_key=3)
    state = peft.get_peft_model_state_dict(model, adapter_name="b")
    peft.set_peft_model_state_dict(alone, state)
    torch.testing.assert_close(alone(x), second, **NEAR)
    model.base_model.set_adapter(["default", "b"])
    both = model(x)
    both.sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, **NEAR)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), both, **NEAR)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "b")
    torch.testing.assert_close(again(x), second, **NEAR)
    model.set_adapter("default")
    model.delete_adapter("b")
    torch.testing.assert_close(model(x), first, **NEAR)
    assert set(model.base_model.randlora_bases) == {"default", "c"}
    assert not any(".b" in name and "randlora" in name for name in model.state_dict())
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net()(x), **NEAR)


def test_equal_bases_are_held_once():
    model = adapted()
    model.add_adapter("b", RandLoraConfig(r=4, target_modules=LAYERS))
    model.add_adapter("c", RandLoraConfig(r=4, target_modules=LAYERS, projection_key=1))
    a, b, c = (model.base_model.randlora_bases[name].B for name in ("default", "b", "c"))
    assert a.data_ptr() == b.data_ptr() != c.data_ptr()
    names = [name for name, _ in model.named_buffers() if name.endswith(".B")]
    assert names == ["base_model.randlora_bases.default.B", "base_model.randlora_bases.c.B"]


@pytest.mark.parametrize("options", [{}, {"sparse": True}])
def test_files_of_peft_load(tmp_path, options):
    names = {"target_modules": LAYERS, "r": 4, "randlora_alpha": 8}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(net(), peft.RandLoraConfig(init_weights=False, **names, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    config = RandLoraConfig.from_peft(peft.PeftConfig.from_pretrained(tmp_path / "theirs"))
    ours = peft.get_peft_model(net(), config)
    state = peft.utils.load_peft_weights(tmp_path / "theirs")
    found = peft.set_peft_model_state_dict(ours, state)
    assert not found.unexpected_keys
    torch.testing.assert_close(ours(rows()), theirs(rows()), **NEAR)
    # No key of ours gives those bases; they go into our own file.
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    assert torch.equal(again(rows()), ours(rows()))
    without = {key: value for key, value in state.items() if not key.endswith(("_A", "_B"))}
    with pytest.raises(InputError, match="neither bases nor their checksum"):
        peft.set_peft_model_state_dict(ours, without)


def test_bases_are_not_narrowed_with_the_base():
    model = adapted(net(torch.bfloat16))
    assert model.base_model.randlora_bases["default"].B.dtype == torch.float32


def test_dropout_falls_on_the_adapter_alone():
    model = adapted(dropout=0.5)
    model.eval()
    plain = model(rows())
    model.train()
    torch.manual_seed(0)
    one = model(rows())
    assert not torch.allclose(one, plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(rows()), net()(rows()))


def test_a_hook_on_the_base_layer_is_called():
    model, seen = adapted(), []
    base = model.get_base_model().wide.base_layer
    plain = model(rows())
    handle = base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(rows()), plain, **NEAR)
    handle.remove()
    assert seen == [1]


def test_a_whole_state_brings_its_bases_into_a_model_made_with_another_key():
    model, other = adapted(), adapted(projection_key=9)
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(rows()), model(rows()))


def test_the_scalings():
    official = adapted().get_base_model().square.scaling["default"]
    assert official == pytest.approx(2 / 6**0.5)
    model = adapted(scaling="peft")
    assert model.get_base_model().square.scaling["default"] == 20
    model = adapted(scaling="official", alpha=12)
    assert model.get_base_model().square.scaling["default"] == pytest.approx(12 / (4 * 6**0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"alpha": -1}, "alpha=-1"),
        ({"dropout": 1.0}, "dropout"),
        ({"projection_key": -1}, "projection_key"),
        ({"scaling": "big"}, "scaling"),
        ({"bases": "round"}, "bases"),
        ({"save_projection": True}, "save_projection"),
        ({"basis_dtype": "int8"}, "basis_dtype"),
        ({"pairing": "none"}, "pairing"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        RandLoraConfig(**options)


def test_a_plan_is_refused():
    with pytest.raises(PlanError, match="takes no plan"):
        RandLoraConfig(r=RankPlan({}, purpose="adapter", source="weight"))


def test_layers_that_cannot_be_adapted_are_named_and_nothing_is_changed():
    base = net()
    before = copy.deepcopy(base.state_dict())
    for options, message in [
        ({"r": 7}, "head.*basis rank of 7"),
        ({"target_modules": ["wide", "norm"]}, "norm is a LayerNorm"),
    ]:
        base.norm = nn.LayerNorm(3)
        with pytest.raises(InputError, match=message):
            adapted(base, **options)
        del base.norm
        assert base.state_dict().keys() == before.keys()
        assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match="not found"):
        adapted(base, target_modules=["nowhere"])
    with pytest.raises(ValueError, match="shared state"):
        peft.inject_adapter_in_model(RandLoraConfig(r=4, target_modules=["wide"]), net())


def test_base_weights_and_biases_can_be_trained_beside_it():
    model = adapted(bias="all")
    biases = [p for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]
    assert len(biases) == 4
    weight = model.get_base_model().wide.base_layer.weight.requires_grad_()
    x = rows()
    grads = torch.autograd.grad(model(x).square().sum(), [weight, *biases])
    model.merge_adapter()
    expected = torch.autograd.grad(model(x).square().sum(), [weight, *biases])
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-3)
