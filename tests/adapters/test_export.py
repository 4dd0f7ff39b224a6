"""Adapters as ordinary LoRA files: equal on a fresh base, with PEFT alone; what is refused."""

import subprocess
import sys

import pytest
import small_net
import torch
from torch import nn

from fullrank.adapters.adapt import adapt
from fullrank.adapters.export import check_base, save_as_lora, to_lora
from fullrank.adapters.lora_reading import inspect, read_lora
from fullrank.core.errors import InputError, StoreError

peft = pytest.importorskip("peft")


def net(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 10))


def tuned(method, **changes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 20, 12, generator=generator)
    y = torch.randn(3, 20, 10, generator=generator)
    model = adapt(
        net(),
        method,
        rank=2,
        data=list(zip(x, y, strict=True)),
        loss_fn=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
        forward_fn=lambda m, batch: m(batch[0]),
        progress=False,
        **changes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("method", ["lora", "rslora", "eva", "lora_ga"])
def test_the_file_gives_the_same_model_on_a_fresh_base(method, tmp_path):
    model = tuned(method, **({"rho": 1.0} if method == "eva" else {}))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    folder = save_as_lora(model, tmp_path / "lora")
    check_base(net(), folder)
    again = peft.PeftModel.from_pretrained(net(), folder)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    with again.disable_adapter():
        assert torch.equal(again(x), net()(x))
    for name, (A, B) in to_lora(model).items():
        merged = again.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(merged, B @ A, rtol=1e-5, atol=1e-6)
    table = inspect(folder)
    assert [row[0] for row in table.rows] == ["0", "2"]
    assert all(row[2] == (4 if method == "lora_ga" else row[2]) for row in table.rows)


def test_the_file_loads_in_a_process_without_fullrank(tmp_path):
    model = tuned("lora_ga")
    folder = save_as_lora(model, tmp_path / "lora")
    torch.save(net().state_dict(), tmp_path / "base.pt")
    code = f"""
import sys, torch, peft
from torch import nn
base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
base.load_state_dict(torch.load({str(tmp_path / "base.pt")!r}, weights_only=True))
model = peft.PeftModel.from_pretrained(base, {str(folder)!r})
assert "fullrank.adapters" not in sys.modules
print(float(model(torch.ones(1, 12)).sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = model(torch.ones(1, 12)).sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "message"), [("dora", "not of low rank"), ("pissa", "changed the base")]
)
def test_what_is_no_low_rank_update_is_refused(method, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_as_lora(tuned(method), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_for_another_base_is_refused(tmp_path):
    folder = save_as_lora(tuned("lora"), tmp_path / "lora")
    with pytest.raises(InputError, match=r"0 is \(16, 8\) here, and \(16, 12\) there"):
        check_base(net(8), folder)
    with pytest.raises(InputError, match="no module '0'"):
        check_base(nn.Linear(12, 16), folder)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no adapter"):
        inspect(tmp_path)
    with pytest.raises(InputError, match="no adapter 'default'"):
        to_lora(net())
    with pytest.raises(InputError, match="no adapter 'other'"):
        to_lora(tuned("lora"), "other")


@pytest.mark.parametrize(
    "more", [{"target_modules": ["wide", "embed"]}, {"trainable_token_indices": {"embed": [1]}}]
)
def test_what_is_trained_of_an_embedding_is_not_left_out(more, tmp_path):
    options = {"r": 2, "target_modules": ["wide"], "init_lora_weights": False, **more}
    model = peft.get_peft_model(small_net.net(), peft.LoraConfig(**options))
    with pytest.raises(InputError, match=r"of no linear layer|single tokens"):
        save_as_lora(model, tmp_path / "lora")
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(InputError, match="no update of a linear layer"):
        read_lora(tmp_path / "peft")


def small_moe(experts=3):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(num_local_experts=experts, **sizes, **heads)
    return transformers.MixtralForCausalLM(config).eval()


def saved(base, folder, **options):
    """A LoRA of PEFT that does something, and its folder."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [(0, 2), (0, 2)]}, "repeats layers"),
        ({"alora_invocation_tokens": [7], "task_type": "CAUSAL_LM"}, "from certain tokens on"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "a stack of experts"),
        ({"target_parameters": ["gate.weight", "experts.down_proj"]}, "a stack of experts"),
    ],
)
def test_what_plain_factors_cannot_say_is_refused(options, message, tmp_path):
    model = saved(small_moe(), tmp_path / "peft", **options)
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path / "peft")
    with pytest.raises(InputError, match=rf"{message}|of no linear layer"):
        save_as_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_matrix_named_by_its_parameter_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    model = saved(base, tmp_path / "peft", target_parameters=["mlp.up_proj.weight"])
    updates, _, _ = read_lora(tmp_path / "peft")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    found = updates["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(found.B @ found.A, layer.get_delta_weight("default"))
    assert updates.keys() == to_lora(model).keys()


def test_a_stack_of_experts_is_shown_as_one(tmp_path):
    options = {"target_parameters": ["mlp.experts.down_proj"], "lora_alpha": 2}
    model = saved(small_moe(), tmp_path / "peft", **options)
    layer = model.base_model.model.model.layers[0].mlp.experts
    row = next(row for row in inspect(tmp_path / "peft").rows if row[0].endswith("0.mlp.experts"))
    assert row[1:4] == ["3 x 16 x 24", 2, 3 * 2 * (16 + 24)]
    assert row[4] == pytest.approx(float(layer.get_delta_weight("default").norm()), rel=1e-5)
