"""Optimizers by name: which parameters are of the body, and at which rank and rate."""

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.training.lm_config import LMTraining, OptimizerSection
from fullrank.training.lm_optimizers import make_optimizer, optimizer_names


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


@pytest.mark.parametrize("name", optimizer_names())
@pytest.mark.filterwarnings("ignore:.* takes no optimizer")
def test_every_optimizer_may_take_the_place_of_the_examples(name):
    from fullrank.cli.train_lm import EXAMPLE

    yaml = pytest.importorskip("yaml")
    run = LMTraining.of(yaml.safe_load(EXAMPLE), [f"optimizer.name={name}"])
    model = nn.ModuleDict({"fc": nn.Linear(48, 32), "norm": nn.LayerNorm(32)})
    if name == "lora_pro":  # steps adapters alone
        with pytest.raises(InputError, match="add an adapter first"):
            make_optimizer(model, run.optimizer)
    else:
        assert make_optimizer(model, run.optimizer).param_groups


def test_what_another_optimizer_lacks_is_left_out_and_told():
    file = {
        "model": {"config": {"model_type": "llama"}},
        "optimizer": {"name": "galore_adamw", "rank": 4, "options": {"scale": 1.0}},
    }
    said = "adamw takes no optimizer.rank, optimizer.options.scale: .* for galore_adamw"
    with pytest.warns(UserWarning, match=said):
        run = LMTraining.of(file, ["optimizer.name=adamw"])
    assert (run.optimizer.rank, run.optimizer.options) == (None, {})
    asked = ["optimizer.name=frugal_adamw", "optimizer.options={subspace: columns}"]
    assert LMTraining.of(file, asked).optimizer.rank == 4


@pytest.mark.parametrize(
    ("keys", "way_out"),
    [
        ({"rank": 4}, "has no rank; remove optimizer.rank, or pass optimizer.rank=null"),
        ({"options": {"scale": 1}}, "takes no scale; .* or pass optimizer.options={}"),
    ],
)
def test_what_an_optimizer_lacks_is_refused_with_a_way_out(keys, way_out):
    with pytest.raises(InputError, match=way_out):
        make_optimizer(nn.Linear(4, 4), section("adamw", **keys))
