"""`RetrieverStage`: what retrievers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.run import Ids, Run
from fullrank.retrieval.stages import Stage

Rows: TypeAlias = npt.NDArray[np.int64]


class RetrieverStage(Stage):
    """A stage that finds items by itself: first in a pipeline, or to score what others found.

    As a first stage it returns the best ``depth`` items of its collection. Behind another stage
    (``bm25 >> dense``) it scores that stage's items, and only those.

    Attributes
    ----------
    depth
        How many items it returns for a query as a stage.
    """

    depth: int

    @abstractmethod
    def search(self, queries: Queries, k: int | None = None) -> Run:
        """Return the best ``k`` items of every query, ``depth`` by default."""

    @abstractmethod
    def rescore(self, queries: Queries, run: Run) -> Run:
        """Score the items of a run, and order them by it; what cannot be scored goes."""

    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        """Search where nothing was found yet, else score what was found."""
        return self.search(queries) if run is None else self.rescore(queries, run)


def check_depth(k: object, what: str = "k") -> int:
    """Return a number of results, or raise.

    >>> check_depth(10)
    10
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"{what} is {k!r}; it is a whole number of at least 1")
    return int(k)


def candidates(queries: Queries, run: Run) -> tuple[list[str], list[str]]:
    """Return texts and ids of the queries that are in the run, in its order.

    Raises
    ------
    InputError
        When the run holds a query whose text is not there.
    """
    listed = list(run)
    for query in listed:
        if query not in queries:
            raise InputError(f"query {query!r} was ranked before, but its text is not given here")
    return [queries[query] for query in listed], listed


def readable(text: str) -> str:
    r"""Return a text that tokenizers take: what no UTF-8 can carry (lone surrogates) becomes ``?``.

    >>> readable("a\ud800b")
    'a?b'
    """
    return text.encode("utf-8", "replace").decode()


def known_rows(query: str, ids: Ids, row: Callable[[str], int]) -> Rows:
    """Return the rows of some items, or say which one is not there.

    Parameters
    ----------
    query
        For the message.
    ids
        The items.
    row
        Item id -> row; raises KeyError for one that is not there.
    """
    try:
        return np.array([row(i) for i in ids.tolist()], dtype=np.int64)
    except KeyError as error:
        raise InputError(
            f"query {query!r}: item {error.args[0]!r} was ranked before, but is not in this "
            "collection"
        ) from None
