"""`Dense`: exact search by embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.models import DEFAULT_ENCODER
from fullrank.core.run import Ids, Run, tie_ranks
from fullrank.retrieval.encoder import Encoder
from fullrank.retrieval.exact import ExactSearch, check_vectors
from fullrank.retrieval.passages import Passages, split_passages
from fullrank.retrieval.query_vectors import QueryVectors
from fullrank.retrieval.retriever import RetrieverStage, candidates, check_depth, known_rows
from fullrank.retrieval.stages import check_queries

Vectors: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]


class Dense(RetrieverStage):
    """Cosine similarity of embeddings, over all documents.

    A document that is longer than the encoder takes is split into overlapping passages; its score
    is that of its best passage. A query without any visible character has no results; one that is
    longer than the encoder takes is cut off there.

    Parameters
    ----------
    corpus
        What is searched.
    encoder
        An :class:`~fullrank.retrieval.Encoder`, or what one is made from: a name, a folder, a
        ``SentenceTransformer``.
    vectors
        ``(P, d)`` float32 unit vectors of the passages, an array or a memory map, when they are
        there already; row i belongs to passage i. They are encoded otherwise.
    passages
        True splits long documents (see :func:`~fullrank.retrieval.split_passages`); False
        encodes only what the encoder takes of each; :class:`~fullrank.retrieval.Passages` are
        taken as they are.
    depth
        Results of a query when it is used as a stage.
    device, max_tokens
        For an encoder that is made here.
    progress
        Whether to show bars while documents are split and encoded.

    Attributes
    ----------
    encoder, passages, vectors
        As above, made where they were not given.

    Raises
    ------
    InputError
        When vectors or passages do not fit the corpus or the encoder.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["singular values of a matrix", "a recipe for bread"])
    >>> Dense(corpus)({"q": "spectrum"})["q"].ids.tolist()
    ['a', 'b']
    """

    name = "dense"

    def __init__(
        self,
        corpus: Corpus,
        encoder: Any = DEFAULT_ENCODER,
        *,
        vectors: Vectors | None = None,
        passages: bool | Passages = True,
        depth: int = 100,
        device: str | None = None,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        self.corpus: Corpus = corpus
        self.depth = check_depth(depth, "depth")
        self.encoder = as_encoder(encoder, device, max_tokens)
        self.query_vectors = QueryVectors(self.encoder)
        if isinstance(passages, Passages):
            self.passages = passages
        elif passages:
            self.passages = split_passages(corpus, self.encoder, progress=progress)
        else:
            self.passages = Passages.whole(corpus.contents)
        if self.passages.documents != len(corpus):
            raise InputError(
                f"passages of {self.passages.documents} documents for a corpus of {len(corpus)}"
            )
        if vectors is None:
            texts = self.passages.texts(corpus.contents)
            vectors = self.encoder.encode(texts, kind="document", progress=progress)
        self.vectors = check_vectors(vectors, self.encoder.dimension)
        if len(self.vectors) != len(self.passages):
            raise InputError(
                f"{len(self.vectors)} vectors for {len(self.passages)} passages of "
                f"{len(corpus)} documents; they must match"
            )
        self._search = ExactSearch(self.vectors)

    @cached_property
    def _items(self) -> tuple[Ids, Rows]:
        ids = np.empty(len(self.corpus), dtype=object)
        ids[:] = self.corpus.ids
        return ids, tie_ranks(ids)

    # -- searching ---------------------------------------------------------------------------

    def search(self, queries: Queries, k: int | None = None) -> Run:
        """Return the best ``k`` documents of every query, ``depth`` by default."""
        check_queries(queries)
        k = min(self.depth if k is None else check_depth(k), len(self.corpus))
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        asked = [i for i, text in enumerate(queries.values()) if text.strip()]
        if asked:
            texts = list(queries.values())
            vectors = self.query_vectors.encode([texts[i] for i in asked])
            rows[asked], scores[asked] = self._best(vectors, k)
        ids, ties = self._items
        return Run.from_matrix(list(queries), ids, rows, scores, tie_rank=ties, name=self.name)

    def search_vectors(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """Find the best documents for query vectors.

        Parameters
        ----------
        queries
            ``(Q, d)``, float32.
        k
            How many; at most as many as there are documents.

        Returns
        -------
        rows, scores
            ``(Q, k)`` rows of the corpus, best first, and their scores.
        """
        k = min(k, len(self.corpus))
        if self.passages.single:
            return self._search.top(queries, k)
        rows = np.empty((len(queries), k), dtype=np.int64)
        scores = np.empty((len(queries), k), dtype=np.float32)
        # The best passages hold the best documents: look at more until enough documents are there.
        left = np.arange(len(queries))
        depth = k + k // 2
        while len(left):
            depth = min(depth, len(self.passages))
            found, values = self._search.top(queries[left], depth)
            documents, best, enough = _first_of_each(self.passages.document[found], values, k)
            rows[left[enough]], scores[left[enough]] = documents, best
            left = left[~enough]
            depth *= 2
        return rows, scores

    def _best(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """As :meth:`search_vectors`; of documents equal at the last place the larger ids stay."""
        ties = self._items[1]
        rows, scores = self.search_vectors(queries, k + 1)
        for i in np.flatnonzero(scores[:, k - 1] == scores[:, -1]) if scores.shape[1] > k else ():
            depth, found, values = k + 1, rows[i], scores[i]
            while values[-1] == values[k - 1] and depth < len(self.corpus):
                depth *= 2
                found, values = (x[0] for x in self.search_vectors(queries[i : i + 1], depth))
            best = np.lexsort((-ties[found], -values))[:k]
            rows[i, :k], scores[i, :k] = found[best], values[best]
        return rows[:, :k], scores[:, :k]

    def rescore(self, queries: Queries, run: Run) -> Run:
        """Score the documents of a run; a query without visible characters loses them."""
        texts, listed = candidates(queries, run)
        asked = [i for i, text in enumerate(texts) if text.strip() and len(run[listed[i]])]
        vectors = self.query_vectors.encode([texts[i] for i in asked])
        rankings: dict[str, tuple[Sequence[str] | Ids, Sequence[float] | Vectors]]
        rankings = {query: ([], []) for query in listed}
        for i, vector in zip(asked, vectors, strict=True):
            query = listed[i]
            rows = known_rows(query, run[query].ids, self.corpus.row)
            rankings[query] = (run[query].ids, self.scores(vector, rows))
        return Run(rankings, name=self.name)

    def scores(self, query: Vectors, rows: Rows) -> Vectors:
        """Score some documents for one query vector ``(d,)``; returns ``(len(rows),)``."""
        return best_scores(self.vectors, self.passages, query, rows)

    def best_passages(self, query: str, rows: Sequence[int]) -> list[int]:
        """Return, for each of some documents, the row of its best passage for a query."""
        vector = self.query_vectors.recall([query])[0]
        out = []
        for row in rows:
            mine = self.passages.of(row)
            out.append(mine.start + int(np.argmax(self.vectors[mine] @ vector)))
        return out


def best_scores(vectors: Vectors, passages: Passages, query: Vectors, rows: Rows) -> Vectors:
    """``(len(rows),)`` scores of documents: of the best passage of each."""
    if passages.single:
        out: Vectors = vectors[rows] @ query
        return out
    first, last = passages.first[rows], passages.first[rows + 1]
    counts = last - first
    starts = np.cumsum(counts) - counts
    spread = np.arange(counts.sum()) + np.repeat(first - starts, counts)
    best: Vectors = np.maximum.reduceat(vectors[spread] @ query, starts)
    return best


def _first_of_each(
    documents: Rows, scores: Vectors, k: int
) -> tuple[Rows, Vectors, npt.NDArray[np.bool_]]:
    """Keep the first of every document in each row, ``k`` of them, for rows that have so many."""
    order = np.argsort(documents, axis=1, kind="stable")
    ordered = np.take_along_axis(documents, order, axis=1)
    fresh = np.ones_like(ordered, dtype=bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    kept = np.empty_like(fresh)
    np.put_along_axis(kept, order, fresh, axis=1)
    place = np.cumsum(kept, axis=1)
    enough = place[:, -1] >= k
    kept = (kept & (place <= k))[enough]
    shape = (int(enough.sum()), k)
    return documents[enough][kept].reshape(shape), scores[enough][kept].reshape(shape), enough


def as_encoder(encoder: Any, device: str | None = None, max_tokens: int | None = None) -> Encoder:
    """Return an encoder, made from a name, folder or model unless it is one."""
    if not isinstance(encoder, Encoder):
        return Encoder(encoder, device=device, max_tokens=max_tokens)
    if device is not None or max_tokens is not None:
        raise InputError("device and max_tokens are the encoder's own; set them where it is made")
    return encoder
