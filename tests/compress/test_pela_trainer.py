"""PELA's stage in the Hugging Face `Trainer`: the loss it trains on, accumulation, resume."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from labelled_ids import LabelledIds  # noqa: E402
from tiny_models import bert_config  # noqa: E402

from fullrank.compress.pela import pela_compress  # noqa: E402
from fullrank.compress.pela_loss import PELALoss  # noqa: E402
from fullrank.compress.pela_trainer import PELATrainer  # noqa: E402


def models(dropout=0.0):
    torch.manual_seed(0)
    config = bert_config(
        30,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    teacher = transformers.BertForSequenceClassification(config)
    return teacher, pela_compress(teacher)


def trainer(folder, teacher, student, steps=4, **changes):
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    extra = {k: changes.pop(k) for k in ("alpha", "beta", "every") if k in changes}
    arguments = transformers.TrainingArguments(str(folder), **settings | changes)
    data = LabelledIds(masked=True)
    return PELATrainer(
        student,
        teacher,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        **extra,
    )


def test_trains_on_the_loss_of_the_plain_loop(tmp_path):
    teacher, student = models()
    assert any(type(m).__name__ == "LowRankLinear" for m in student.modules())
    made = trainer(tmp_path, teacher, student, alpha=0.5, beta=2.0)
    student.train()
    inputs = next(iter(made.get_train_dataloader()))
    got = made.compute_loss(student, dict(inputs))
    plain = PELALoss(student, teacher, alpha=0.5, beta=2.0).terms(dict(inputs))
    torch.testing.assert_close(got, plain.total, rtol=1e-6, atol=0)
    assert plain.task > 0
    assert plain.feature > 0
    assert plain.perturbation > 0
    student.eval()
    task = made.compute_loss(student, dict(inputs))
    torch.testing.assert_close(task, plain.task, rtol=1e-6, atol=0)


def test_learns_logs_its_terms_and_leaves_the_teacher(tmp_path):
    teacher, student = models()
    before = [p.detach().clone() for p in teacher.parameters()]
    made = trainer(tmp_path, teacher, student, steps=12)
    made.train()
    logs = [entry for entry in made.state.log_history if "feature_loss" in entry]
    assert logs[-1]["feature_loss"] < logs[0]["feature_loss"]
    assert all(entry["perturbation_loss"] >= 0 for entry in logs)
    assert "feature_loss" not in made.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def weights_after(folder, accumulate, batch, normalised):
    teacher, student = models()
    made = trainer(
        folder,
        teacher,
        student,
        steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    if normalised:
        made.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
            torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
            / num_items_in_batch
        )
    else:
        # The model takes any keyword, so Trainer believes that it normalises its own loss.
        made.loss_is_scaled_for_ga = False
    made.train()
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def full_length(monkeypatch):
    # With padding a mean over tokens of micro-batches is not the mean over the batch.
    monkeypatch.setattr(
        LabelledIds,
        "__getitem__",
        lambda self, i: {"input_ids": self.ids[i], "labels": self.labels[i]},
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_accumulation_is_one_large_batch(tmp_path, monkeypatch, normalised):
    full_length(monkeypatch)
    whole = weights_after(tmp_path / "a", 1, 8, normalised)
    parts = weights_after(tmp_path / "b", 4, 2, normalised)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_resume_is_bit_equal(tmp_path):
    options = {"every": 3, "steps": 4}
    teacher, student = models(dropout=0.1)
    trainer(tmp_path / "whole", teacher, student, **options).train()
    teacher, again = models(dropout=0.1)
    made = trainer(tmp_path / "resumed", teacher, again, **options)
    made.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, two in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
