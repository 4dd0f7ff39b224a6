"""Settings that make no sense are told so at once."""

import json

import pytest

from fullrank.core import InputError
from fullrank.training import EncoderTraining


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "sgd"),
        ("decay", "step"),
        ("precision", "float16"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("seconds", -1),
        ("epochs", 0),
        ("rank", 0),
        ("rank", 1.5),
        ("batch_size", 1),
        ("max_steps", 0),
        ("hard_negatives", -1),
        ("patience", 0),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("weight_decay", None),
        ("warmup", "0.1"),
        ("dropout", "none"),
        ("epochs", True),
        ("dropout", 1.0),
        ("dev_documents", True),
        ("seed", 2**32),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(InputError, match=name):
        EncoderTraining(**{name: value})


def test_none_where_it_means_something():
    config = EncoderTraining(seconds=None, max_steps=None, patience=None, dropout=None)
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()
