"""`QueryVectors`: the vectors of the queries a retriever has just encoded, for who comes next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fullrank.retrieval.encoder import Encoder, Vectors


class QueryVectors:
    """Query vectors of one encoder; a reranker behind a retriever need not encode them again.

    Only the batch encoded last is remembered, so that what is timed is what is computed.

    Parameters
    ----------
    encoder
        What encodes.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._last: tuple[object, dict[str, int], Vectors] | None = None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Encode queries, always; returns ``(len(texts), d)`` unit vectors."""
        vectors = self.encoder.encode(texts, kind="query")
        # Set in one step: other threads see the old batch or this one.
        self._last = (self.encoder.state, {t: i for i, t in enumerate(texts)}, vectors)
        return vectors

    def recall(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of queries from the last batch where all are in it, else encode."""
        if (last := self._last) is not None:
            state, rows, vectors = last
            if state == self.encoder.state and all(text in rows for text in texts):
                return np.ascontiguousarray(vectors[[rows[text] for text in texts]])
        return self.encode(texts)
