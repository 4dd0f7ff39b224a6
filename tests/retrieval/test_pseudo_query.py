"""The pseudo-query reranker against its formula, and the choice of its weight."""

import numpy as np
import pytest
from test_passages import prose
from tiny_models import sentence_model

from fullrank.core import Corpus, InputError, Run
from fullrank.retrieval import BM25, Dense, Encoder, PseudoQueryReranker, Reranker, tune_feedback


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(sentence_model(tmp_path_factory.mktemp("model")), dtype="float32", max_tokens=20)


@pytest.fixture(scope="module")
def dense(encoder):
    texts = [prose(8 if i % 4 else 60, i) for i in range(50)]
    return Dense(Corpus([f"d{i}" for i in range(50)], texts), encoder, depth=30)


@pytest.fixture(scope="module")
def queries():
    return {f"q{i}": prose(4, 200 + i) for i in range(6)}


def by_hand(dense, query, ids, weight, feedback, shares):
    """Scores of ``ids`` for one query vector."""
    passages = {i: dense.vectors[dense.passages.of(dense.corpus.row(i))] for i in ids}
    near = np.stack([passages[i][np.argmax(passages[i] @ query)] for i in ids[:feedback]])
    a = shares(near @ query)
    moved = query + weight * (a / a.sum()) @ near
    moved /= np.linalg.norm(moved)
    return [float((passages[i] @ moved).max()) for i in ids]


SHARES = {
    "uniform": lambda cosines: np.ones(len(cosines)),
    "rank": lambda cosines: 1 / np.arange(1, len(cosines) + 1),
    "softmax": lambda cosines: np.exp(cosines / 0.05),
}


@pytest.mark.parametrize("weighting", list(SHARES))
def test_is_its_formula(dense, queries, weighting):
    reranker = PseudoQueryReranker.from_dense(dense, weight=0.4, feedback=3, weighting=weighting)
    found = dense(queries)
    run = reranker(queries, found)
    vectors = dense.encoder.encode(list(queries.values()), kind="query")
    for query, vector in zip(queries, vectors, strict=True):
        ids = found[query].ids.tolist()
        scores = by_hand(dense, vector, ids, 0.4, 3, SHARES[weighting])
        mine = run.to_dict()[query]
        assert [mine[i] for i in ids] == pytest.approx(scores, abs=1e-6)
        assert (np.diff(run[query].scores) <= 0).all()


def test_weight_zero_orders_by_the_query(dense, queries):
    reranker = PseudoQueryReranker.from_dense(dense, weight=0)
    found = dense(queries)
    for query, ranking in reranker(queries, found).items():
        np.testing.assert_allclose(ranking.scores, found[query].scores, atol=1e-6)


def test_behind_its_retriever_nothing_is_encoded_again(dense, queries, monkeypatch):
    calls = []
    original = Encoder.encode

    def encode(self, texts, **how):
        calls.append(len(texts))
        return original(self, texts, **how)

    monkeypatch.setattr(Encoder, "encode", encode)
    pipeline = dense >> PseudoQueryReranker.from_dense(dense)
    pipeline(queries)
    pipeline(queries)
    assert calls == [6, 6]
    own = PseudoQueryReranker(dense.encoder, dense.corpus.ids, np.eye(50, 64, dtype=np.float32))
    own(queries, dense(queries))
    assert calls == [6, 6, 6, 6]


def test_what_is_behind_depth_stays_there(dense, queries):
    reranker = PseudoQueryReranker.from_dense(dense, depth=4)
    found = dense(queries)
    for query, ranking in reranker(queries, found).items():
        assert set(ranking.ids[:4]) == set(found[query].ids[:4])
        assert ranking.ids[4:].tolist() == found[query].ids[4:].tolist()
        assert (np.diff(ranking.scores) <= 0).all()


def test_odd_runs(dense):
    reranker = PseudoQueryReranker.from_dense(dense)
    queries = {"none": "rank", "one": "value", "blank": ""}
    run = Run({"none": ([], []), "one": (["d3"], [1.0]), "blank": (["d1", "d2"], [2.0, 1.0])})
    out = reranker(queries, run)
    assert [len(out[q]) for q in queries] == [0, 1, 2]
    assert isinstance(reranker, Reranker)
    assert len(reranker({}, Run({}))) == 0
    with pytest.raises(InputError, match="nothing to rerank"):
        reranker(queries)
    with pytest.raises(InputError, match="'zz'"):
        reranker({"q": "rank"}, Run({"q": (["zz"], [1.0])}))
    with pytest.raises(InputError, match="text is not given"):
        reranker({}, run)


def test_behind_bm25(dense, queries):
    pipeline = BM25(dense.corpus) % 20 >> PseudoQueryReranker.from_dense(dense)
    assert pipeline(queries).name == "bm25 % 20 >> feedback"


def test_tuning(dense, queries):
    reranker = PseudoQueryReranker.from_dense(dense, depth=20)
    found = dense(queries)
    target = reranker.having(weight=0.5, feedback=2, weighting="rank")(queries, found)

    def closeness(run):
        return -sum(np.abs(run[q].scores - target[q].scores).sum() for q in queries)

    choice = tune_feedback(
        reranker,
        queries,
        found,
        closeness,
        weights=[0, 0.25, 0.5, 1],
        feedback=[2, 5],
        weightings=["uniform", "rank"],
    )
    best = choice.reranker
    assert (best.weight, best.feedback, best.weighting, best.depth) == (0.5, 2, "rank", 20)
    assert choice.value == 0
    assert len(choice.tried.rows) == 16
    assert reranker.weight == 0.3
    with pytest.raises(InputError, match="no weights"):
        tune_feedback(reranker, queries, found, closeness, weights=[])


def test_among_equals_the_smallest_weight_is_taken(dense, queries):
    reranker = PseudoQueryReranker.from_dense(dense)
    choice = tune_feedback(reranker, queries, dense(queries), lambda run: 1.0)
    assert choice.reranker.weight == 0


@pytest.mark.parametrize(
    "options",
    [
        {"weight": -1}, {"weight": float("nan")}, {"feedback": 0}, {"depth": 0},
        {"weighting": "sum"}, {"temperature": 0},
    ],
)  # fmt: skip
def test_bad_options(dense, options):
    with pytest.raises(InputError):
        PseudoQueryReranker.from_dense(dense, **options)
    with pytest.raises(InputError):
        PseudoQueryReranker.from_dense(dense).having(**options)


def test_bad_ids(dense):
    ids = [dense.corpus.ids[row] for row in dense.passages.document]
    with pytest.raises(InputError, match="one a vector"):
        PseudoQueryReranker(dense.encoder, ids[:-1], dense.vectors)
    with pytest.raises(InputError, match="side by side"):
        PseudoQueryReranker(dense.encoder, [*ids[:-1], ids[0]], dense.vectors)
    with pytest.raises(InputError, match="unknown options"):
        PseudoQueryReranker.from_dense(dense).having(wieght=0.2)
