"""Maestro in the Hugging Face `Trainer`: what a step does, shrinking, resume."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from labelled_ids import LabelledIds  # noqa: E402
from tiny_models import bert_config  # noqa: E402

from fullrank.compress.maestro import Maestro  # noqa: E402
from fullrank.compress.maestro_trainer import MaestroTrainer  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402


def made(lam=1e-2, eps=1.0, dropout=0.1):
    torch.manual_seed(0)
    config = bert_config(
        30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    return Maestro(model, lam=lam, eps=eps, exclude="classifier")


def trainer(folder, maestro, **changes):
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    extra = {k: changes.pop(k) for k in ("shrink_every",) if k in changes}
    arguments = transformers.TrainingArguments(str(folder), **settings | changes)
    return MaestroTrainer(
        maestro, args=arguments, train_dataset=LabelledIds(), eval_dataset=LabelledIds(), **extra
    )


def ranks(maestro):
    return [layer.full_rank for layer in maestro.layers.values()]


def test_samples_in_training_only_and_adds_the_lasso(tmp_path):
    maestro = made(dropout=0.0)
    run = trainer(tmp_path, maestro)
    inputs = next(iter(run.get_train_dataloader()))
    maestro.model.train()
    with maestro.sample():
        plain = maestro.model(**inputs).loss + maestro.penalty()
        torch.testing.assert_close(run.compute_loss(maestro.model, dict(inputs)), plain)
    seen = []
    hook = next(iter(maestro.layers.values())).register_forward_hook(
        lambda *_: seen.append([layer.active_rank for layer in maestro.layers.values()])
    )
    run.train()
    assert all(sum(rank is not None for rank in ranks) == 1 for ranks in seen)
    seen.clear()
    run.evaluate()
    assert all(rank is None for ranks in seen for rank in ranks)
    hook.remove()


def test_shrinks_at_the_end_of_each_epoch_and_logs(tmp_path):
    maestro = made(eps=0.4)
    before = ranks(maestro)
    calls = []
    shrink = maestro.shrink
    maestro.shrink = lambda: calls.append(None) or shrink()
    run = trainer(tmp_path, maestro)
    run.train()
    assert len(calls) == 2
    after = ranks(maestro)
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(before)
    assert any("group_lasso" in entry for entry in run.state.log_history)


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_resume_is_bit_equal(tmp_path, checkpoint):
    whole = made(eps=0.4)
    trainer(tmp_path / "whole", whole).train()
    again = made(eps=0.4)
    run = trainer(tmp_path / "resumed", again)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    assert ranks(whole) == ranks(again)
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_gradient_checkpointing_runs_again_at_the_same_rank(tmp_path):
    results = []
    for checkpointing in (False, True):
        maestro = made(dropout=0.0)
        trainer(
            tmp_path / str(checkpointing),
            maestro,
            max_steps=3,
            save_strategy="no",
            gradient_checkpointing=checkpointing,
        ).train()
        results.append(torch.cat([p.detach().flatten() for p in maestro.model.parameters()]))
    torch.testing.assert_close(*results)


def test_bad_interval_is_named(tmp_path):
    with pytest.raises(InputError, match="shrink_every=0"):
        trainer(tmp_path, made(), shrink_every=0)
