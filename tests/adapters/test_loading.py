"""Adapters on the base models that they name, and alone in a folder."""

import pytest
import torch
from small_net import TARGETS, net
from tiny_models import bert_config

from fullrank.adapters import FlyLoraConfig
from fullrank.adapters.adapt import adapt
from fullrank.adapters.loading import load_adapter, put_on, save_alone

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(6, 14)[None]


def bert(kind, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return getattr(transformers, kind)(bert_config(30, **sizes, **options)).eval()


@pytest.mark.parametrize(
    ("task", "kind"),
    [("TOKEN_CLS", "BertForTokenClassification"), ("SEQ_CLS", "BertForSequenceClassification")],
)
def test_a_head_of_other_labels_than_the_bases_is_the_adapters(task, kind, tmp_path):
    bert(kind, num_labels=2).save_pretrained(tmp_path / "base")
    tuned = adapt(bert(kind, num_labels=5), "lora", rank=2, task_type=task)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(loaded(IDS).logits, tuned.eval()(IDS).logits)


def test_the_head_that_answers_questions_is_trained_whole(tmp_path):
    kind = "BertForQuestionAnswering"
    bert(kind).save_pretrained(tmp_path / "base")
    tuned = adapt(bert(kind), "lora", rank=8, task_type="QUESTION_ANS")
    assert not any("qa_outputs" in layer.name for layer in tuned.adapt_report.layers)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", tmp_path / "base")
    found = loaded(IDS).start_logits
    torch.testing.assert_close(found, tuned.eval()(IDS).start_logits)


def test_one_of_several_is_alone_in_a_folder_that_is_made(tmp_path):
    config = {"r": 2, "k": 1, "target_modules": TARGETS, "init_weights": False}
    model = peft.get_peft_model(net(), FlyLoraConfig(**config))
    model.add_adapter("other", FlyLoraConfig(**config, seed=1))
    folder = save_alone(model, "other", tmp_path / "new" / "alone")
    assert not any(path.is_dir() for path in folder.iterdir())
    model.set_adapter("other")
    torch.testing.assert_close(put_on(net(), folder)(IDS % 11), model(IDS % 11))
