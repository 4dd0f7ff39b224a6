"""Encoders that do not encode the same texts again, in this run of the demo or the next."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fullrank.core.corpus import Corpus
from fullrank.datasets import Dataset
from fullrank.demo.cache import Cache, Vectors
from fullrank.demo.memory import give_back_memory
from fullrank.retrieval import Encoder, RankingMetric

METRIC = "nDCG@10"


class CachedEncoder(Encoder):
    """An encoder whose vectors are kept, by its weights and the texts.

    Parameters
    ----------
    model
        As for :class:`~fullrank.retrieval.Encoder`.
    cache
        Where vectors are kept.
    options
        As for :class:`~fullrank.retrieval.Encoder`.
    """

    def __init__(self, model: Any, cache: Cache, **options: Any) -> None:
        super().__init__(model, **options)
        self._cache = cache

    def encode(
        self, texts: Sequence[str], *, kind: Any = "document", progress: bool = False
    ) -> Vectors:
        """Encode texts, unless the same encoder has done so before."""
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        key = self._cache.key("vectors", self.fingerprint, kind, len(texts), digest)
        encode = super().encode

        def make() -> Vectors:
            vectors = encode(texts, kind=kind, progress=progress)
            give_back_memory()
            return vectors

        return self._cache.array(key, make)


@dataclass(frozen=True)
class Encoded:
    """An encoder with the vectors of all documents."""

    encoder: Encoder
    vectors: Vectors


class Encoding:
    """Encodes the corpus, and ranks it, with one model or another."""

    def __init__(self, cache: Cache, corpus: Corpus, tokens: int, progress: bool) -> None:
        self._cache, self._corpus = cache, corpus
        self._tokens, self._progress = tokens, progress

    def __call__(self, model: Any) -> Encoded:
        """Encode the corpus with a model."""
        encoder = self.encoder(model)
        return Encoded(encoder, self._documents(encoder, self._corpus.contents))

    def encoder(self, model: Any) -> Encoder:
        """Return the encoder of a model."""
        return CachedEncoder(model, self._cache, max_tokens=self._tokens)

    def _documents(self, encoder: Encoder, texts: Sequence[str]) -> Vectors:
        return encoder.encode(texts, progress=self._progress)

    def metric(self, part: Dataset) -> RankingMetric:
        """Return nDCG@10 of a model's dense ranking on a part's queries."""
        return RankingMetric(
            METRIC,
            part.corpus,
            part.queries,
            part.qrels,
            exclude=part.exclude,
            encode=self._documents,
            encoder=self.encoder,
        )
