"""What retrievers, rerankers and generators have to offer, whoever writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.run import Run


@runtime_checkable
class Retriever(Protocol):
    """Finds items for queries in a collection it knows."""

    def search(self, queries: Queries, k: int) -> Run:
        """Return the best ``k`` items of every query (fewer where there are fewer)."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """Puts items that were found into a better order."""

    def rerank(self, queries: Queries, run: Run, corpus: Corpus | None = None) -> Run:
        """Return the same items for every query in a new order."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Answers queries from the items that were found."""

    def generate(
        self, queries: Queries, run: Run, corpus: Corpus | None = None
    ) -> Mapping[str, str]:
        """Return query id -> answer."""
        ...
