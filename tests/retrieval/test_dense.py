"""Dense retrieval: exact, by best passage, with vectors that come from anywhere."""

import numpy as np
import pytest
from test_passages import prose
from tiny_models import sentence_model

from fullrank.core import Corpus, InputError, Run
from fullrank.retrieval import BM25, Dense, Encoder, Passages, rrf
from fullrank.retrieval import dense as dense_module


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(sentence_model(tmp_path_factory.mktemp("model")), dtype="float32", max_tokens=20)


@pytest.fixture(scope="module")
def short():
    return Corpus([f"d{i}" for i in range(60)], [prose(8, i) for i in range(60)])


@pytest.fixture(scope="module")
def mixed():
    return Corpus([f"d{i}" for i in range(40)], [prose(8 if i % 3 else 90, i) for i in range(40)])


@pytest.fixture(scope="module")
def queries():
    return {f"q{i}": prose(4, 100 + i) for i in range(12)}


def expected(dense, queries):
    """Scores of all documents, written out."""
    out = {}
    vectors = dense.encoder.encode(list(queries.values()), kind="query")
    for query, vector in zip(queries, vectors, strict=True):
        products = dense.vectors @ vector
        out[query] = {
            identifier: products[dense.passages.of(row)].max()
            for row, identifier in enumerate(dense.corpus.ids)
        }
    return Run.from_dict(out)


def agree(found, wanted, k):
    scored = wanted.to_dict()
    for query, ranking in wanted.items():
        np.testing.assert_allclose(found[query].scores, ranking.scores[:k], atol=1e-6)
        for identifier, score in found[query]:
            assert scored[query][identifier] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_short_documents(encoder, short, queries, k):
    dense = Dense(short, encoder)
    assert dense.passages.single
    agree(dense.search(queries, k), expected(dense, queries), k)


@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_a_document_is_as_good_as_its_best_passage(encoder, mixed, queries, k):
    dense = Dense(mixed, encoder)
    assert len(dense.passages) > 2 * len(mixed)
    agree(dense.search(queries, k), expected(dense, queries), min(k, 40))


def test_one_document_with_most_of_the_passages(encoder, queries):
    corpus = Corpus(["long", "a", "b"], [prose(2000, 1), prose(5, 2), prose(5, 3)])
    dense = Dense(corpus, encoder)
    agree(dense.search(queries, 3), expected(dense, queries), 3)


def test_rescoring(encoder, mixed, queries):
    dense = Dense(mixed, encoder)
    every = expected(dense, queries).to_dict()
    some = Run({q: (["d0", "d3", "d7"], [3.0, 2.0, 1.0]) for q in queries})
    for query, ranking in (BM25(mixed, depth=9) >> dense)(queries).items():
        for identifier, score in ranking:
            assert score == pytest.approx(every[query][identifier], abs=1e-6)
    run = dense(queries, some)
    assert all(set(run[q].ids) == {"d0", "d3", "d7"} for q in queries)
    with pytest.raises(InputError, match="'zz'"):
        dense(queries, Run({"q1": (["zz"], [1.0])}))


def test_without_passages_only_the_beginning_counts(encoder, mixed):
    dense = Dense(mixed, encoder, passages=False)
    assert len(dense.vectors) == 40
    np.testing.assert_array_equal(dense.vectors, encoder.encode(mixed.contents))


def test_vectors_from_elsewhere(encoder, mixed, queries, tmp_path):
    made = Dense(mixed, encoder)
    np.save(tmp_path / "v.npy", made.vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    again = Dense(mixed, encoder, vectors=mapped, passages=made.passages)
    assert again(queries) == made(queries)
    plain = Passages(made.passages.document, made.passages.start, made.passages.stop)
    assert Dense(mixed, encoder, vectors=mapped, passages=plain)(queries) == made(queries)


def test_vectors_that_do_not_fit(encoder, mixed, short):
    made = Dense(short, encoder)
    with pytest.raises(InputError, match="must match"):
        Dense(mixed, encoder, vectors=made.vectors)
    with pytest.raises(InputError, match="dimension"):
        Dense(short, encoder, vectors=made.vectors[:, :10])
    with pytest.raises(InputError, match="float32"):
        Dense(short, encoder, vectors=made.vectors.astype(np.float16))
    with pytest.raises(InputError, match="60 documents"):
        Dense(mixed, encoder, passages=made.passages)


def test_an_encoder_has_its_own_settings(encoder, short):
    with pytest.raises(InputError, match="max_tokens"):
        Dense(short, encoder, max_tokens=10)
    assert Dense(short, encoder.model, max_tokens=10).encoder.max_tokens == 10


def test_queries_without_anything_visible(encoder, short):
    dense = Dense(short, encoder)
    run = dense({"q": "", "p": " \n", "r": "rank"})
    assert [len(run[q]) for q in "qpr"] == [0, 0, 60]
    assert len(dense({"q": ""})["q"]) == 0
    assert len(dense({})) == 0
    again = dense({"q": "", "p": " ", "r": "rank"}, run)
    assert [len(again[q]) for q in "qr"] == [0, 60]


def test_a_query_of_100_kb(encoder, short):
    dense = Dense(short, encoder)
    long = "rank and matrix " * 6500
    assert dense({"q": long})["q"].ids.tolist() == dense({"q": long[:2000]})["q"].ids.tolist()


def test_ties_at_the_last_place_go_to_the_larger_id(encoder):
    corpus = Corpus([f"d{i:02d}" for i in range(20)], ["rank"] * 18 + ["value", "norm"])
    dense = Dense(corpus, encoder)
    for queries in ({"q": "rank"}, {f"q{i}": "rank" for i in range(9)}):
        for k in (1, 3, 17, 18, 20):
            expected = [f"d{i:02d}" for i in range(17, -1, -1)][:k]
            for ranking in dense.search(queries, k).values():
                assert ranking.ids[: len(expected)].tolist() == expected
                assert len(ranking) == k


def test_one_document(encoder):
    assert Dense(Corpus(["a"], ["rank"]), encoder).search({"q": "value"}, 10)["q"].ids.tolist() == [
        "a"
    ]


def test_best_passages(encoder):
    text = prose(30, 1) + " red fish red fish red fish red fish red fish " + prose(30, 2)
    corpus = Corpus(["a", "b"], [text, "red"])
    dense = Dense(corpus, encoder)
    best, only = dense.best_passages("red fish red fish red fish", [0, 1])
    assert only == len(dense.passages) - 1
    scores = dense.vectors[dense.passages.of(0)] @ encoder.encode(["red fish red fish red fish"])[0]
    assert best == int(scores.argmax())


def test_many_queries_fill_up_in_rounds(encoder, mixed, queries, monkeypatch):
    calls = []
    original = dense_module.ExactSearch.top

    def top(self, vectors, k):
        calls.append((len(vectors), k))
        return original(self, vectors, k)

    monkeypatch.setattr(dense_module.ExactSearch, "top", top)
    dense = Dense(mixed, encoder)
    dense.search(queries, 30)
    assert calls[0] == (12, 46)  # one more shows ties
    assert [k for _, k in calls] == sorted(k for _, k in calls)


def test_hybrid(encoder, mixed, queries):
    hybrid = rrf(BM25(mixed), Dense(mixed, encoder)) % 5
    run = hybrid(queries)
    assert run.name == "rrf(bm25, dense) % 5"
    assert all(len(run[q]) == 5 for q in queries)
    assert hybrid.corpus is mixed
