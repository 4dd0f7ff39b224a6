"""MKOR and MKOR-H in the Hugging Face Trainer, through ``create_optimizer``, with resume."""

import functools

import pytest
import torch

from fullrank.optim.mkor import MKOR
from fullrank.optim.mkor_hybrid import MKORH

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class MKORTrainer(transformers.Trainer):
    """MKOR before AdamW; the trainer divides the loss by its number of micro-batches."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            passes = self.args.gradient_accumulation_steps
            inner = functools.partial(torch.optim.AdamW, lr=self.args.learning_rate)
            self.optimizer = MKOR(
                self.model if model is None else model,
                inner,
                inv_freq=2,
                exclude="lm_head",
                accumulation_steps=passes,
                grad_scale=1 / passes,
            )
        return self.optimizer


class MKORHTrainer(transformers.Trainer):
    """MKOR-H, which sees every step's loss."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            inner = functools.partial(torch.optim.AdamW, lr=self.args.learning_rate)
            self.optimizer = MKORH(self.model, inner, inv_freq=2, switch_beta=5.0, patience=1)
        return self.optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # Once the trainer prepares it, the optimizer is one that wraps ours.
        getattr(self.optimizer, "optimizer", self.optimizer).observe(loss)
        return loss


def model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 32, (24, 1), generator=generator)
    rows = (start + torch.arange(10)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]


def run(kind, folder, data, resume=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        warmup_steps=2,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    trainer = kind(model=model(), args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_trains(options, tmp_path, data):
    trainer = run(MKORTrainer, tmp_path, data, **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    optimizer = trainer.optimizer.optimizer
    assert optimizer.steps == 6
    assert len(optimizer.layers) == 8  # transposed ones, four in each block
    left, right = optimizer.factors("transformer.h.0.mlp.c_fc")
    assert (left.shape, right.shape) == ((64, 64), (17, 17))
    assert not torch.equal(right, torch.eye(17))


def test_resumes(tmp_path, data):
    whole = run(MKORTrainer, tmp_path / "whole", data)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    again = run(MKORTrainer, tmp_path / "again", data, resume=checkpoint)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hybrid_switches(tmp_path, data):
    trainer = run(MKORHTrainer, tmp_path, data)
    optimizer = trainer.optimizer.optimizer
    assert optimizer.switched_at is not None
    assert optimizer.factor_bytes() == 0
