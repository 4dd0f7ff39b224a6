"""In the Hugging Face Trainer, with resume; under a GradScaler."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fullrank.optim import (
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    frugal_param_groups,
    param_groups,
)


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 64, (24, 1), generator=generator)
    rows = (start + torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, data, steps=6, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.01,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return Trainer(model=options.pop("model"), args=arguments, train_dataset=data, **options)


def galore(net):
    return {"params": param_groups(net, rank=4, verbose=False, update_proj_gap=4)}


def chosen(kind, net):
    """An optimizer's class and arguments, as Trainer takes them."""
    if kind is FrugalAdamW:
        return kind, {"params": frugal_param_groups(net, update_gap=4), "density": 0.5, "lr": 0.01}
    return kind, {"params": param_groups(net, kind, rank=4, verbose=False, update_proj_gap=4)}


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW, FrugalAdamW, GradNormLoRPAdamW])
def test_as_class_with_arguments_and_resume(kind, tmp_path, data):
    net = model()
    whole = trainer(tmp_path / "whole", data, model=net, optimizer_cls_and_kwargs=chosen(kind, net))
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = model()
    resumed = trainer(
        tmp_path / "again", data, model=again, optimizer_cls_and_kwargs=chosen(kind, again)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_as_class_with_the_trainers_own_groups(tmp_path, data):
    net = model()
    options = {"rank": 4, "update_proj_gap": 4, "lr": 0.01}
    with pytest.warns(UserWarning, match="fewer than two dimensions"):
        trainer(
            tmp_path, data, 2, model=net, optimizer_cls_and_kwargs=(GaLoreAdamW, options)
        ).train()


def test_as_instance(tmp_path, data):
    net = model()
    optimizer = GaLoreAdamW(galore(net)["params"], lr=0.01)
    trainer(tmp_path, data, 2, model=net, optimizers=(optimizer, None)).train()
    weight = net.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["exp_avg"].shape == (48, 4)
    assert optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW, FrugalAdamW, GradNormLoRPAdamW])
def test_under_a_grad_scaler(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 8))
    options = {"subspace": "columns"} if kind is FrugalAdamW else {}
    optimizer = kind(param_groups(net, kind, rank=3, verbose=False, **options), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, losses, before = torch.randn(32, 8), [], [p.detach().clone() for p in net.parameters()]
    for step in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (net(x) - x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 0:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == 0:  # the scaler skips this one, and the optimizer is not called
            now = list(net.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(state["step"] == 39 for state in optimizer.state.values())
