"""One generation of an index, as searches see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fullrank.retrieval.bm25 import BM25
from fullrank.retrieval.index_encoders import MODELS, StoredEncoder
from fullrank.retrieval.index_filters import Mask, Where, matching, parse_where
from fullrank.retrieval.index_manifest import EncoderRecord, Manifest
from fullrank.retrieval.index_store import generation_folder, open_current, reading
from fullrank.retrieval.index_tables import (
    Digests,
    StoredCorpus,
    read_filter_column,
    read_passages,
)
from fullrank.retrieval.index_vectors import Vectors, map_vectors
from fullrank.retrieval.passages import Passages

T = TypeVar("T")

BM25_FOLDER = "bm25"
VECTORS = "vectors"
# Passages that are encoded again when a model's key is not the one in the manifest.
_PROBES = 4


class View:
    """One generation, held against removal as long as this object lives.

    Everything is loaded when it is first needed, once, whichever thread is first.

    Parameters
    ----------
    folder
        Of the index.
    models
        Where to take some encoders' models from instead of where the manifest says.
    before
        A view whose loaded models are taken over where they are the same.

    Raises
    ------
    StoreError
        As :func:`~fullrank.retrieval.index_store.open_current`.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Any] | None = None,
        before: View | None = None,
    ) -> None:
        self.folder = folder
        self.manifest: Manifest
        self.manifest, self._hold = open_current(folder)
        self.part = generation_folder(folder, self.manifest.generation)
        self.corpus = StoredCorpus(self.part, self._hold)
        self._made: dict[object, Any] = {}
        self._locks: dict[object, threading.Lock] = {}
        given = models or {}
        self.encoders = {
            name: StoredEncoder(
                name, record, given.get(name, self._model(record)), self._probe(name)
            )
            for name, record in self.manifest.encoders.items()
        }
        for name, encoder in self.encoders.items():
            encoder.adopt_from(before.encoders.get(name) if before else None)

    def close(self) -> None:
        """Let the generation be removed. Only for a view that nobody else has."""
        self._hold.release()

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Make something on first use, and keep it."""
        if key not in self._made:
            with self._locks.setdefault(key, threading.Lock()):
                if key not in self._made:
                    self._made[key] = make()
        made: T = self._made[key]
        return made

    def bm25(self) -> BM25:
        """Return the lexical retriever."""

        def load() -> BM25:
            with reading(self.part, "the index of words"):
                retriever = BM25.load(self.part / BM25_FOLDER)
            retriever.corpus = self.corpus
            return retriever

        return self.once("bm25", load)

    def passages(self, encoder: str) -> tuple[Passages, Digests]:
        """Return which parts of documents an encoder's vectors are of."""

        def load() -> tuple[Passages, Digests]:
            with reading(self.part, f"the passages of {encoder!r}"):
                return read_passages(self.part, encoder)

        return self.once(("passages", encoder), load)

    def vectors(self, encoder: str) -> Vectors:
        """Return an encoder's vectors ``(P, d)``, mapped."""

        def load() -> Vectors:
            with reading(self.part, f"the vectors of {encoder!r}"):
                return map_vectors(self.part / VECTORS / f"{encoder}.npy")

        return self.once(("vectors", encoder), load)

    def dense(self, encoder: str) -> Any:
        """Return the retriever by one encoder's vectors; loads its model."""
        from fullrank.retrieval.dense import Dense

        return self.once(
            ("dense", encoder),
            lambda: Dense(
                self.corpus,
                self.encoders[encoder].loaded,
                vectors=self.vectors(encoder),
                passages=self.passages(encoder)[0],
            ),
        )

    def feedback(self, encoder: str) -> Any:
        """Return the reranker by pseudo-query over one encoder's vectors."""
        from fullrank.retrieval.pseudo_query import PseudoQueryReranker

        return self.once(
            ("feedback", encoder), lambda: PseudoQueryReranker.from_dense(self.dense(encoder))
        )

    def mask(self, where: Where) -> Mask | None:
        """Return which documents a filter lets through; None where it has no condition."""

        def column(field: str) -> Any:
            with reading(self.part, "the metadata"):
                return self.once(("field", field), lambda: read_filter_column(self.part, field))

        conditions = parse_where(where)
        return matching(conditions, column) if conditions else None

    def _model(self, record: EncoderRecord) -> str | Path:
        if record.home == "name":
            return record.model
        if record.home == "inside":
            return self.part / MODELS / record.model
        return Path((self.folder / record.model).resolve())

    def _probe(self, encoder: str) -> Callable[[], tuple[list[str], Vectors]]:
        """Return some texts that an encoder saw, and what it made of them."""
        part, corpus = self.part, self.corpus  # not the view, which holds the encoders

        def probe() -> tuple[list[str], Vectors]:
            passages, _ = read_passages(part, encoder)
            vectors = map_vectors(part / VECTORS / f"{encoder}.npy")
            rows = np.linspace(0, len(passages) - 1, min(_PROBES, len(passages))).astype(int)
            columns = (passages.document, passages.start, passages.stop, passages.lead)
            texts = [
                corpus.contents[d][: int(lead)] + corpus.contents[d][start:stop]
                for d, start, stop, lead in (
                    [0 if c is None else int(c[row]) for c in columns] for row in rows
                )
            ]
            return texts, vectors[rows]

        return probe
