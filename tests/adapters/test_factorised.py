"""Adapters on factorised layers: trained, saved, merged and switched as on dense ones."""

import copy

import pytest
import torch
from small_net import TARGETS, net, samples
from torch import nn

from fullrank.adapters.adapt import adapt
from fullrank.adapters.adapt_methods import METHODS
from fullrank.adapters.lora_sb import LoraSBConfig
from fullrank.compress import (
    Fixed,
    LoRDConfig,
    LowRankLinear,
    factorize,
    lord_compress,
    make_plan,
)
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")

NEAR = {"rtol": 1e-4, "atol": 1e-5}
# These change the weight, or start from its gradient.
NEED_A_WEIGHT = ("pissa", "lora_ga", "lora_sb")
NEEDED = {"lora_sb": {"lr": 1e-3, "n_samples": 12}, "flylora": {"k": 2}}


def small(kind="linear"):
    return factorize(net(kind), make_plan(net(kind), Fixed(3), include=TARGETS), progress=False)


def put_on(method, model, **changes):
    data = [samples(8)] * 3
    options = {"rank": 2, "targets": TARGETS, "data": data, "progress": False}
    return adapt(model, method, **{**options, **NEEDED.get(method, {}), **changes})


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEED_A_WEIGHT])
def test_every_method_that_needs_no_weight_goes_on_factors(method, kind, tmp_path):
    ids = samples()["ids"]
    plain = small(kind)(ids)
    model = put_on(method, small(kind))
    assert {layer.name for layer in model.adapt_report.layers} == set(TARGETS)
    torch.testing.assert_close(model(ids), plain, **NEAR)
    before = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(before, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**samples())["loss"].backward()
        optimizer.step()
    tuned = model.eval()(ids)
    assert not torch.allclose(tuned, plain, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids), plain, **NEAR)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(small(kind), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids), tuned, **NEAR)
    unloaded = copy.deepcopy(model).unload()
    assert type(unloaded.wide) is LowRankLinear
    assert torch.equal(unloaded(ids), plain)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(ids), tuned, **NEAR)
    model.unmerge_adapter()
    assert torch.equal(model(ids), tuned)
    merged = model.merge_and_unload()
    assert type(merged.wide) is type(net(kind).wide)
    torch.testing.assert_close(merged(ids), tuned, **NEAR)


@pytest.mark.parametrize("method", NEED_A_WEIGHT)
def test_methods_that_need_a_weight_name_the_layer(method):
    model = small()
    with pytest.raises(InputError, match="wide is factorised"):
        put_on(method, model)
    assert type(model.wide) is LowRankLinear
    torch.testing.assert_close(model(samples()["ids"]), small()(samples()["ids"]))


def test_lora_sb_on_factors_starts_from_no_gradient():
    config = {"r": 2, "target_modules": TARGETS}
    with pytest.raises(InputError, match="wide is factorised"):
        peft.get_peft_model(small(), LoraSBConfig(**config))
    ids = samples()["ids"]
    model = peft.get_peft_model(small(), LoraSBConfig(**config, init="xs", init_weights=False))
    tuned = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), tuned, **NEAR)


def test_factors_are_among_the_layers_that_are_not_named():
    assert {layer.name for layer in put_on("lora", small(), targets=None).adapt_report.layers} == {
        *TARGETS,
        "head",
    }
    model = peft.get_peft_model(small(), peft.LoraConfig(target_modules="all-linear"))
    assert set(model.base_model.targeted_module_names) == {*TARGETS, "head"}


def test_a_merged_transformers_model_saves_and_loads(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    factorize(model, make_plan(model, Fixed(3)), progress=False)
    settings = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    merged = peft.get_peft_model(model, settings).merge_and_unload()
    attention = merged.encoder.layer[0].attention.self
    assert (type(attention.query), type(attention.value)) == (nn.Linear, LowRankLinear)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).last_hidden_state, merged(ids).last_hidden_state)


@pytest.mark.parametrize("method", ["lora", "hydra"])
def test_merging_keeps_biases_that_the_architecture_has_not(method, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(20, (16, 8))} for _ in range(4)]
    settings = LoRDConfig(budget=0.7, rank_multiple=2)
    lord_compress(model, batches, settings, progress=False)
    targets = ["o_proj", "up_proj", "lm_head"]
    tuned = put_on(method, model, targets=targets, data=batches)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    merged = tuned.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(**batches[0]).logits, merged(**batches[0]).logits)
