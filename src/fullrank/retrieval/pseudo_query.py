"""`PseudoQueryReranker`: a listwise reranker that costs no model call.

The query's vector moves towards the vectors of the documents ranked first, and the candidates
are ordered by their cosines with the result: E2Rank's view of a list (Liu et al., 2025) as a
query, with stored vectors in the place of a prompt; in the vector space model this is Rocchio's
pseudo-relevance feedback.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.run import Run
from fullrank.core.table import Table
from fullrank.retrieval.dense import Dense, as_encoder, best_scores
from fullrank.retrieval.exact import check_vectors
from fullrank.retrieval.passages import Passages
from fullrank.retrieval.query_vectors import QueryVectors
from fullrank.retrieval.reranker import RerankerStage, with_tail
from fullrank.retrieval.retriever import candidates, check_depth, known_rows

Vectors: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]
Weighting: TypeAlias = Literal["uniform", "rank", "softmax"]


class PseudoQueryReranker(RerankerStage):
    """Rerank by the query's vector plus a weighted mean of the top documents' vectors.

    Parameters
    ----------
    encoder
        Encodes the query; an :class:`~fullrank.retrieval.Encoder` or what one is made from.
    ids
        Document id of each vector. One that stands several times in a row has as many passages:
        its score is that of the best, and the passage nearest to the query stands for it.
    vectors
        ``(P, d)`` float32 unit vectors of documents or passages.
    weight
        Of the mean, against 1 for the query (0.3 in our tests; choose it with
        :func:`tune_feedback`). With 0, documents are ordered by their cosine with the query.
    feedback
        How many of the first documents take part.
    weighting
        How much each of them counts: ``"uniform"``, ``"rank"`` (``1 / rank``) or ``"softmax"``
        of their cosines with the query, divided by ``temperature``.
    temperature
        For ``"softmax"``.
    depth
        How many documents of a query are reranked; what is behind them stays behind them.

    Raises
    ------
    InputError
        When ids and vectors do not fit, or for a parameter out of range.

    Examples
    --------
    >>> from fullrank.retrieval import BM25, Dense
    >>> corpus = Corpus(["a", "b", "c"], ["cats purr", "cats and kittens", "kittens play"])
    >>> dense = Dense(corpus)
    >>> reranked = BM25(corpus) >> PseudoQueryReranker.from_dense(dense, weight=0.5, feedback=1)
    >>> reranked({"q": "do cats purr?"})["q"].ids.tolist()
    ['a', 'b']
    """

    name = "feedback"

    def __init__(
        self,
        encoder: Any,
        ids: Sequence[str],
        vectors: Vectors,
        weight: float = 0.3,
        feedback: int = 5,
        depth: int = 100,
        *,
        weighting: Weighting = "uniform",
        temperature: float = 0.05,
    ) -> None:
        self.encoder = as_encoder(encoder)
        self.query_vectors = QueryVectors(self.encoder)
        self.vectors = check_vectors(vectors, self.encoder.dimension)
        if len(ids) != len(self.vectors):
            raise InputError(f"{len(ids)} ids for {len(self.vectors)} vectors; give one a vector")
        self._rows, self._passages = _grouped(ids)
        self._set(weight, feedback, depth, weighting, temperature)

    @classmethod
    def from_dense(cls, dense: Dense, **options: Any) -> Self:
        """Make one from a dense retriever's encoder, documents and vectors.

        Behind that retriever it encodes nothing: it takes the query vectors from it.
        ``options`` are those of the class.
        """
        ids = [dense.corpus.ids[row] for row in dense.passages.document]
        reranker = cls(dense.encoder, ids, dense.vectors, **options)
        reranker.query_vectors = dense.query_vectors
        reranker.corpus = dense.corpus
        return reranker

    def _set(
        self, weight: float, feedback: int, depth: int, weighting: Weighting, temperature: float
    ) -> None:
        if not 0 <= weight < np.inf:
            raise InputError(f"weight is {weight}; it is a finite number of at least 0")
        if weighting not in get_args(Weighting):
            raise InputError(f"weighting {weighting!r} is none of {', '.join(get_args(Weighting))}")
        if not 0 < temperature < np.inf:
            raise InputError(f"temperature is {temperature}; it is a number above 0")
        self.weight, self.weighting, self.temperature = float(weight), weighting, temperature
        self.feedback = check_depth(feedback, "feedback")
        self.depth = check_depth(depth, "depth")

    def having(self, **options: Any) -> Self:
        """Return the same reranker with another weight, feedback, depth or weighting."""
        other = copy.copy(self)
        names = ("weight", "feedback", "depth", "weighting", "temperature")
        if unknown := set(options) - set(names):
            raise InputError(f"unknown options {sorted(unknown)}; there are {', '.join(names)}")
        other._set(**{name: options.get(name, getattr(self, name)) for name in names})
        return other

    def rerank(self, queries: Queries, run: Run, corpus: Corpus | None = None) -> Run:
        """Reorder the first ``depth`` documents of every query."""
        texts, listed = candidates(queries, run)
        asked = [i for i, query in enumerate(listed) if len(run[query])]
        encoded = self.query_vectors.recall([texts[i] for i in asked])
        rankings = {query: (run[query].ids, run[query].scores) for query in listed}
        for i, vector in zip(asked, encoded, strict=True):
            ranking = run[listed[i]]
            rows = known_rows(listed[i], ranking.ids[: self.depth], self._rows.__getitem__)
            pseudo = self._pseudo_query(vector, rows[: self.feedback])
            rankings[listed[i]] = with_tail(
                ranking, best_scores(self.vectors, self._passages, pseudo, rows)
            )
        return Run(rankings, name=self.name)

    def _pseudo_query(self, query: Vectors, rows: Rows) -> Vectors:
        """Unit vector of the query plus the weighted mean of some documents."""
        if self.weight == 0:
            return query
        nearest = [
            (mine := self._passages.of(row)).start + int(np.argmax(self.vectors[mine] @ query))
            for row in rows.tolist()
        ]
        documents = self.vectors[nearest]
        if self.weighting == "uniform":
            shares = np.ones(len(rows))
        elif self.weighting == "rank":
            shares = 1.0 / np.arange(1, len(rows) + 1)
        else:
            cosines = (documents @ query).astype(np.float64) / self.temperature
            shares = np.exp(cosines - cosines.max())
        shares = (self.weight * shares / shares.sum()).astype(np.float32)
        moved = query + shares @ documents
        unit: Vectors = moved / max(float(np.linalg.norm(moved)), np.finfo(np.float32).tiny)
        return unit


@dataclass(frozen=True)
class FeedbackChoice:
    """What :func:`tune_feedback` chose, the metric's value there, and all it tried."""

    reranker: PseudoQueryReranker
    value: float
    tried: Table


def tune_feedback(
    reranker: PseudoQueryReranker,
    queries: Queries,
    run: Run,
    metric: Callable[[Run], float],
    *,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    feedback: Sequence[int] | None = None,
    weightings: Sequence[Weighting] | None = None,
) -> FeedbackChoice:
    """Choose how much the top documents count, on queries that are not the test's.

    Parameters
    ----------
    reranker
        Its own settings hold for what is not varied.
    queries, run
        Development queries and what was found for them.
    metric
        Run -> value, larger is better.
    weights, feedback, weightings
        What to try, in all combinations; the first of equally good ones is taken.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["cats purr", "dogs bark"])
    >>> dense = Dense(corpus)
    >>> queries = {"q": "barking"}
    >>> choice = tune_feedback(
    ...     PseudoQueryReranker.from_dense(dense), queries, dense(queries),
    ...     lambda run: float(run["q"].ids[0] == "b"), weights=[0.0, 0.3],
    ... )
    >>> choice.value, choice.reranker.weight
    (1.0, 0.0)
    """
    settings = [
        {"weight": weight, "feedback": count, "weighting": weighting}
        for weighting in (weightings or [reranker.weighting])
        for count in (feedback or [reranker.feedback])
        for weight in weights
    ]
    if not settings:
        raise InputError("there are no weights to try")
    # Encoded once for all of them.
    reranker.query_vectors.recall([queries[query] for query in run if query in queries])
    tried = [reranker.having(**setting) for setting in settings]
    values = [float(metric(one.rerank(queries, run).named(one.name))) for one in tried]
    best = int(np.argmax(values))
    rows = [[*s.values(), value] for s, value in zip(settings, values, strict=True)]
    table = Table(["weight", "feedback", "weighting", "value"], rows, formats={"value": ".4f"})
    return FeedbackChoice(tried[best], values[best], table)


def _grouped(ids: Sequence[str]) -> tuple[dict[str, int], Passages]:
    """Number the documents; rows of the same id in succession are its passages."""
    number: dict[str, int] = {}
    document = np.array([number.setdefault(i, len(number)) for i in ids], dtype=np.int64)
    if (np.diff(document) < 0).any():
        again = ids[int(np.flatnonzero(np.diff(document) < 0)[0]) + 1]
        raise InputError(f"the vectors of document {again!r} do not stand side by side")
    nowhere = np.zeros_like(document)
    return number, Passages(document, nowhere, nowhere)
