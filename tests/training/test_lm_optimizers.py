"""Optimizers by name: which parameters are of the body, and at which rank and rate."""

import pytest
import torch
from torch import nn

from fullrank.training.lm_config import OptimizerSection
from fullrank.training.lm_optimizers import make_optimizer


def section(name, **keys):
    return OptimizerSection(name=name, lr=1e-3, head_lr=1e-5, weight_decay=0.1, **keys)


def rates(model, optimizer):
    """(Rate, decay) of each trained parameter by name."""
    found = {
        id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    return {n: found[id(p)] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "lora_pro"])
def test_layers_that_peft_copies_are_sorted_as_they_are(name):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    copied = ["lm_head", "embed_tokens", "norm", "up_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copied)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    optimizer = make_optimizer(model, section(name, rank=1 if "galore" in name else None))
    found = rates(model, optimizer)
    assert len(found) >= 6
    for each, pair in found.items():
        body = "lora_" in each or "up_proj" in each
        assert pair == ((1e-3, 0.1) if body else (1e-5, 0.0)), each
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()


def test_convolutions_have_the_rank_of_their_matrix():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(24, 32, 3),
            "deep": nn.Conv1d(24, 24, 4, groups=24),
            "fc": nn.Linear(20, 8),
        }
    )
    weights = [model[name].weight for name in ("conv", "deep", "fc")]
    optimizer = make_optimizer(model, section("galore_adamw", rank=16))
    assert optimizer.param_groups[0]["rank"] == [16, 4, 8]
    assert [optimizer.projects(weight) for weight in weights] == [True, False, False]
    masked = make_optimizer(model, section("lift", rank=1))
    assert [masked.projects(weight) for weight in weights] == [False, False, True]
