"""`ExactSearch`: the nearest rows of a matrix, exactly."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError, require
from fullrank.retrieval.retriever import check_depth

Vectors: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]

# Queries and vectors that are multiplied at once: 64 MiB of scores at most.
_QUERIES = 256
_VECTORS = 65_536
# So many queries are cheaper one by one, each a single pass over the vectors, than by a product
# of matrices, which packs them first.
_FEW = 4


class ExactSearch:
    """Rows with the largest inner products, found by looking at all of them.

    Nothing is built and nothing copied: a memory map is read as it is. Memory use is bounded by
    the blocks that queries and vectors are taken in.

    Parameters
    ----------
    vectors
        ``(N, d)``, float32: an array or a memory map.

    Raises
    ------
    InputError
        For an array of another shape or type, or without rows.

    Examples
    --------
    >>> search = ExactSearch(np.eye(3, dtype=np.float32))
    >>> rows, scores = search.top(np.array([[0.2, 0.9, 0.4]], dtype=np.float32), k=2)
    >>> rows.tolist()
    [[1, 2]]
    """

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = check_vectors(vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def top(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """Find the best rows for each query.

        Parameters
        ----------
        queries
            ``(Q, d)``, float32.
        k
            How many; more than there are gives all.

        Returns
        -------
        rows
            ``(Q, min(k, N))``, best first.
        scores
            Inner products, of the same shape, float32.

        Raises
        ------
        InputError
            When the queries have another dimension, or a number on either side is not finite.
        """
        queries = check_vectors(queries, self.vectors.shape[1], "query vectors", empty=True)
        k = min(check_depth(k), len(self))
        rows = np.empty((len(queries), k), dtype=np.int64)
        scores = np.empty((len(queries), k), dtype=np.float32)
        for start in range(0, len(queries), _QUERIES):
            stop = start + _QUERIES
            rows[start:stop], scores[start:stop] = self._top(queries[start:stop], k)
        if not np.isfinite(scores).all():
            raise InputError("a score is not a finite number: vectors hold NaN or infinity")
        return rows, scores

    def _top(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """Walk over blocks of vectors, keeping the best so far."""
        rows = np.empty((len(queries), 0), dtype=np.int64)
        scores = np.empty((len(queries), 0), dtype=np.float32)
        for start in range(0, len(self), _VECTORS):
            found = _products(queries, self.vectors[start : start + _VECTORS])
            at, best = _largest(found, k)
            if start == 0:
                rows, scores = at, best
                continue
            scores = np.concatenate([scores, best], axis=1)
            rows = np.concatenate([rows, at + start], axis=1)
            at, scores = _largest(scores, k)
            rows = np.take_along_axis(rows, at, axis=1)
        return rows, scores


def _products(queries: Vectors, vectors: Vectors) -> Vectors:
    """``(Q, N)`` inner products."""
    if len(queries) <= _FEW and hasattr(np, "vecdot"):
        # A dot product a row runs at the speed of memory, where BLAS's matrix-vector product
        # takes two to three times as long.
        return np.stack([np.vecdot(vectors, query) for query in queries])
    out: Vectors = queries @ vectors.T
    return out


def _largest(scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Columns and values of the ``k`` largest of each row, best first."""
    torch = require("torch", extra="hf")
    top = torch.topk(torch.from_numpy(scores), min(k, scores.shape[1]), dim=1)
    return top.indices.numpy(), top.values.numpy()


def check_vectors(
    vectors: object, dimension: int | None = None, what: str = "vectors", *, empty: bool = False
) -> Vectors:
    """Return a plain ``(N, d)`` float32 view of an array or memory map, or raise."""
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype != np.float32:
        found = (
            f"{vectors.dtype} of shape {vectors.shape}"
            if isinstance(vectors, np.ndarray)
            else f"a {type(vectors).__name__}"
        )
        raise InputError(f"{what} are {found}; give a float32 array of shape (N, d)")
    if dimension is not None and vectors.shape[1] != dimension:
        raise InputError(
            f"{what} have dimension {vectors.shape[1]}, expected {dimension}: "
            "they come from another encoder"
        )
    if not empty and not len(vectors):
        raise InputError(f"there are no {what}")
    return vectors.view(np.ndarray)
