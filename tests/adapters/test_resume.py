"""Hugging Face's own Trainer over EVA and LoRA-GA: interrupted and resumed is uninterrupted."""

import pytest
import torch

from fullrank.adapters.adapt import adapt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STEPS = 6


def base():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (24, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def tuned(method, **options):
    batches = [{k: torch.stack([r[k] for r in rows()[i : i + 6]]) for k in rows()[0]} for i in (0,)]
    torch.manual_seed(0)
    return adapt(base(), method, rank=2, data=batches, progress=False, **options)


class Stop(transformers.TrainerCallback):
    """The machine goes off after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


def trainer(model, folder, *callbacks):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=rows(), callbacks=list(callbacks) or None
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eva", {"rho": 2.0}),
        ("lora_ga", {}),
        ("lora_ga", {"mode": "subtract_init"}),
        ("lora", {}),
    ],
)
def test_the_trainer_goes_on_bit_for_bit(method, options, tmp_path):
    whole = tuned(method, **options)
    trainer(whole, tmp_path / "whole").train()
    stopped = tuned(method, **options)
    trainer(stopped, tmp_path / "parts", Stop()).train()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    again = tuned(method, **options)
    trainer(again, tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = stopped.state_dict()
    assert not all(torch.equal(changed[name], tensor) for name, tensor in expected.items())
    # What the checkpoint holds is an adapter for a fresh base.
    loaded = peft.PeftModel.from_pretrained(base(), checkpoint)
    ids = rows()[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, stopped(ids).logits, rtol=1e-4, atol=1e-5)
