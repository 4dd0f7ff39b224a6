"""`BM25`: lexical search with bm25s."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.run import Ids, Run, tie_ranks
from fullrank.retrieval import bm25_files
from fullrank.retrieval.retriever import RetrieverStage, Rows, candidates, check_depth, known_rows
from fullrank.retrieval.stages import check_queries

Method: TypeAlias = Literal["lucene", "robertson", "atire", "bm25l", "bm25+"]
Scores: TypeAlias = npt.NDArray[np.float32]

_METHODS = ("lucene", "robertson", "atire", "bm25l", "bm25+")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What an index was made with."""

    method: Method
    k1: float
    b: float
    stopwords: str | tuple[str, ...] | None
    stemmer: str | None


class BM25(RetrieverStage):
    """BM25 over the titles and texts of a corpus.

    Scores are those of bm25s: lower-cased tokens of two characters or more, stop words removed;
    letters and their accents are composed first (NFC), in documents and queries.
    Only documents that score above one without any token of the query are results, so a query
    without known tokens (an empty one, or one of stop words) has none. Among equal scores at the
    last place kept, the larger id wins, as everywhere in a :class:`~fullrank.core.Run`.

    Parameters
    ----------
    corpus
        What is searched.
    method
        Formula of term weights and idf: ``"lucene"`` (default), ``"robertson"``, ``"atire"``,
        ``"bm25l"`` or ``"bm25+"``.
    k1, b
        How fast repeated terms saturate, and how much long documents are discounted; ``k1`` is
        above 0 for ``"bm25l"`` and ``"bm25+"``.
    stopwords
        A language that bm25s knows (``"en"``), a list of words, or None to keep all words.
    stemmer
        A language of the Snowball stemmers, e.g. ``"english"``, or None.
    depth
        Results of a query when it is used as a stage.

    Raises
    ------
    InputError
        For an unknown method, list of stop words or stemmer, or a parameter out of range.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["singular values of a matrix", "ranking of documents"])
    >>> BM25(corpus)({"q": "which matrix"})["q"].ids.tolist()
    ['a']
    """

    name = "bm25"

    def __init__(
        self,
        corpus: Corpus,
        *,
        method: Method = "lucene",
        k1: float = 1.5,
        b: float = 0.75,
        stopwords: str | Sequence[str] | None = "en",
        stemmer: str | None = None,
        depth: int = 100,
    ) -> None:
        words = stopwords if isinstance(stopwords, str) or stopwords is None else tuple(stopwords)
        self._settings = _checked(_Settings(method, k1, b, words, stemmer))
        self.corpus = corpus
        self.depth = check_depth(depth, "depth")
        self.ids = corpus.ids
        self._fingerprint = corpus.fingerprint
        library = require("bm25s", extra="search")
        tokens = self._tokenize(corpus.contents, return_ids=True)
        self._engine: Any = None
        # bm25s cannot index documents none of which holds a token; nothing is ever found there.
        if tokens.vocab:
            self._engine = library.BM25(method=method, k1=k1, b=b)
            self._engine.index(tokens, show_progress=False)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the corpus it was made from."""
        return self._fingerprint

    @cached_property
    def _items(self) -> tuple[Ids, Rows]:
        ids = np.empty(len(self.ids), dtype=object)
        ids[:] = self.ids
        return ids, tie_ranks(ids)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    def _tokenize(self, texts: Sequence[str], return_ids: bool = False) -> Any:
        library = require("bm25s", extra="search")
        settings = self._settings
        stemmer = None
        if settings.stemmer is not None:
            stemmer = require("Stemmer", extra="search").Stemmer(settings.stemmer)
        return library.tokenize(
            # An accent that is a character of its own would cut its word in two.
            [t if t.isascii() else unicodedata.normalize("NFC", t) for t in texts],
            stopwords=list(settings.stopwords)
            if isinstance(settings.stopwords, tuple)
            else settings.stopwords,
            stemmer=stemmer,
            return_ids=return_ids,
            show_progress=False,
        )

    def _scores(self, tokens: list[str]) -> tuple[Scores, np.float32]:
        """Scores of all documents, and what a document without any of the tokens gets."""
        engine = self._engine
        ids = engine.get_tokens_ids(tokens)
        background = np.float32(0)
        if engine.nonoccurrence_array is not None and ids:
            background += engine.nonoccurrence_array[np.asarray(ids)].sum()
        return engine.get_scores_from_ids(ids), background

    def search(self, queries: Queries, k: int | None = None) -> Run:
        """Return the best ``k`` documents of every query, ``depth`` by default."""
        check_queries(queries)
        k = min(self.depth if k is None else check_depth(k), len(self.ids))
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        ids, ties = self._items
        for i, tokens in enumerate(self._tokenize(list(queries.values()))):
            if tokens and self._engine is not None:
                found, background = self._scores(tokens)
                best = _best(found, background, k, ties)
                rows[i, : len(best)] = best
                scores[i, : len(best)] = found[best]
        return Run.from_matrix(list(queries), ids, rows, scores, tie_rank=ties, name=self.name)

    def rescore(self, queries: Queries, run: Run) -> Run:
        """Score the documents of a run; those without a token of the query get 0 or less."""
        texts, listed = candidates(queries, run)
        rankings = {}
        for query, tokens in zip(listed, self._tokenize(texts), strict=True):
            ids = run[query].ids
            rows = known_rows(query, ids, self._rows.__getitem__)
            scores = np.zeros(len(rows), dtype=np.float32)
            if tokens and self._engine is not None:
                found, background = self._scores(tokens)
                scores = found[rows] - background
            rankings[query] = (ids, scores)
        return Run(rankings, name=self.name)

    # -- on disk -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder: numpy arrays and JSON, each with its SHA-256.

        The folder appears whole or not at all; an index that stood there before is replaced.
        """
        described = {
            "method": self._settings.method,
            "k1": self._settings.k1,
            "b": self._settings.b,
            "stopwords": self._settings.stopwords,
            "stemmer": self._settings.stemmer,
            "corpus": self._fingerprint,
        }
        return bm25_files.write(Path(folder), described, self.ids, self._engine)

    @classmethod
    def load(cls, folder: str | Path, corpus: Corpus | None = None, *, depth: int = 100) -> BM25:
        """Read an index that :meth:`save` wrote.

        Parameters
        ----------
        folder
            Where it is.
        corpus
            Its documents. Searching does not need them; stages behind it may.
        depth
            As for :class:`BM25`.

        Raises
        ------
        StoreError
            When the folder is no such index, is damaged or newer, or belongs to another corpus.
        """
        described, ids, engine = bm25_files.read(Path(folder))
        if corpus is not None and corpus.fingerprint != described["corpus"]:
            raise StoreError(
                f"{folder}: this BM25 index belongs to another corpus; make it again from yours"
            )
        words = described["stopwords"]
        index = cls.__new__(cls)
        index._settings = _checked(
            _Settings(
                described["method"],
                described["k1"],
                described["b"],
                tuple(words) if isinstance(words, list) else words,
                described["stemmer"],
            )
        )
        index.corpus = corpus
        index.depth = check_depth(depth, "depth")
        index.ids = tuple(ids)
        index._fingerprint = described["corpus"]
        index._engine = engine
        return index


def _best(scores: Scores, background: np.float32, k: int, ties: Rows) -> Rows:
    """Rows of the best ``k`` scores above the background, ties by larger id; in any order."""
    cut = np.partition(scores, -k)[-k]
    if cut <= background:
        return np.flatnonzero(scores > background)
    above = np.flatnonzero(scores >= cut)
    if len(above) > k:
        above = above[np.lexsort((-ties[above], -scores[above]))[:k]]
    return above


def _checked(settings: _Settings) -> _Settings:
    """Raise now for what bm25s would stumble over later."""
    if settings.method not in _METHODS:
        raise InputError(f"method {settings.method!r} is none of {', '.join(_METHODS)}")
    if not (0 <= settings.k1 < math.inf and 0 <= settings.b <= 1):
        raise InputError(
            f"k1={settings.k1}, b={settings.b}; k1 is at least 0 and b between 0 and 1"
        )
    # Without k1 their terms do not tell a document with a token from one without, or are no number.
    if settings.k1 == 0 and settings.method in ("bm25l", "bm25+"):
        raise InputError(f"k1=0 finds nothing with the method {settings.method}; give k1 above 0")
    if isinstance(settings.stopwords, str):
        tokenization = require("bm25s.tokenization", extra="search")
        try:
            tokenization.tokenize([""], stopwords=settings.stopwords, show_progress=False)
        except ValueError as error:
            raise InputError(
                f"stop words {settings.stopwords!r} are not known; give a language such as 'en', "
                "a list of words, or None"
            ) from error
    if settings.stemmer is not None:
        stemmers = require("Stemmer", extra="search")
        if settings.stemmer not in stemmers.algorithms():
            raise InputError(
                f"stemmer {settings.stemmer!r} is none of {', '.join(stemmers.algorithms())}"
            )
    return settings
