"""Retrieval on Vaswani: the figures that are known for it."""

import pytest

from fullrank.core import Corpus
from fullrank.datasets import vaswani
from fullrank.evaluate import evaluate
from fullrank.retrieval import BM25, Dense, Encoder, PseudoQueryReranker, rrf, split_passages
from fullrank.retrieval.fast_encoder_int8 import is_supported

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def data(data_folder):
    return vaswani(data_folder / "vaswani")


@pytest.fixture(scope="module")
def dense(data):
    return Dense(data.corpus, Encoder(device="cpu"))


@pytest.fixture(scope="module")
def reached(data, dense):
    return means(dense(data.queries), data)


def means(run, data):
    return evaluate(run, data.qrels, ["nDCG@10", "AP", "R@100"]).mean


def test_bm25(data):
    found = means(BM25(data.corpus)(data.queries), data)
    assert found["nDCG@10"] == pytest.approx(0.3535, abs=5e-4)
    assert found["AP"] == pytest.approx(0.1880, abs=5e-4)
    assert found["R@100"] == pytest.approx(0.4701, abs=5e-4)


def test_dense(data, dense, reached):
    # Abstracts are short: splitting into passages changes next to nothing.
    assert len(data.corpus) <= len(dense.passages) < 1.01 * len(data.corpus)
    # What float32 reaches: 8 bits are half a percent worse at most.
    assert reached["nDCG@10"] >= 0.995 * 0.4335
    assert reached["nDCG@10"] == pytest.approx(0.4335, abs=0.003)
    assert reached["AP"] == pytest.approx(0.2528, abs=0.003)
    assert reached["R@100"] == pytest.approx(0.6074, abs=0.003)


def test_reranking_dense_and_hybrid(data, dense, reached):
    bm25 = BM25(data.corpus)
    feedback = PseudoQueryReranker.from_dense(dense, feedback=3, weighting="softmax")
    assert means((dense >> feedback)(data.queries), data)["nDCG@10"] > reached["nDCG@10"]
    hybrid = means((rrf(bm25, dense) % 100)(data.queries), data)
    assert hybrid["R@100"] > reached["R@100"]
    assert means((bm25 >> dense)(data.queries), data)["nDCG@10"] > 0.40


@pytest.mark.skipif(not is_supported(), reason="this CPU has no fast 8-bit products")
def test_eight_bits_are_as_good_as_float32(data, dense):
    assert dense.encoder.dtype == "int8"
    part = Corpus(data.corpus.ids[:2000], data.corpus.texts[:2000])
    found, exact = (
        Dense(part, Encoder(dense.encoder.model, dtype=dtype, device="cpu"))(data.queries).top(10)
        for dtype in ("int8", "float32")
    )
    shared = [len(set(found[q].ids) & set(exact[q].ids)) for q in data.queries]
    assert sum(shared) / len(shared) > 9


def test_splitting_needs_no_model(data, dense):
    assert len(split_passages(data.corpus, dense.encoder)) == len(dense.passages)
