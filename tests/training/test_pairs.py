"""Which pairs are made, which documents may be negatives."""

import pytest

from fullrank.core import Corpus, InputError
from fullrank.datasets import Dataset
from fullrank.training import make_pairs


def dataset(texts, queries, qrels, exclude=None):
    ids = [chr(ord("a") + i) for i in range(len(texts))]
    return Dataset("test", Corpus(ids, texts), queries, qrels, exclude or {})


TEXTS = ["red apple pie", "green pear cake", "red cherry tart", "green plum jam", "blue sky"]


def test_a_pair_for_every_relevant_document():
    data = dataset(
        TEXTS,
        {"q": "red", "r": "green"},
        {"q": {"a": 1, "c": 2, "e": 0}, "r": {"b": 1}},
    )
    pairs = make_pairs(data, hard_negatives=0)
    assert pairs.rows == ((0, 0), (0, 2), (1, 1))
    assert pairs.queries == ("red", "green")


def test_own_documents_are_neither_positive_nor_negative():
    data = dataset(TEXTS, {"q": "red", "r": "green"}, {"q": {"a": 1, "c": 1}, "r": {"b": 1}},
                   {"q": ("a",)})  # fmt: skip
    pairs = make_pairs(data)
    assert [row[:2] for row in pairs.rows] == [(0, 2), (1, 1)]
    assert {0, 2} <= pairs.forbidden[0]
    assert all(row[2] not in pairs.forbidden[row[0]] for row in pairs.rows)


def test_reverse_pairs_are_forbidden():
    # r was made from b and names a, from which q was made: so b is no negative of q.
    data = dataset(
        TEXTS,
        {"q": "red", "r": "green"},
        {"q": {"c": 1}, "r": {"a": 1}},
        {"q": ("a",), "r": ("b",)},
    )
    forbidden = make_pairs(data, hard_negatives=0).forbidden
    assert forbidden == (frozenset({0, 1, 2}), frozenset({0, 1}))


def test_copies_and_queries_of_equal_text_share_what_is_forbidden():
    texts = ["red apple", "red apple", "green pear", "plum"]
    data = dataset(texts, {"q": "x", "r": "x"}, {"q": {"a": 1}, "r": {"c": 1}})
    forbidden = make_pairs(data, hard_negatives=0).forbidden
    assert forbidden == (frozenset({0, 1, 2}),) * 2


def test_hard_negatives_share_words_with_the_query_but_are_not_nearly_the_same():
    texts = [
        "one two three four five six seven eight nine ten",
        "one two three four five six seven eight nine eleven ten",  # nearly the positive
        "one twelve",
        "far away",
        "further away",
    ]
    data = dataset(texts, {"q": "one", "r": "far"}, {"q": {"a": 1}, "r": {"d": 1}})
    rows = make_pairs(data).rows
    assert rows[0] == (0, 0, 2)
    # BM25 finds nothing else for "far": any document that is not forbidden will do.
    assert rows[1][:2] == (1, 3)
    assert rows[1][2] != 3


def test_pairs_of_one_query_get_different_negatives(toy):
    pairs = make_pairs(toy.split("train"), hard_negatives=2)
    assert len(pairs) == 64
    for row in pairs.rows:
        assert len({row[1], *row[2:]}) == 3
        assert not set(row[2:]) & pairs.forbidden[row[0]]


def test_the_seed_decides(toy):
    train = toy.split("train")
    assert make_pairs(train, seed=1) == make_pairs(train, seed=1)
    assert make_pairs(train, seed=1).rows != make_pairs(train, seed=2).rows


def test_max_pairs_draws_some(toy):
    pairs = make_pairs(toy.split("train"), max_pairs=10)
    assert len(pairs) == 10
    assert len(pairs.queries) == len(pairs.forbidden) == len({row[0] for row in pairs.rows})


def test_judgements_outside_the_corpus_are_left_out():
    data = dataset(TEXTS, {"q": "red", "r": "green"}, {"q": {"a": 1, "zz": 1}, "r": {"b": 1}})
    assert len(make_pairs(data, hard_negatives=0)) == 2


@pytest.mark.parametrize("qrels", [{}, {"q": {"a": 1}}, {"q": {"a": 0}, "r": {"b": 0}}])
def test_too_few_pairs(qrels):
    with pytest.raises(InputError, match="at least two queries"):
        make_pairs(dataset(TEXTS, {"q": "red", "r": "green"}, qrels))


def test_a_corpus_too_small_for_negatives():
    data = dataset(TEXTS[:2], {"q": "red", "r": "green"}, {"q": {"a": 1}, "r": {"b": 1}})
    with pytest.raises(InputError, match="too few for 3 more"):
        make_pairs(data, hard_negatives=3)
