import pytest

from fullrank.core import Corpus, InputError
from fullrank.datasets import Dataset


@pytest.fixture
def data():
    return Dataset(
        "fruit",
        Corpus(["a", "b", "c"], ["apples", "pears", "plums"]),
        {"q1": "apple", "q2": "pear"},
        {"q1": {"a": 1}, "q2": {"b": 1, "c": 0}},
        exclude={"q2": ("a",)},
        clusters={"q1": "x", "q2": "y"},
        parts={"train": ("q1",), "test": ("q2",)},
        manifest={"version": 1},
    )


def test_split_keeps_the_corpus_and_takes_one_parts_queries(data):
    part = data.split("test")
    assert part.corpus is data.corpus
    assert part.queries == {"q2": "pear"}
    assert part.qrels == {"q2": {"b": 1, "c": 0}}
    assert part.exclude == {"q2": ("a",)}
    assert part.clusters == {"q2": "y"}
    assert part.parts == {}
    assert part.manifest == data.manifest
    assert part.name == "fruit/test"


def test_unknown_part_names_those_there_are(data):
    with pytest.raises(InputError, match=r"'dev'.*'train', 'test'"):
        data.split("dev")
    with pytest.raises(InputError, match="not divided"):
        data.split("test").split("test")


def test_repr_counts(data):
    assert repr(data) == "Dataset(fruit: 3 documents, 2 queries, 3 judgements; train 1, test 1)"
