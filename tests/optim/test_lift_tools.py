"""What goes with LIFT: param groups, deltas, SHiRA's mask, the Trainer."""

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import (
    LIFT,
    apply_delta,
    export_delta,
    lift_mask_fn,
    lift_param_groups,
    principal_mask,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.mlp = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 12)])
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 30, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x + self.mlp[1](self.mlp[0](x).relu()))
        return self.lm_head(x)


def train(model, optimizer, steps=3):
    for t in range(steps):
        tokens = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])
        loss.backward()
        optimizer.step()
    return loss


def test_groups_mask_linear_layers_only():
    groups = lift_param_groups(Model(), rank=1, lra_rank=64)
    assert [name for name, _ in groups[0]["params"]] == ["mlp.0.weight", "mlp.1.weight"]
    assert groups[0]["lra_rank"] == [12, 12]
    assert "lm_head.weight" in [name for name, _ in groups[1]["params"]]
    model = Model()
    optimizer = LIFT(lift_param_groups(model, rank=1, lra_rank=8), lr=0.01)
    first = train(model, optimizer, 1)
    for _ in range(20):
        last = train(model, optimizer, 1)
    assert last < first


def test_groups_without_the_others_freeze_them():
    groups = lift_param_groups(Model(), rank=1, others=False)
    assert len(groups) == 1


def test_tied_and_frozen_weights_are_not_masked():
    model = Model()
    model.head = nn.Linear(12, 30, bias=False)
    model.head.weight = model.embed.weight
    model.again = model.mlp[0]
    model.mlp[1].requires_grad_(False)
    groups = lift_param_groups(model, exclude="lm_head", rank=1)
    assert [name for name, _ in groups[0]["params"]] == ["mlp.0.weight"]


def test_groups_can_be_chosen():
    groups = lift_param_groups(Model(), rank=1, where=lambda name, _: name.endswith("1"))
    assert [name for name, _ in groups[0]["params"]] == ["mlp.1.weight"]
    with pytest.raises(InputError, match="no trainable linear layer"):
        lift_param_groups(Model(), exclude=("mlp", "lm_head"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_carry_what_was_trained(dtype):
    model = Model().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = lift_param_groups(model, rank=1, lra_rank=4, others=False)
    optimizer = LIFT(groups, lr=0.01, update_interval=2)
    train(model, optimizer, 5)
    delta = export_delta(model, before)
    assert set(delta) == {"mlp.0.weight", "mlp.1.weight"}
    indices, difference = delta["mlp.0.weight"]
    assert indices.dtype == torch.int32
    assert difference.dtype == torch.float32
    assert 32 <= len(indices) < 12 * 20
    twin = Model().to(dtype)
    twin.load_state_dict(before)
    apply_delta(twin, delta)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-8)


def test_deltas_that_do_not_fit_change_nothing():
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = torch.tensor([0], dtype=torch.int32), torch.tensor([1.0])
    far = torch.tensor([10_000], dtype=torch.int32), torch.tensor([1.0])
    with pytest.raises(InputError, match="elsewhere"):
        apply_delta(model, {"norm.bias": one, "elsewhere": one})
    with pytest.raises(InputError, match="reaches beyond"):
        apply_delta(model, {"norm.bias": one, "norm.weight": far})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="lm_head"):
        export_delta(model, {k: v for k, v in before.items() if k != "lm_head.weight"})
    before["norm.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"norm\.bias has shape"):
        export_delta(model, before)


def test_shiras_mask_function():
    layer = nn.Linear(16, 12).bfloat16()
    mask = lift_mask_fn(lra_rank=100)(layer, 2, random_seed=None)
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask.bool(), principal_mask(layer.weight, 2, 12))


def test_in_shira():
    pytest.importorskip("peft")
    from peft import ShiraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    start = model[0].weight.detach().clone()
    config = ShiraConfig(r=1, target_modules=["0"])
    config.mask_fn = lift_mask_fn(lra_rank=4)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    moved = merged[0].weight.detach() != start
    assert not (moved & ~principal_mask(start, 1, 4)).any()
    assert moved.sum() > 20


def test_in_the_trainer_with_resume(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    start = torch.randint(0, 64, (24, 1), generator=torch.Generator().manual_seed(0))
    rows = (start + torch.arange(12)) % 64
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(folder, **options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
        groups = lift_param_groups(model, rank=2, lra_rank=8)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to=[],
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=(LIFT, {"params": groups, "update_interval": 2}),
        )
        trainer.train(**options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model, losses

    whole, losses = run(tmp_path / "whole")
    assert losses[-1] < losses[0]
    again, _ = run(
        tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
