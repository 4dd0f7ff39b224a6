"""In the Hugging Face Trainer: as a class with arguments and as an instance, with resume."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fullrank.optim import GaLoreAdamW, param_groups


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


def test_as_class_with_arguments_and_resume(tmp_path, data):
    net = model()
    whole = trainer(
        tmp_path / "whole", data, model=net, optimizer_cls_and_kwargs=(GaLoreAdamW, galore(net))
    )
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = model()
    resumed = trainer(
        tmp_path / "again", data, model=again, optimizer_cls_and_kwargs=(GaLoreAdamW, galore(again))
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
